"""The git repositories behind the server: bare ones on disk, read and written with git itself."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_ENV = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "GitHub",
    "GIT_AUTHOR_EMAIL": "noreply@github.com",
    "GIT_COMMITTER_NAME": "GitHub",
    "GIT_COMMITTER_EMAIL": "noreply@github.com",
    "LC_ALL": "C",
}


class GitError(Exception):
    """git said no."""


@dataclass(frozen=True)
class Entry:
    """One entry of a tree; `size` in bytes is of files only."""

    path: str
    mode: str
    kind: str
    sha: str
    size: int | None


class Bare:
    """A bare repository at `path`, made if need be. Others of the same network are read as its alternates are: by fetching."""

    def __init__(self, path: Path, branch: str) -> None:
        self.path = path
        if not path.exists():
            path.mkdir(parents=True)
            self.run("init", "--quiet", "--bare", f"--initial-branch={branch}")
            # As GitHub does: any commit that is there may be fetched by its id.
            self.run("config", "uploadpack.allowAnySHA1InWant", "true")

    def run(self, *arguments: str, data: bytes | None = None) -> bytes:
        done = subprocess.run(["git", "-C", str(self.path), *arguments], input=data, capture_output=True, env=_ENV)
        if done.returncode:
            raise GitError(done.stderr.decode(errors="replace").strip() or f"git {arguments[0]} failed")
        return done.stdout

    def text(self, *arguments: str) -> str:
        return os.fsdecode(self.run(*arguments)).strip()

    def resolve(self, name: str, kind: str = "commit") -> str | None:
        """The id that a name means; None where there is no such object."""
        try:
            return self.text("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{{kind}}}") or None
        except GitError:
            return None

    def refs(self, prefix: str) -> dict[str, tuple[str, str]]:
        """By full name, the id and the type of what each ref points at."""
        shown = self.text("for-each-ref", "--format=%(refname) %(objectname) %(objecttype)", prefix)
        return {name: (sha, kind) for name, sha, kind in (line.split() for line in shown.splitlines())}

    def update(self, ref: str, sha: str | None) -> None:
        """Point a ref at an object, or delete it."""
        self.run("update-ref", *(["-d", ref] if sha is None else [ref, sha]))

    def tree(self, name: str, recursive: bool) -> list[Entry]:
        found = []
        options = ["-r", "-t"] if recursive else []
        for line in self.run("ls-tree", *options, "-l", "-z", name).split(b"\0"):
            if line:
                about, _, path = line.partition(b"\t")
                mode, kind, sha, size = about.decode().split()
                found.append(Entry(os.fsdecode(path), mode, kind, sha, int(size) if size != "-" else None))
        return found

    @lru_cache(maxsize=1024)  # noqa: B019 (as long as the server: a file's id is a hash of it)
    def blob(self, sha: str) -> bytes:
        return self.run("cat-file", "blob", sha)

    def commit(self, sha: str) -> dict[str, Any]:
        """A commit's facts: tree, parents, author, message."""
        form = "%T%x00%P%x00%an%x00%ae%x00%aI%x00%cI%x00%B"
        shown = os.fsdecode(self.run("show", "--no-patch", f"--format={form}", sha)).split("\0", 6)
        tree, parents, name, email, date, committed, message = shown
        return {
            "sha": sha, "tree": tree, "parents": parents.split(), "name": name, "email": email, "date": date,
            "committed": committed, "message": message.rstrip("\n"),
        }  # fmt: skip

    def log(self, first: str | None, last: str) -> list[str]:
        """Ids of the commits reachable from `last` and not from `first`, newest first."""
        return self.text("rev-list", *([f"^{first}"] if first else []), last).split()

    def merge_base(self, first: str, second: str) -> str | None:
        try:
            return self.text("merge-base", first, second) or None
        except GitError:
            return None

    def diff(self, first: str, second: str) -> list[dict[str, Any]]:
        """Changed files as the API lists them, renames found as git finds them."""
        parts = self.run("diff", "--raw", "-z", "-M", "--no-abbrev", first, second).split(b"\0")
        found, place = [], 0
        names = {"A": "added", "M": "modified", "T": "changed", "D": "removed", "R": "renamed", "C": "copied"}
        while place < len(parts) and parts[place]:
            _, _, old, new, status = parts[place].decode()[1:].split()
            paths = [os.fsdecode(part) for part in parts[place + 1 : place + (3 if status[0] in "RC" else 2)]]
            place += 1 + len(paths)
            file = {"sha": new if status[0] != "D" else old, "filename": paths[-1], "status": names[status[0]]}
            found.append(file | ({"previous_filename": paths[0]} if len(paths) == 2 else {}))
        return found

    def fetch(self, other: Path, refspec: str) -> None:
        """Bring objects and a ref of another repository of the network."""
        self.run("fetch", "--quiet", "--no-tags", str(other), refspec)

    def merge(self, base: str, head: str, message: str) -> str:
        """A merge commit of both, in no branch. Raises GitError on a conflict."""
        tree = self.text("merge-tree", "--write-tree", base, head)
        return self.text("commit-tree", tree, "-p", base, "-p", head, "-m", message)
