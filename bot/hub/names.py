"""Names that arrive in requests: repositories, revisions, paths in a repository. All of them are hostile input.

Every function returns the value it was given, now known to be safe, or raises HubError(400).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import unquote_to_bytes

from bot.hub import errors

RepoKind = Literal["model", "dataset", "space"]
KINDS: tuple[RepoKind, ...] = get_args(RepoKind)

_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# git check-ref-format's forbidden characters, and controls.
_REF_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
_PATH_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")
_RESERVED_OWNERS = {"api", "buckets", "collections", "datasets", "kernels", "models", "oauth", "spaces"}
_COMPONENT_BYTES = 255
_PATH_BYTES = 4096


@dataclass(frozen=True)
class RepoName:
    """One repository's full name."""

    kind: RepoKind
    owner: str
    name: str

    @property
    def id(self) -> str:
        """``owner/name``, as the client says it."""
        return f"{self.owner}/{self.name}"

    @property
    def url_path(self) -> str:
        """Path of its page: models stand at the top level, the other kinds under their plural."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"


def kind(value: object) -> RepoKind:
    """A kind of repository; None is a model, as in the client."""
    if value is None:
        return "model"
    if value not in KINDS:
        raise errors.bad_request(f"Invalid repo type: {value!r}. It is one of {', '.join(KINDS)}.")
    return value


def segment(value: object, what: str = "name") -> str:
    """An owner's or a repository's name: the Hub's characters, at most 96 of them, and never a dot at an end."""
    if not isinstance(value, str) or not _SEGMENT.fullmatch(value):
        raise errors.bad_request(f"Invalid {what}: letters, digits, '-', '_' and '.' are allowed, at most 96.")
    if ".." in value or "--" in value or value.endswith((".git", ".ipynb", ".lock")):
        raise errors.bad_request(f"Invalid {what}: '..', '--' and the endings .git, .ipynb, .lock are not allowed.")
    return value


def namespace(value: object) -> str:
    """An owner's name: a segment that is not the first word of one of the Hub's own addresses."""
    owner = segment(value, "owner")
    if owner.lower() in _RESERVED_OWNERS:
        raise errors.bad_request(f"Invalid owner: {owner} is reserved.")
    return owner


def repo(kind_: object, owner: object, name: object) -> RepoName:
    """A repository's name from its parts."""
    return RepoName(kind(kind_), namespace(owner), segment(name, "repo name"))


def repo_id(kind_: object, value: object) -> RepoName:
    """A repository's name from ``owner/name``."""
    if not isinstance(value, str) or value.count("/") != 1:
        raise errors.bad_request("A repo id has the form owner/name.")
    owner, name = value.split("/")
    return repo(kind_, owner, name)


def is_commit(value: str) -> bool:
    """Whether this is a full commit hash (40 hexadecimal digits)."""
    return _COMMIT.fullmatch(value) is not None


def sha256(value: object) -> str:
    """A SHA-256 in lower-case hexadecimal."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise errors.bad_request("Invalid oid: 64 lower-case hexadecimal digits are expected.")
    return value


def ref(value: object) -> str:
    """A branch's or tag's name by git's rules (git check-ref-format); a commit hash is no such name."""
    if not isinstance(value, str) or not value or len(value.encode("utf-8", "replace")) > _COMPONENT_BYTES:
        raise errors.bad_request("Invalid reference name: it is empty or too long.")
    parts = value.split("/")
    if (
        _REF_FORBIDDEN.search(value)
        or not value.isprintable()
        or ".." in value
        or "@{" in value
        or value in {"@", "HEAD"}
        or value.startswith("-")
        or value.endswith(".")
        or any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
        or is_commit(value)
    ):
        raise errors.bad_request(f"Invalid reference name: {value!r}.")
    _encodable(value)
    return value


def path(value: object) -> str:
    """A file's path in a repository: relative, normal, and harmless on the disk of whoever downloads it."""
    if not isinstance(value, str) or not value:
        raise errors.bad_request("Invalid path: it is empty.")
    if len(_encodable(value)) > _PATH_BYTES:
        raise errors.bad_request("Invalid path: it is too long.")
    for part in value.split("/"):
        if part in {"", ".", ".."} or part.lower() == ".git" or _PATH_FORBIDDEN.search(part):
            raise errors.bad_request(f"Invalid path in repo: {value!r}.")
        if len(part.encode()) > _COMPONENT_BYTES:
            raise errors.bad_request("Invalid path: one of its names is too long.")
    return value


def folder(value: object) -> str:
    """A folder's path; a closing slash is allowed, and the empty path is the root."""
    if value in {"", "/"}:
        return ""
    return path(value.removesuffix("/") if isinstance(value, str) else value)


def unquote(value: str) -> str:
    """Percent-decoding of one part of a URL path; what is not UTF-8 is refused rather than repaired."""
    try:
        return unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.bad_request("The URL is not UTF-8.") from error


def _encodable(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # lone surrogates, which JSON can carry
        raise errors.bad_request("A name is not valid Unicode.") from error
