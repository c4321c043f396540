"""One repository: a bare Git repository whose large files lie beside it, by their SHA-256, as Git LFS keeps them.

    repo.json          visibility and the date of creation
    moerge.lock        held (flock) by whoever moves a reference or changes the settings
    HEAD, config, objects/, refs/       readable by git itself
    lfs/objects/ab/cd/abcd…             large files, immutable

A reference moves by rename, after every object it needs is in place: a commit is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from bot.hub import errors, names
from bot.hub.changes import Change, apply
from bot.hub.names import RepoName
from bot.hub.objects import (
    FILE_MODE,
    TREE_MODE,
    Commit,
    Entry,
    MissingObject,
    ObjectStore,
    Pointer,
    one_line,
    write_atomically,
)

REF_KINDS = {"branches": "refs/heads", "tags": "refs/tags", "pull requests": "refs/pr"}
_BRANCHES, _TAGS, _PULLS = REF_KINDS.values()


@dataclass(frozen=True)
class File:
    """A file at one revision: `oid` is git's id of what the history holds, `size` the bytes of the file itself."""

    path: str
    oid: str
    size: int
    lfs: Pointer | None

    @property
    def etag(self) -> str:
        """What the client's cache names the content by: SHA-256 of a large file, git's id of another."""
        return self.lfs.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Folder:
    """A folder at one revision."""

    path: str
    oid: str


@dataclass(frozen=True)
class Settings:
    """What can be changed of a repository without a commit."""

    private: bool = False
    gated: Literal["auto", "manual", False] = False
    created_at: str = ""


