"""Asking GitHub again and again at no cost: conditional requests, and how long to wait where it asks for a pause.

An answer that has not changed since the ETag we send is a 304, which counts towards no rate limit.
https://docs.github.com/en/rest/using-the-rest-api/best-practices-for-using-the-rest-api
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from bot.github.client import API, GitHubError

TIMEOUT = 30.0
MAX_WAIT = 3600.0


class Pause(Exception):
    """GitHub asks for a pause of `seconds`, or does not answer; `why` says which."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(why)
        self.seconds = min(max(seconds, 1.0), MAX_WAIT)
        self.why = why


@dataclass
class Poller:
    """Asks one repository. `known` keeps, by path, the ETag and the value of the last answer, and can be stored as JSON."""

    repository: str
    token: str = field(repr=False)
    api: str = API
    known: dict[str, list[Any]] = field(default_factory=dict)
    asked: int = 0
    unchanged: int = 0
    _failures: int = 0

    def get(self, path: str) -> Any:
        """The JSON at a path below the repository: asked for again, and read again only where it changed.

        Raises Pause, or GitHubError where asking again would not help.
        """
        etag, value = self.known.get(path, (None, None))
        headers = self._headers | ({"If-None-Match": etag} if etag else {})
        self.asked += 1
        try:
            answer = httpx2.get(self._url(path), headers=headers, timeout=TIMEOUT, follow_redirects=True)
        except httpx2.HTTPError as error:
            raise self._pause(0, f"GitHub cannot be reached ({type(error).__name__})") from None
        if answer.status_code == 304:
            self.unchanged += 1
            self._failures = 0
            return value
        if answer.status_code == 200:
            self._failures = 0
            value = answer.json()
            if "etag" in answer.headers:
                self.known[path] = [answer.headers["etag"], value]
            return value
        raise self._refused(answer.status_code, answer.headers, path)

    def pending(self, commit: str, context: str, description: str) -> str | None:
        """Set a commit's status to pending. Returns why not, where GitHub does not take it: nothing depends on it."""
        body = {"state": "pending", "context": context, "description": description[:140]}
        self.asked += 1
        try:
            answer = httpx2.post(self._url(f"/statuses/{commit}"), json=body, headers=self._headers, timeout=TIMEOUT)
        except httpx2.HTTPError as error:
            return f"GitHub cannot be reached ({type(error).__name__})"
        return None if answer.status_code == 201 else f"GitHub answered with {answer.status_code}"

    @property
    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        }

    def _url(self, path: str) -> str:
        return f"{self.api.rstrip('/')}/repos/{self.repository}{path}"

    def _refused(self, status: int, headers: Mapping[str, str], path: str) -> Exception:
        if status == 401:
            return GitHubError("GitHub refused the token; check GITHUB_TOKEN", 401)
        if status in (403, 429):
            if wait := headers.get("retry-after", ""):
                return self._pause(
                    float(wait) if wait.isdigit() else 60, "GitHub asks for a pause (secondary rate limit)"
                )
            if headers.get("x-ratelimit-remaining") == "0":
                reset = float(headers.get("x-ratelimit-reset", "0") or 0)
                return self._pause(reset - time.time(), "GitHub's rate limit is used up")
            if status == 429:
                return self._pause(60, "GitHub asks for a pause")
            return GitHubError(f"the token may not read {self.repository}{path}", 403)
        if status == 404:
            return GitHubError(f"{self.repository}: not on GitHub, or the token may not see it", 404)
        return self._pause(0, f"GitHub answered with {status}")

    def _pause(self, seconds: float, why: str) -> Pause:
        """Longer each time that nothing came of waiting."""
        self._failures += 1
        return Pause(max(seconds, min(2.0 ** (self._failures - 1), 900.0)), why)
