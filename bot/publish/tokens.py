"""A token for each repository, passed call by call.

In a GitHub job that may ask for an identity (`permissions: id-token: write`), that identity is exchanged for a token of one
repository, an hour long, for which the repository names the workflow as a trusted publisher. Otherwise HF_TOKEN is used. The
client's own way (HF_OIDC_RESOURCE) is process-wide and would also replace the token that reads gated sources.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Protocol

from bot.publish.patience import patiently, status_of
from merge.errors import DestinationError
from merge.progress import say

# A token of an hour is replaced after so many seconds.
RENEWED = 45 * 60


class Tokens(Protocol):
    """Where the token for a repository comes from."""

    def of(self, repo: str) -> str | None:
        """The token for a repository; None asks the client for its own."""

    def check_creation(self, repo: str) -> None:
        """Raise DestinationError where a repository that is missing cannot be made."""


@dataclass(frozen=True)
class OneToken:
    """The same token for all."""

    token: str | None

    def of(self, repo: str) -> str | None:
        return self.token

    def check_creation(self, repo: str) -> None:
        """It is for the Hub to say."""


@dataclass
class Keyless:
    """One exchange for each repository. Where the Hub refuses one, `otherwise` is used if there is one."""

    endpoint: str
    otherwise: str | None
    _exchanged: dict[str, tuple[str | None, float]] = field(default_factory=dict)

    def of(self, repo: str) -> str | None:
        token, since = self._exchanged.get(repo, (None, -RENEWED))
        if time.monotonic() - since >= RENEWED:
            token = self._exchange(repo)
            self._exchanged[repo] = token, time.monotonic()
        return token

    def check_creation(self, repo: str) -> None:
        if self.of(repo) != self.otherwise:
            raise DestinationError(
                f"{repo}: there is no such repository, and a job without a token of its own cannot make one; make it on "
                "the Hub, and name this workflow in its settings under Trusted Publishers"
            )

    def _exchange(self, repo: str) -> str | None:
        from huggingface_hub.errors import HfHubHTTPError, OIDCError

        def login() -> str | None:
            from huggingface_hub._oidc import oidc_login

            try:
                return str(oidc_login(resource=repo, endpoint=self.endpoint)["access_token"])
            except (OIDCError, HfHubHTTPError) as error:
                status = status_of(error)
                if status is not None and (status == 429 or status >= 500):
                    raise
                if self.otherwise is not None:
                    say(f"{repo}: this job is no trusted publisher of it; HF_TOKEN is used")
                    return self.otherwise
                raise DestinationError(
                    f"{repo}: the Hub does not take this job's identity; name this workflow in the repository's settings "
                    f"under Trusted Publishers, or give a token (HF_TOKEN){_told(error)}"
                ) from None

        return patiently(repo, self.endpoint, login)


def tokens_for(endpoint: str | None, token: str | None) -> Tokens:
    """Keyless where this job may ask GitHub for its identity, else `token` for all."""
    from huggingface_hub import constants

    if os.environ.get("GITHUB_ACTIONS") == "true" and os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL"):
        return Keyless(endpoint or constants.ENDPOINT, token)
    return OneToken(token)


def _told(error: Exception) -> str:
    response = getattr(error, "response", None)
    try:
        description = response.json().get("error_description") if response is not None else None
    except ValueError:
        description = None
    return f" ({' '.join(str(description).split())[:200]})" if description else ""
