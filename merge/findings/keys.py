"""What may be wrong with a recipe's keys and values."""

from __future__ import annotations

from merge.findings.base import ERROR, WARNING, Finding


class UnknownKey(Finding):
    """The key is not one of a recipe's. A misspelt key would otherwise be ignored and its default used without a word.
    `moerge schema` prints all keys for your editor."""

    id = "unknown-key"
    level = ERROR
    message = "{key!r} is not a key of {what}{hint}"


class IgnoredKey(Finding):
    """The key belongs to mergekit's other merge methods. mergekit-moe ignores it, and so do we; it can be deleted."""

    id = "ignored-key"
    level = WARNING
    message = "{key!r} has no meaning in a mixture-of-experts recipe and is ignored, as mergekit-moe ignores it"


class MissingKey(Finding):
    """A key without which there is nothing to build."""

    id = "missing-key"
    level = ERROR
    message = "{key!r} is missing from {what}"


class WrongType(Finding):
    """The value has another type than the key needs. YAML reads some plain words as other things: `no` as false, `12:30`
    as a number, `2024-01-01` as a date. Put such text in quotes."""

    id = "wrong-type"
    level = ERROR
    message = "{key} must be {expected}, not {found}{hint}"


class OutOfRange(Finding):
    """The number lies outside what can be meant."""

    id = "out-of-range"
    level = ERROR
    message = "{key} is {value}: {problem}"


class UnknownValue(Finding):
    """The value is not one of those the key takes."""

    id = "unknown-value"
    level = ERROR
    message = "{key} cannot be {value!r}{hint}; it is one of {choices}"


class BadModelReference(Finding):
    """A source model is `owner/name` on the Hub, `owner/name@revision` for a branch, tag or commit of it, or a local folder
    (`./models/mine`). An expert may have a LoRA adapter: `model+adapter`, each written like that."""

    id = "bad-model-reference"
    level = ERROR
    message = "{value!r} is not a model reference ({problem}); write owner/name, owner/name@revision or ./folder"


class BadRepository(Finding):
    """`release.repo` is where the model goes, `release.replaces` the one it follows: `owner/name`, with letters, digits, `.`, `-` and `_`."""

    id = "bad-repository"
    level = ERROR
    message = "{value!r} is not the name of a Hub repository; write owner/name"


class BadText(Finding):
    """The value must be a text that can stand in a title, a tag or a label: one line, no control characters, not too
    long."""

    id = "bad-text"
    level = ERROR
    message = "{key} {problem}"


class TooManyMistakes(Finding):
    """Only the first mistakes of a file are told. Often they have one cause: another kind of file, or an indentation."""

    id = "too-many-mistakes"
    level = ERROR
    message = "there are {count} more mistakes in this recipe; mend these first"
