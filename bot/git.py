"""A checkout as git sees it: which files a commit has, and their bytes. Nothing is checked out, moved or written.

Files are read from commits, never through the work tree: a link in a repository can point anywhere on the machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge.errors import SourceError, UsageError

# The commit that GitHub names where there is none: a branch that was just made, or deleted.
NO_COMMIT = "0" * 40
FILE_MODES = ("100644", "100755")
FETCH_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of a commit: its content's id and its size in bytes."""

    oid: str
    size: int


class Commits(Protocol):
    """What can be told of a repository's commits, from a checkout (`Repository`) or from GitHub (`bot.github.commits`)."""

    folder: Path

    def commit(self, name: str) -> str | None: ...
    def fetch(self, commit: str) -> bool: ...
    def parents(self, commit: str) -> list[str]: ...
    def merge_base(self, first: str, second: str) -> str | None: ...
    @property
    def is_shallow(self) -> bool: ...
    def files(self, commit: str) -> dict[str, Blob]: ...
    def read_all(self, blobs: Iterable[Blob], limit: int) -> dict[str, bytes]: ...
    def folder_id(self, commit: str, path: str) -> str | None: ...


class Repository:
    """The repository around `folder`. Paths are relative to `folder`, also where it is not the repository's top.

    Raises UsageError where there is no repository or no git.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._env = _environment()
        try:
            self.top = Path(self._text("rev-parse", "--show-toplevel"))
        except _GitError as error:
            raise UsageError(
                f"{folder} is not a git checkout, so it cannot be told which recipes changed ({error}); "
                "run actions/checkout before this step"
            ) from None

    def commit(self, name: str) -> str | None:
        """The full id of a commit by any of its names; None where it is not here."""
        if not name or name == NO_COMMIT or name.startswith("-"):
            return None
        try:
            return self._text("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        except _GitError:
            return None

    def parents(self, commit: str) -> list[str]:
        """The parents of a commit that are here (a shallow clone cuts them off)."""
        return self._text("rev-list", "--parents", "--max-count=1", commit).split()[1:]

    def merge_base(self, first: str, second: str) -> str | None:
        """The commit where two lines of history parted; None where none is here."""
        try:
            return self._text("merge-base", first, second) or None
        except _GitError:
            return None

    @property
    def is_shallow(self) -> bool:
        return self._text("rev-parse", "--is-shallow-repository") == "true"

    def fetch(self, commit: str) -> bool:
        """Ask origin for one commit; whether it is here now. A refusal is no error."""
        if not commit or commit == NO_COMMIT or commit.startswith("-"):
            return False
        # A shallow clone stays shallow. In a whole one a depth would cut off history that is there.
        depth = ["--depth=1"] if self.is_shallow else []
        try:
            self._run("fetch", "--quiet", "--no-tags", *depth, "origin", commit, seconds=FETCH_SECONDS)
        except _GitError:
            return False
        return self.commit(commit) is not None

    def files(self, commit: str) -> dict[str, Blob]:
        """Every ordinary file of a commit under `folder`. Links and submodules are not files."""
        found: dict[str, Blob] = {}
        for line in self._run("ls-tree", "-r", "-l", "-z", commit).split(b"\0"):
            if line:
                about, _, path = line.partition(b"\t")
                mode, _, oid, size = about.decode().split()
                if mode in FILE_MODES:
                    found[os.fsdecode(path)] = Blob(oid, int(size))
        return found

    def read_all(self, blobs: Iterable[Blob], limit: int) -> dict[str, bytes]:
        """By id the first `limit` bytes of each file."""
        wanted = {blob.oid: blob.size for blob in blobs}
        found = {oid: self._head(oid, limit) for oid, size in wanted.items() if size > limit}
        short = [oid for oid in wanted if oid not in found]
        if not short:
            return found
        out = self._run("cat-file", "--batch", data="".join(f"{oid}\n" for oid in short).encode())
        place = 0
        for oid in short:
            # A line `ID blob SIZE`, the bytes, and a newline.
            place = out.index(b"\n", place) + 1
            found[oid] = out[place : place + wanted[oid]]
            place += wanted[oid] + 1
        return found

    def _head(self, oid: str, limit: int) -> bytes:
        with subprocess.Popen(
            [*self._git(), "cat-file", "blob", oid], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self._env
        ) as process:
            assert process.stdout is not None
            head = process.stdout.read(limit)
            process.kill()
        return head

    def folder_id(self, commit: str, path: str) -> str | None:
        """What identifies the content of a file or folder in a commit; None where it has none."""
        inside = os.path.normpath(self.folder.relative_to(self.top) / path)
        if inside.startswith(".."):
            return None
        name = f"{commit}^{{tree}}" if inside == "." else f"{commit}:{inside}"
        try:
            return self._text("rev-parse", "--verify", "--quiet", "--end-of-options", name)
        except _GitError:
            return None

    def differs(self, commit: str, path: str) -> bool:
        """Whether tracked files at `path` are others on disk than in a commit."""
        try:
            self._run("diff", "--quiet", commit, "--", path)
        except _GitError:
            return True
        return False

    def _git(self) -> list[str]:
        # In a container the checkout belongs to another user, which git refuses without being told.
        return ["git", "-c", "safe.directory=*", "-c", "protocol.ext.allow=never", "-C", str(self.folder)]

    def _text(self, *arguments: str) -> str:
        return os.fsdecode(self._run(*arguments)).strip()

    def _run(self, *arguments: str, data: bytes | None = None, seconds: int = 60) -> bytes:
        command = [*self._git(), *arguments]
        try:
            done = subprocess.run(command, input=data, capture_output=True, env=self._env, timeout=seconds)
        except FileNotFoundError:
            raise UsageError("git is not installed, and it is needed to tell which recipes changed") from None
        except subprocess.TimeoutExpired:
            raise SourceError(f"git {arguments[0]} did not answer within {seconds} s") from None
        if done.returncode:
            raise _GitError(done.stderr.decode(errors="replace").strip() or f"git {arguments[0]} failed")
        return done.stdout


class _GitError(Exception):
    """git said no."""


def _environment() -> Mapping[str, str]:
    """The environment of git: it asks no questions, and what a caller set for another repository does not count."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    kept |= {name: os.environ[name] for name in ("GIT_SSL_CAINFO", "GIT_EXEC_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
