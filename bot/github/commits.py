"""A repository's commits through GitHub's API, as `bot.git.Repository` has them from a checkout: no file is ever written.

Whole trees are read, one request each, and not the lists of changed files, which GitHub cuts off after 300 or 3,000.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bot.git import FILE_MODES, Blob
from bot.github.client import GitHub, TreeEntry
from merge.errors import SourceError

# Files too long for a recipe are looked into to tell whether they would be one; not any number of them.
LONG_FILES = 40
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


class RemoteRepository:
    """The repository behind `github`. Paths are relative to the folder `inside` it.

    `folder` stands for where a checkout would be; nothing is there. `globs` say which folders are looked into where a tree
    is too large to be told in one answer. The trees of the `expected` commits are asked for at once.
    """

    is_shallow = False

    def __init__(
        self, github: GitHub, folder: Path, inside: str, globs: Sequence[str], expected: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self._github = github
        self._inside = "" if inside in ("", ".") else f"{inside.strip('/')}/"
        self._starts = [_fixed_start(self._inside + pattern) for pattern in globs if not pattern.startswith("!")]
        # By commit: every entry of its tree by path from the top.
        self._trees: dict[str, dict[str, TreeEntry]] = {}
        self._read: dict[str, bytes] = {}
        pool = ThreadPoolExecutor(2)
        self._expected = {
            commit: pool.submit(github.another().tree, commit) for commit in expected if _COMMIT.fullmatch(commit)
        }

    def commit(self, name: str) -> str | None:
        """The id of a commit that is known already, or of origin's branch."""
        if name.startswith("refs/remotes/origin/"):
            return self._github.commit(f"heads/{name.removeprefix('refs/remotes/origin/')}")
        return name if name in self._trees else None

    def fetch(self, commit: str) -> bool:
        """Whether there is such a commit: its tree is read."""
        if commit not in self._trees and _COMMIT.fullmatch(commit) and set(commit) != {"0"}:
            expected = self._expected.pop(commit, None)
            found = expected.result() if expected else self._github.tree(commit)
            if found is not None:
                entries, whole = found
                self._trees[commit] = {entry.path: entry for entry in (entries if whole else self._walk(commit, ""))}
        return commit in self._trees

    def parents(self, commit: str) -> list[str]:
        """Not asked for: a merge commit of GitHub's is no more than head and base, which are known."""
        return []

    def merge_base(self, first: str, second: str) -> str | None:
        """The commit where two lines of history parted; None where one of them is not there."""
        return self._github.merge_base(first, second)

    def files(self, commit: str) -> dict[str, Blob]:
        """Every ordinary file of a commit. Links and submodules are not files."""
        return {
            entry.path.removeprefix(self._inside): Blob(entry.oid, entry.size)
            for entry in self._tree(commit).values()
            if entry.mode in FILE_MODES and entry.path.startswith(self._inside)
        }

    def read_all(self, blobs: Iterable[Blob], limit: int) -> dict[str, bytes]:
        """By id the first `limit` bytes of each file. Raises SourceError where too many are longer than that."""
        wanted = {blob.oid: blob.size for blob in blobs}
        new = {oid: size for oid, size in wanted.items() if oid not in self._read}
        if sum(size > limit for size in new.values()) > LONG_FILES:
            raise SourceError(
                f"{self._github.name}: more than {LONG_FILES} files that the input `recipes` matches are longer than a "
                "recipe can be; let it match only recipes"
            )
        self._read |= self._github.blobs(new, limit)
        return {oid: self._read[oid] for oid in wanted}

    def folder_id(self, commit: str, path: str) -> str | None:
        """What identifies the content of a file or folder in a commit; None where it has none."""
        inside = posixpath.normpath(self._inside + path)
        entry = self._tree(commit).get(inside)
        return entry.oid if entry else None

    def _tree(self, commit: str) -> dict[str, TreeEntry]:
        if not self.fetch(commit):
            raise SourceError(f"GitHub has no commit {commit[:9]} in {self._github.name}; was its branch deleted?")
        return self._trees[commit]

    def _walk(self, oid: str, path: str) -> list[TreeEntry]:
        """The entries below a folder that the globs may match, folder by folder where GitHub does not tell them at once."""
        found: list[TreeEntry] = []
        listed = self._github.tree(oid, recursive=False)
        if listed is None or not listed[1]:
            raise SourceError(f"{self._github.name}: the folder {path or '/'} has more files than GitHub's API lists")
        for entry in listed[0]:
            place = TreeEntry(path + entry.path, entry.mode, entry.kind, entry.oid, entry.size)
            found.append(place)
            if entry.kind == "tree" and any(_may_match(f"{place.path}/", start) for start in self._starts):
                whole = self._github.tree(entry.oid)
                if whole is not None and whole[1]:
                    below = [TreeEntry(f"{place.path}/{e.path}", e.mode, e.kind, e.oid, e.size) for e in whole[0]]
                    found += below
                else:
                    found += self._walk(entry.oid, f"{place.path}/")
        return found


def _fixed_start(pattern: str) -> str:
    """What every path that a glob matches begins with."""
    return re.split(r"[*?\[]", pattern.removeprefix("./"), maxsplit=1)[0]


def _may_match(folder: str, start: str) -> bool:
    return folder.startswith(start) or start.startswith(folder)
