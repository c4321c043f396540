"""Which of the Hub's failures pass by themselves, and one sentence for each that does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from json import JSONDecodeError
from typing import TypeVar

from merge.errors import DestinationError

T = TypeVar("T")

# How often something is tried, the pause before the second time in seconds (then twice that, …), and the longest pause
# that the Hub may ask for.
ATTEMPTS = 5
PAUSE = 1.0
LONGEST = 300.0
# Answers that may be others in a moment. 409 and 412: somebody else's commit came in between.
PASSING = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
# Seconds without a byte until a request is given up; the client itself would wait for ever.
TIMEOUT = 120.0


def patiently(repo: str, endpoint: str, action: Callable[[], T], also: Collection[int] = ()) -> T:
    """`action()`, again where it failed by something that passes: so it must look at the Hub afresh each time.

    `also` are further statuses that pass. Raises DestinationError with the sentence for the last failure.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as raised:
            error = cause(raised)
            if attempt >= _attempts(error) or not passes(error, also):
                sentence = said(error, endpoint)
                if sentence is None:
                    raise
                raise DestinationError(f"{repo}: {sentence}") from None
            time.sleep(_pause(error, attempt))
    raise AssertionError("the last attempt returns or raises")


def _attempts(error: Exception) -> int:
    """How often it is worth trying. The client itself has tried for half a minute where nobody answers the call."""
    import httpx2

    return 2 if isinstance(error, httpx2.ConnectError) else ATTEMPTS


def cause(error: Exception) -> Exception:
    """What the client's threads wrap into a RuntimeError when an upload fails."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def passes(error: Exception, also: Collection[int] = ()) -> bool:
    """Whether trying again may help."""
    import httpx2
    from huggingface_hub import errors

    status = status_of(error)
    if status is not None:
        return status in PASSING or status in also
    # LocalEntryNotFoundError is the client's word for a Hub that did not answer; a body that breaks off is no JSON.
    return isinstance(error, httpx2.TransportError | errors.LocalEntryNotFoundError | JSONDecodeError)


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def said(error: Exception, endpoint: str) -> str | None:
    """One sentence, with the right that is missing; None for what is not of the Hub."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"{endpoint} cannot be reached ({type(error).__name__})"
    status = status_of(error)
    if status == 401:
        return "the Hub does not know the token, or it has expired; check HF_TOKEN and run again"
    if isinstance(error, errors.RepositoryNotFoundError | errors.EntryNotFoundError | errors.RevisionNotFoundError):
        return "not on the Hub, or the token may not see it"
    if isinstance(error, errors.HfHubHTTPError):
        told = _told(error)
        sentences = {
            402: f"the Hub refuses to store more for this account{told}; make room there, or choose another owner",
            403: f"the token has no right to write there{told}; it needs write access to the repository",
            409: "the name is taken by something else, or other commits kept coming in between; try again",
            412: "the repository kept being changed while we committed; try again",
            413: f"the Hub finds a file too large{told}",
            429: "the Hub asks for a pause (rate limit); try again later",
            507: f"the Hub has no room{told}; make room there, or choose another owner",
        }
        return sentences.get(status or 0, f"the Hub answered with status {status}{told}")
    if isinstance(error, httpx2.HTTPError):
        return f"{endpoint} cannot be reached ({type(error).__name__})"
    if isinstance(error, JSONDecodeError):
        return f"{endpoint} sent an answer that breaks off"
    if isinstance(error, ValueError) and "LFS batch API" in str(error):
        return f"the Hub refuses an upload ({' '.join(str(error).split())[:300]})"
    return None


def limit_waiting() -> None:
    """Let no request of the client wait for ever: after TIMEOUT seconds without a byte it fails, and is tried again."""
    import httpx2
    from huggingface_hub.utils import _http

    def client() -> httpx2.Client:
        made = _http.default_client_factory()
        made.timeout = httpx2.Timeout(TIMEOUT)
        return made

    if _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory:  # whoever set another has thought of it
        _http.set_client_factory(client)


def _told(error: Exception) -> str:
    """What the Hub says about it, in brackets."""
    message = " ".join(str(getattr(error, "server_message", "") or "").split())
    return f" ({message[:200]})" if message else ""


def _pause(error: Exception, attempt: int) -> float:
    """Seconds to wait: what the Hub asks for, within reason, else longer each time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), LONGEST) if asked.isdigit() else PAUSE * 2 ** (attempt - 1)
