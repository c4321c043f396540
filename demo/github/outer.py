"""Around every request: the log, what goes wrong on purpose, who asks, rate limits, ETags."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from bot.hub.faults import Exchange, Log
from demo.github.shown import Shown
from demo.github.state import State, Token
from demo.github.web import Answer, Call, Refused, parse_query

MAX_BODY = 32 << 20
WRITES = ("POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of its answer: `status` with GitHub's words for it, after `stall` seconds.

    `limit` is "primary" or "secondary": refused as over that rate limit. `retry_after` in seconds. `reset` is how far away
    the end of a primary limit is.
    """

    status: int = 0
    limit: str | None = None
    retry_after: int | None = None
    reset: float = 1.0
    stall: float = 0.0


Faults = Callable[[int, Request], Fault | None]


@dataclass
class Said(Exchange):
    """A request of the log: also its query, body and the token's owner."""

    query: str = ""
    body: bytes = b""
    login: str | None = None
    counted: bool = True


@dataclass
class Outer:
    """Answers requests from a table of routes. One request at a time touches the state."""

    state: State
    route: Callable[[str, str], tuple[Callable[[Call], Answer], dict[str, str]] | None]
    log: Log = field(default_factory=Log)
    faults: Faults | None = None
    printer: Callable[[Said], None] | None = None

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        said = Said(next(self._numbers), request.method, path, request.headers.get("range"), query=request.url.query)
        fault = self.faults(said.number, request) if self.faults is not None else None
        if fault is not None and fault.stall:
            await asyncio.sleep(fault.stall)
        said.body = await request.body()
        said.received = len(said.body)
        response = await run_in_threadpool(self._answer, request, said, fault)
        said.status, said.sent = response.status_code, len(response.body)
        self.log.append(said)
        if self.printer is not None:
            self.printer(said)
        return response

    def _answer(self, request: Request, said: Said, fault: Fault | None) -> Response:
        headers: dict[str, str] = {"X-GitHub-Request-Id": f"0:{said.number:x}"}
        try:
            token = self._token(request)
            said.login = token.account.login if token else None
            if fault is not None and (fault.status or fault.limit):
                raise _asked_for(fault)
            if said.received > MAX_BODY:
                raise Refused(413, "Payload too large")
            with self.state.lock:
                if said.path != "/rate_limit":
                    self._count(token, said.method)
                answer = self._call(request, said, token)
        except Refused as refused:
            answer = Answer(refused.status, refused.body, refused.headers)
            token = self._token_or_none(request)
        if token is not None:
            headers |= self._limit_headers(token)
        headers |= answer.headers or {}
        body = answer.value if isinstance(answer.value, bytes) else _json(answer.value)
        if request.method in ("GET", "HEAD") and answer.status == 200:
            etag = f'W/"{hashlib.sha256(body).hexdigest()}"'
            headers |= {"ETag": etag, "Cache-Control": "private, max-age=60, s-maxage=60"}
            if etag in request.headers.get("if-none-match", ""):
                # Costs nothing of the limit.
                if token is not None:
                    token.used -= 1
                    headers |= self._limit_headers(token)
                said.counted = False
                return Response(status_code=304, headers=headers)
        kind = headers.pop("Content-Type", "application/json; charset=utf-8")
        return Response(b"" if answer.status == 204 else body, answer.status, headers, media_type=kind)

    def _call(self, request: Request, said: Said, token: Token | None) -> Answer:
        found = self.route(said.method, said.path)
        if found is None:
            raise Refused(404, "Not Found")
        endpoint, parameters = found
        url = f"{request.url.scheme}://{request.url.netloc}"
        call = Call(
            self.state, Shown(self.state, url), token, said.method, said.path, parse_query(said.query),
            request.headers, said.body, parameters,
        )  # fmt: skip
        return endpoint(call)

    def _token_or_none(self, request: Request) -> Token | None:
        try:
            return self._token(request)
        except Refused:
            return None

    def _token(self, request: Request) -> Token | None:
        given = request.headers.get("authorization", "")
        if not given:
            return None
        token = self.state.tokens.get(given.partition(" ")[2])
        if token is None:
            raise Refused(401, "Bad credentials")
        return token

    def _count(self, token: Token | None, method: str) -> None:
        """Both rate limits. https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api"""
        if token is None:
            return
        limits, moment = self.state.limits, time.time()
        if moment >= token.resets:
            token.used, token.resets = 0, moment + 3600
        if token.used >= limits.requests:
            raise Refused(403, f"API rate limit exceeded for user ID {token.account.id}.")
        token.used += 1
        if method in WRITES and limits.writes:
            recent = [past for past in self.state.written.get(token.account.login, []) if moment - past < 60]
            if len(recent) >= limits.writes:
                wait = math.ceil(60 - (moment - recent[0]))
                raise Refused(403, _SECONDARY, headers={"Retry-After": str(wait)})
            self.state.written[token.account.login] = [*recent, moment]

    def _limit_headers(self, token: Token) -> dict[str, str]:
        limit = self.state.limits.requests
        return {
            "X-RateLimit-Limit": str(limit),
            "X-RateLimit-Remaining": str(max(0, limit - token.used)),
            "X-RateLimit-Used": str(token.used),
            "X-RateLimit-Reset": str(math.ceil(token.resets)),
            "X-RateLimit-Resource": "core",
        }


_SECONDARY = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."


def _asked_for(fault: Fault) -> Refused:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.limit == "primary":
        headers |= {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(math.ceil(time.time() + fault.reset))}
        return Refused(403, "API rate limit exceeded for installation.", headers=headers)
    if fault.limit == "secondary":
        return Refused(403, _SECONDARY, headers=headers)
    words = {500: "Internal Server Error", 502: "Server Error", 503: "Service Unavailable", 504: "Gateway Timeout"}
    return Refused(fault.status, words.get(fault.status, "Refused"), headers=headers)


def _json(value: Any) -> bytes:
    return (
        b""
        if value is None
        else json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    )
