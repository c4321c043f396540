"""What a finding is: one statement about a recipe, as data.

A finding has an identifier that never changes, a level, a message with named holes, and a docstring: what is wrong, why it
matters, how to mend it. docs/findings.md is made from these docstrings.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

ERROR = "error"
WARNING = "warning"
NOTICE = "notice"

# Whose mistake a finding is: the recipe's author can mend the one, the owner of a source model the other.
RECIPE = "recipe"
SOURCE = "source"


class Finding:
    """One statement about a recipe, at a line of it where it has one. Made by calling a subclass with its holes."""

    id: ClassVar[str]
    level: str
    message: ClassVar[str]
    fault: ClassVar[str] = RECIPE

    def __init__(self, line: int | None = None, **holes: Any) -> None:
        self.line = line
        self.holes = holes

    def strict(self) -> Finding:
        """The same finding with a warning made an error."""
        found = copy.copy(self)
        found.level = ERROR if self.level == WARNING else self.level
        return found

    @property
    def text(self) -> str:
        """The message with its holes filled, in one line, control characters shown as escapes."""
        return printable(self.message.format(**{name: _shortened(value) for name, value in self.holes.items()}))

    def located(self, path: str) -> str:
        """`path:line: level[id]: text`, the form editors and compilers use."""
        place = path if self.line is None else f"{path}:{self.line}"
        return f"{place}: {self.level}[{self.id}]: {self.text}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.id, self.line, self.text))

    def __repr__(self) -> str:
        return f"<{self.id} line {self.line}: {self.text}>"


def printable(text: str) -> str:
    """`text` in one line, with what would steer a terminal or reorder the line written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(value: Any, limit: int = 300) -> Any:
    """A text of at most `limit` characters: a hostile value must not fill the screen."""
    return f"{value[:limit]}…" if isinstance(value, str) and len(value) > limit else value


def all_findings() -> list[type[Finding]]:
    """Every kind of finding, by id."""
    return sorted(_subclasses(Finding), key=lambda kind: kind.id)


def documentation() -> str:
    """docs/findings.md."""
    parts = [
        "# Findings",
        "",
        "What `moerge` may say about a recipe. An *error* stops a build, a *warning* does not (`moerge preview --strict` makes it",
        "an error), a *notice* only informs. *In a source*: the recipe may be right, and a model that it names is not.",
        "This page is made from the code: `python -m merge.findings > docs/findings.md`.",
    ]
    for kind in all_findings():
        parts += [
            "",
            f"## {kind.id}",
            "",
            f"*{kind.level}{' in a source' if kind.fault == SOURCE else ''}*: `{kind.message}`",
            "",
            inspect.cleandoc(kind.__doc__ or ""),
        ]
    return "\n".join(parts) + "\n"


def _subclasses(kind: type[Finding]) -> list[type[Finding]]:
    return [found for sub in kind.__subclasses__() for found in [sub, *_subclasses(sub)]]
