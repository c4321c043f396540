"""What may be wrong with the file before it is a recipe: its bytes and its YAML."""

from __future__ import annotations

from merge.findings.base import ERROR, Finding


class NotYaml(Finding):
    """The file is not valid YAML. Most often an indentation, a missing space after a colon, or an unclosed quote or
    bracket at the line named."""

    id = "not-yaml"
    level = ERROR
    message = "this is not valid YAML: {problem}"


class NotText(Finding):
    """The file is not UTF-8 text, or it holds characters that YAML does not allow (NUL and other control characters).
    Save it as plain UTF-8."""

    id = "not-text"
    level = ERROR
    message = "this is not plain UTF-8 text: {problem}"


class NotReadable(Finding):
    """The recipe file cannot be opened. Check the path and the permissions."""

    id = "not-readable"
    level = ERROR
    message = "the recipe cannot be read: {problem}"


class TooLarge(Finding):
    """A recipe is a page of text. A larger file is refused before it is parsed, because parsing a hostile one can take
    minutes. Long prompts belong in a file of their own."""

    id = "too-large"
    level = ERROR
    message = "the file has {size} bytes; a recipe may have {limit}"


class TooDeep(Finding):
    """Lists and mappings are nested deeper than any recipe needs; refused before anything walks them."""

    id = "too-deep"
    level = ERROR
    message = "nested more than {limit} levels deep"


class AliasUsed(Finding):
    """YAML aliases (`*name`, and the merge key `<<`) are refused: a few hundred bytes of them can expand to gigabytes.
    Write the value out where it is used."""

    id = "alias-used"
    level = ERROR
    message = "YAML aliases and merge keys ({shown}) are not allowed here; write the value out"


class TagUsed(Finding):
    """YAML tags (`!something`) ask a loader to build objects. A recipe needs none."""

    id = "tag-used"
    level = ERROR
    message = "YAML tag {tag!r} is not allowed; write the plain value"


class DuplicateKey(Finding):
    """The same key stands twice in one mapping. YAML readers silently keep the last one, which is rarely what was
    meant. Delete one of them."""

    id = "duplicate-key"
    level = ERROR
    message = "key {key!r} stands here a second time (first at line {first}); keep one of them"


class NotARecipe(Finding):
    """The file is valid YAML, but not a recipe: its top level must be a mapping with `base_model` and `experts`."""

    id = "not-a-recipe"
    level = ERROR
    message = "a recipe is a mapping with base_model and experts; this is {found}"
