"""What a commit does to the files of a branch, as values, and their application in the order they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bot.hub import errors


@dataclass(frozen=True)
class Put:
    """The file at `path` becomes the blob `oid` (a large file's blob is its pointer)."""

    path: str
    oid: str


@dataclass(frozen=True)
class Delete:
    """The file at `path` goes."""

    path: str


@dataclass(frozen=True)
class DeleteFolder:
    """Everything below `path` goes."""

    path: str


@dataclass(frozen=True)
class Copy:
    """The file at `path` becomes what `source` is at `revision`, or, without one, after the changes before this."""

    source: str
    revision: str | None
    path: str


Change = Put | Delete | DeleteFolder | Copy


def apply(
    files: dict[str, str], changes: Iterable[Change], blob_at: Callable[[str, str], str | None]
) -> dict[str, str]:
    """Files after the changes: path → blob id.

    `blob_at(revision, path)` gives the blob of a file at a revision, or None. Raises HubError: 404 where a file to
    delete or copy is not there, 400 where one path would be a file and a folder.
    """
    files = dict(files)
    for change in changes:
        match change:
            case Put(path, oid):
                files[path] = oid
            case Delete(path):
                if files.pop(path, None) is None:
                    raise errors.HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case DeleteFolder(path):
                prefix = f"{path}/" if path else ""
                below = [name for name in files if name.startswith(prefix)]
                if not below:
                    raise errors.HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
                for name in below:
                    del files[name]
            case Copy(source, revision, path):
                blob = files.get(source) if revision is None else blob_at(revision, source)
                if blob is None:
                    raise errors.entry_not_found(source)
                files[path] = blob
    folders = {path[:cut] for path in files for cut in range(len(path)) if path[cut] == "/"}
    both = folders & files.keys()
    if both:
        raise errors.bad_request(f"A path cannot be a file and a folder at once: {min(both)!r}.")
    return files
