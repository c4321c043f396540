"""Globs over the paths of a repository, with `**` for any number of folders and `!` to leave out again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from merge.errors import UsageError


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path with `/` matches: the last pattern that says something about it decides, as in .gitignore.

    `*` and `?` stay inside one folder, `**/` is any number of folders, `[a-z]` and `[!a-z]` a choice of characters; a
    pattern that begins with `!` leaves out what it matches; `./` at the beginning means nothing. Raises UsageError.
    """
    named = [(not pattern.startswith("!"), pattern.removeprefix("!").removeprefix("./")) for pattern in patterns]
    rules = [(wanted, name, _expression(name)) for wanted, name in named]

    def matches(path: str) -> bool:
        # A path always matches itself, also where its name has characters that mean something in a glob.
        return next((wanted for wanted, name, rule in reversed(rules) if path == name or rule.fullmatch(path)), False)

    return matches


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    rest = pattern
    parts: list[str] = []
    while rest:
        if rest.startswith("**/"):
            token, part = "**/", r"(?:[^/]+/)*"
        elif rest == "**":
            token, part = "**", r".*"
        elif rest.startswith("*"):
            token = re.match(r"\*+", rest)[0]  # type: ignore[index]
            part = r"[^/]*"
        elif rest.startswith("?"):
            token, part = "?", r"[^/]"
        elif found := re.match(r"\[(!?)(\]?[^\]]*)\]", rest):
            token = found[0]
            inside = found[2].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            part = f"(?!/)[{'^' if found[1] else ''}{inside}]"
        else:
            token, part = rest[0], re.escape(rest[0])
        parts.append(part)
        rest = rest[len(token) :]
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a glob: {error}") from None