class Repository:
    """A repository on disk; cheap to make, it holds nothing open."""

    def __init__(self, folder: Path, name: RepoName) -> None:
        self.folder = folder
        self.name = name
        self.objects = ObjectStore(folder / "objects")

    @classmethod
    def initialise(cls, folder: Path, name: RepoName, settings: Settings, files: dict[str, bytes], author: str) -> None:
        """Make a repository in the new `folder`, with one commit on ``main`` that holds `files`."""
        for part in ("objects", "refs/heads", "refs/tags", "lfs/objects"):
            (folder / part).mkdir(parents=True)
        (folder / "HEAD").write_text("ref: refs/heads/main\n")
        (folder / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = true\n")
        (folder / "moerge.lock").touch()
        created = replace(settings, created_at=iso(datetime.now(UTC)))
        (folder / "repo.json").write_text(json.dumps(asdict(created)))
        repository = cls(folder, name)
        flat = {path: repository.objects.write("blob", data) for path, data in files.items()}
        commit = repository._record(flat, (), author, "initial commit", "")
        repository._set_ref(f"{_BRANCHES}/main", commit)

    # -- settings and locking

    @property
    def settings(self) -> Settings:
        """The settings now. Raises HubError(404) where the repository is gone."""
        try:
            return Settings(**json.loads((self.folder / "repo.json").read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            raise errors.repo_not_found() from None

    def update(self, **changes: object) -> Settings:
        """Change some settings."""
        with self.locked():
            settings = replace(self.settings, **changes)  # type: ignore[arg-type]
            write_atomically(self.folder / "repo.json", json.dumps(asdict(settings)).encode())
            return settings

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The right to change the repository, across threads and processes.

        Raises HubError(404) where it was deleted or renamed while this waited.
        """
        path = self.folder / "moerge.lock"
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            raise errors.repo_not_found() from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(descriptor), path.stat())
            except OSError:
                same = False
            if not same:
                raise errors.repo_not_found()
            yield
        finally:
            os.close(descriptor)  # also lets go of the lock

    # -- references

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a full reference or a full hash means. Raises HubError(404)."""
        if names.is_commit(revision):
            with contextlib.suppress(MissingObject):
                self.objects.commit(revision)
                return revision
            raise errors.revision_not_found(revision)
        found = self._find_ref(revision)
        if found is None:
            raise errors.revision_not_found(revision)
        return found[1]

    def refs(self) -> dict[str, str]:
        """Every reference by its full name (``refs/heads/main``), and its commit."""
        found = {}
        for path in sorted((self.folder / "refs").rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            commit = self._read_ref(name)
            if commit is not None:
                found[name] = commit
        return found

    def create_ref(self, kind: str, name: str, revision: str) -> None:
        """Create a branch or a tag (`kind` as in REF_KINDS). Raises HubError(409) where it exists."""
        full = f"{REF_KINDS[kind]}/{names.ref(name)}"
        with self.locked():
            if self._read_ref(full) is not None:
                raise errors.conflict(f"Reference already exists: {full}")
            self._set_ref(full, self.resolve(revision))

    def delete_ref(self, kind: str, name: str) -> None:
        """Delete a branch or a tag; its commits stay readable by their hash. Raises HubError(404)."""
        full = f"{REF_KINDS[kind]}/{names.ref(name)}"
        if full == f"{_BRANCHES}/main":
            raise errors.bad_request("The branch main cannot be deleted.")
        with self.locked():
            path = self.folder / full
            try:
                path.unlink()
            except OSError:
                raise errors.revision_not_found(name) from None
            for parent in path.parents:  # an empty folder would stand in the way of a branch by its name
                if parent == self.folder / REF_KINDS[kind]:
                    break
                with contextlib.suppress(OSError):
                    parent.rmdir()

    # -- reading

    def history(self, commit: str) -> Iterator[tuple[str, Commit]]:
        """Commits from this one back to the first, each with its hash."""
        oid: str | None = commit
        while oid is not None:
            value = self.objects.commit(oid)
            yield oid, value
            oid = value.parents[0] if value.parents else None

    def find(self, commit: str, path: str) -> File | Folder | None:
        """What lies under `path` at a commit; the empty path is the root."""
        entry: Entry | None = Entry(TREE_MODE, self.objects.commit(commit).tree)
        for part in path.split("/") if path else ():
            entry = self.objects.tree(entry.oid).get(part) if entry is not None and entry.is_tree else None
        return None if entry is None else self._described(path, entry)

    def walk(self, commit: str, under: str = "", *, recursive: bool = True) -> Iterator[File | Folder]:
        """Files and folders below a folder. Raises HubError(404) where it is not one."""
        root = self.find(commit, under)
        if not isinstance(root, Folder):
            raise errors.entry_not_found(under, commit)
        yield from self._walk(root.oid, f"{under}/" if under else "", recursive)

    def files(self, commit: str) -> list[File]:
        """Every file at a commit."""
        return [item for item in self.walk(commit) if isinstance(item, File)]

    def last_commits(self, commit: str, paths: Iterable[str]) -> dict[str, str]:
        """For each path the hash of the newest commit that changed it."""
        pending, found = set(paths), {}
        for oid, value in self.history(commit):
            parent = value.parents[0] if value.parents else None
            for path in list(pending):
                if parent is None or self._oid(oid, path) != self._oid(parent, path):
                    found[path] = oid
                    pending.discard(path)
            if not pending:
                break
        return found

    def lfs_path(self, sha256: str) -> Path:
        """Where a large file's content lies, or would lie."""
        return self.folder / "lfs" / "objects" / sha256[:2] / sha256[2:4] / names.sha256(sha256)

    # -- writing

    def commit(
        self,
        revision: str,
        changes: Iterable[Change],
        *,
        author: str,
        title: str,
        body: str = "",
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[str, int | None]:
        """One commit on a branch, or on a new pull request; its hash, and the pull request's number.

        Raises HubError: 404 for an unknown branch or a file to delete, 412 where the branch is not at `parent`,
        400 for changes that do not fit together.
        """
        changes = list(changes)
        with self.locked():
            head = self.resolve(revision)
            if parent is not None and parent != head:
                raise errors.parent_moved(parent, head)
            flat = {item.path: item.oid for item in self.files(head)}
            number = None
            if pull_request:
                number = 1 + max(
                    (int(ref.rpartition("/")[2]) for ref in self.refs() if ref.startswith(_PULLS)), default=0
                )
                target = f"{_PULLS}/{number}"
            else:
                found = self._find_ref(revision)
                if found is None or found[0].startswith(f"{_TAGS}/"):
                    raise errors.bad_request(f"A commit goes to a branch, and {revision} is none.")
                target = found[0]
            oid = self._record(apply(flat, changes, self._blob_at), (head,), author, title, body)
            self._set_ref(target, oid)
            return oid, number

    def _record(self, flat: dict[str, str], parents: tuple[str, ...], author: str, title: str, body: str) -> str:
        tree = self._write_tree({path: Entry(FILE_MODE, oid) for path, oid in flat.items()})
        now = datetime.now(UTC).replace(microsecond=0)
        title, author = one_line(title) or "Update", one_line(author) or "unknown"
        return self.objects.write_commit(Commit(tree, parents, author, now, title, body.replace("\0", "").strip()))

    def _write_tree(self, flat: dict[str, Entry]) -> str:
        here: dict[str, Entry] = {}
        below: dict[str, dict[str, Entry]] = {}
        for path, entry in flat.items():
            head, slash, rest = path.partition("/")
            if slash:
                below.setdefault(head, {})[rest] = entry
            else:
                here[head] = entry
        for name, entries in below.items():
            here[name] = Entry(TREE_MODE, self._write_tree(entries))
        return self.objects.write_tree(here)

    def _blob_at(self, revision: str, path: str) -> str | None:
        item = self.find(self.resolve(revision), path)
        return item.oid if isinstance(item, File) else None

    def _oid(self, commit: str, path: str) -> str | None:
        item = self.find(commit, path)
        return None if item is None else item.oid

    def _walk(self, tree: str, prefix: str, recursive: bool) -> Iterator[File | Folder]:
        for name, entry in self.objects.tree(tree).items():
            yield self._described(prefix + name, entry)
            if entry.is_tree and recursive:
                yield from self._walk(entry.oid, f"{prefix}{name}/", recursive)

    def _described(self, path: str, entry: Entry) -> File | Folder:
        if entry.is_tree:
            return Folder(path, entry.oid)
        pointer = self.objects.pointer(entry.oid)
        return File(path, entry.oid, pointer.size if pointer else self.objects.size(entry.oid), pointer)

    def _find_ref(self, revision: str) -> tuple[str, str] | None:
        if names.is_commit(revision):
            return None
        names.ref(revision)
        full = revision.startswith(tuple(f"{prefix}/" for prefix in REF_KINDS.values()))
        for name in (revision,) if full else (f"{_BRANCHES}/{revision}", f"{_TAGS}/{revision}"):
            commit = self._read_ref(name)
            if commit is not None:
                return name, commit
        return None

    def _read_ref(self, name: str) -> str | None:
        try:
            value = (self.folder / name).read_text().strip()
        except OSError:
            return None
        return value if names.is_commit(value) else None

    def _set_ref(self, name: str, commit: str) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, f"{commit}\n".encode(), scratch=self.folder)
        except (NotADirectoryError, IsADirectoryError, FileExistsError):
            raise errors.conflict(
                f"Reference {name} conflicts with another whose name it begins or continues."
            ) from None


def iso(moment: datetime) -> str:
    """A moment as the Hub writes it: UTC, milliseconds, Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
