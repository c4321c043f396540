"""Which files a repository stores as large ones (.gitattributes), and which it leaves out (.gitignore)."""

from __future__ import annotations

import codecs
import functools
import re

_LARGE = {"filter=lfs", "diff=lfs", "merge=lfs"}


def large_patterns(gitattributes: str) -> list[str]:
    """The patterns that .gitattributes gives to Git LFS."""
    found = []
    for line in gitattributes.splitlines():
        pattern, *attributes = line.split() or [""]
        if pattern and not pattern.startswith("#") and _LARGE & set(attributes):
            found.append(pattern)
    return found


def is_large(path: str, patterns: list[str]) -> bool:
    """Whether one of the patterns names the file."""
    return any(_regex(pattern).fullmatch(path) for pattern in patterns)


def is_binary(sample: bytes) -> bool:
    """Whether the beginning of a file is not text: a NUL, or bytes that cannot be UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # incremental: a character may be cut at the end
    except UnicodeDecodeError:
        return True
    return b"\0" in sample


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether .gitignore names the file or one of its folders; the last pattern that matches decides."""
    ignored = False
    for line in gitignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        negated, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        only_folders, pattern = pattern.endswith("/"), pattern.rstrip("/")
        parts = path.split("/")
        candidates = ["/".join(parts[:count]) for count in range(1, len(parts) + (not only_folders))]
        if pattern and any(_regex(pattern).fullmatch(each) for each in candidates):
            ignored = not negated
    return ignored


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    """gitignore's pattern language: without a slash it names a file in any folder, else a path from the root."""
    anchored = "/" in pattern
    out, i, pattern = "" if anchored else "(?:.*/)?", 0, pattern.removeprefix("/")[:500]
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(pattern[i], re.escape(pattern[i]))
            i += 1
    return re.compile(out)
