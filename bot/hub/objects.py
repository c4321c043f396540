"""Git's own objects, written and read without git: blobs, trees, commits, and LFS pointers.

Formats: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects and
https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md. An object's file appears by rename and never changes, so
a process killed at any moment leaves nothing half-written under a final name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE_MODE = "100644"
TREE_MODE = "40000"
_HEADER_BYTES = 64
_POINTER_BYTES = 200
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n")


class MissingObject(KeyError):
    """The repository has no such object, or it has been deleted."""


@dataclass(frozen=True)
class Entry:
    """One name in a tree."""

    mode: str
    oid: str

    @property
    def is_tree(self) -> bool:
        """Whether it names a folder."""
        return self.mode == TREE_MODE


@dataclass(frozen=True)
class Commit:
    """One commit. `date` is in UTC, to the second; `author` is a user name."""

    tree: str
    parents: tuple[str, ...]
    author: str
    date: datetime
    title: str
    body: str


@dataclass(frozen=True)
class Pointer:
    """What a repository's history holds in place of a large file; `size` in bytes."""

    sha256: str
    size: int

    def encode(self) -> bytes:
        """The pointer file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @classmethod
    def decode(cls, data: bytes) -> Pointer | None:
        """The pointer that `data` is, or None where it is some other file."""
        match = _POINTER.fullmatch(data) if len(data) <= _POINTER_BYTES else None
        return cls(match[1].decode(), int(match[2])) if match else None


class ObjectStore:
    """The loose objects of one bare repository, under its ``objects`` folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, data: bytes) -> str:
        """Store an object of `kind` ("blob", "tree", "commit"); its SHA-1 as 40 hexadecimal digits."""
        raw = f"{kind} {len(data)}\0".encode() + data
        oid = hashlib.sha1(raw, usedforsecurity=False).hexdigest()  # git's object id, not a protection
        path = self._path(oid)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, zlib.compress(raw, 1), mode=0o444, scratch=self.folder)
        return oid

    def read(self, oid: str, kind: str) -> bytes:
        """An object's content. Raises MissingObject where there is none of that kind."""
        try:
            raw = zlib.decompress(self._path(oid).read_bytes())
        except FileNotFoundError:
            raise MissingObject(oid) from None
        header, _, data = raw.partition(b"\0")
        if not header.startswith(kind.encode() + b" "):
            raise MissingObject(oid)
        return data

    def size(self, oid: str) -> int:
        """Bytes in an object, read from its header alone."""
        inflate, head = zlib.decompressobj(), b""
        with self._path(oid).open("rb") as file:
            # How many compressed bytes come before the first plain one depends on the content's code table.
            while b"\0" not in head and (piece := file.read(_HEADER_BYTES)):
                head += inflate.decompress(inflate.unconsumed_tail + piece, _HEADER_BYTES)
        return int(head.partition(b"\0")[0].split(b" ")[1])

    def pointer(self, oid: str) -> Pointer | None:
        """The LFS pointer that a blob is, if it is one."""
        return _pointer(self, oid)

    def tree(self, oid: str) -> dict[str, Entry]:
        """A tree's names in git's order, each with its mode and object."""
        return dict(_tree(self, oid))

    def commit(self, oid: str) -> Commit:
        """A commit. Raises MissingObject where the repository has none by that hash."""
        if not self._path(oid).exists():  # the cache may remember a deleted repository of the same name
            raise MissingObject(oid)
        return _commit(self, oid)

    def write_tree(self, entries: dict[str, Entry]) -> str:
        """Store one folder; git sorts a folder's name as if it ended with a slash."""
        order = sorted(entries.items(), key=lambda item: item[0].encode() + (b"/" if item[1].is_tree else b""))
        body = (f"{entry.mode} {name}\0".encode() + bytes.fromhex(entry.oid) for name, entry in order)
        return self.write("tree", b"".join(body))

    def write_commit(self, commit: Commit) -> str:
        """Store a commit in git's text form."""
        who = f"{commit.author} <{commit.author}@users.noreply.localhost> {int(commit.date.timestamp())} +0000"
        lines = [f"tree {commit.tree}", *(f"parent {parent}" for parent in commit.parents)]
        lines += [f"author {who}", f"committer {who}", "", commit.title]
        if commit.body:
            lines += ["", commit.body]
        return self.write("commit", ("\n".join(lines) + "\n").encode("utf-8", "replace"))

    def _path(self, oid: str) -> Path:
        return self.folder / oid[:2] / oid[2:]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)


# Objects never change, so what was parsed once may be kept.
@functools.lru_cache(maxsize=4096)
def _tree(store: ObjectStore, oid: str) -> tuple[tuple[str, Entry], ...]:
    data = store.read(oid, "tree")
    entries, position = [], 0
    while position < len(data):
        end = data.index(b"\0", position)
        mode, _, name = data[position:end].partition(b" ")
        entries.append((name.decode(), Entry(mode.decode(), data[end + 1 : end + 21].hex())))
        position = end + 21
    return tuple(entries)


@functools.lru_cache(maxsize=4096)
def _commit(store: ObjectStore, oid: str) -> Commit:
    head, _, message = store.read(oid, "commit").decode().partition("\n\n")
    fields: dict[str, list[str]] = {}
    for line in head.split("\n"):
        key, _, value = line.partition(" ")
        fields.setdefault(key, []).append(value)
    author, _, stamp = fields["author"][0].rpartition("> ")
    title, _, body = message.removesuffix("\n").partition("\n\n")
    return Commit(
        tree=fields["tree"][0],
        parents=tuple(fields.get("parent", ())),
        author=author.rpartition(" <")[0],
        date=datetime.fromtimestamp(int(stamp.split(" ")[0]), UTC),
        title=title,
        body=body,
    )


@functools.lru_cache(maxsize=16384)
def _pointer(store: ObjectStore, oid: str) -> Pointer | None:
    return Pointer.decode(store.read(oid, "blob")) if store.size(oid) <= _POINTER_BYTES else None


def one_line(text: str) -> str:
    """Text as a commit's title or an author's name: no line breaks, no angle brackets, no controls."""
    return " ".join("".join(c if c.isprintable() and c not in "<>" else " " for c in text).split())


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644, scratch: Path | None = None) -> None:
    """Write a file in `scratch` (by default beside `path`) and rename it: a reader sees the old content or the new.

    There is no fsync: what is written survives the death of any process, not a power cut.
    """
    temporary = (scratch or path.parent) / f".{secrets.token_hex(8)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
