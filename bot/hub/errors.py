"""What the Hub refuses, and the headers by which its client knows why.

The client chooses its exception by ``X-Error-Code`` first and by the status second, and shows ``X-Error-Message``
and the JSON body's ``error`` to the user (huggingface_hub, ``utils/_http.py``, ``hf_raise_for_status``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HubError(Exception):
    """A request that is refused: `status` is the HTTP status, `code` the value of ``X-Error-Code`` if it has one."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = dict(headers or {})
        self.body: dict[str, Any] = {"error": message, **(body or {})}

    @property
    def headers(self) -> dict[str, str]:
        """Response headers, with the message made safe for one header line."""
        line = " ".join(self.message.split()).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Message": line[:1000], **self.extra}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return headers


def bad_request(message: str) -> HubError:
    """400: the client raises BadRequestError."""
    return HubError(400, message)


def bad_credentials() -> HubError:
    """401 for a token nobody was given. The text is the one the client looks for before it blames the repository."""
    return HubError(401, "Invalid credentials in Authorization header")


def login_needed() -> HubError:
    """401 for an anonymous request of something that only a token may do."""
    return HubError(401, "Invalid username or password.")


def forbidden(message: str) -> HubError:
    """403: the token is known, the right is missing."""
    return HubError(403, message)


def repo_not_found() -> HubError:
    """404: the client raises RepositoryNotFoundError. Also the answer for what the caller may not know of."""
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """404: the client raises RevisionNotFoundError."""
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str | None = None) -> HubError:
    """404: the client raises RemoteEntryNotFoundError, and remembers the absence under `commit`."""
    headers = {} if commit is None else {"X-Repo-Commit": commit}
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", headers=headers)


def gated(repo_id: str, *, known: bool) -> HubError:
    """401 or 403: the client raises GatedRepoError. `known` says whether the caller is logged in."""
    if known:
        text = f"Access to {repo_id} is restricted and you are not in the authorized list. Ask its owner for access."
        return HubError(403, text, "GatedRepo")
    text = f"Access to {repo_id} is restricted. You must have access to it and be authenticated to access it."
    return HubError(401, text, "GatedRepo")


def conflict(message: str, **body: Any) -> HubError:
    """409: it exists already; with ``exist_ok=True`` the client takes this for success."""
    return HubError(409, message, body=body)


def parent_moved(expected: str, actual: str) -> HubError:
    """412: the branch is no longer where the commit was prepared."""
    return HubError(412, f"A commit has happened since. Please refresh and try again. ({expected} is not {actual})")


def too_large(message: str) -> HubError:
    """413: a body or a file over its limit."""
    return HubError(413, message)
