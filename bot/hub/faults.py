"""A Hub that misbehaves on purpose, and a log of what was asked of it: for tests of those who use one."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEPT = 20_000


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of, or on the way to, its answer.

    `stall`: seconds to wait first. `status`: answer with this status, and with ``Retry-After`` if `retry_after`
    (seconds) is given and with `message` as its error. `drop`: cut the connection, before an answer if it is 0, else
    after so many bytes of body. `late`: do what was asked, and wait so many seconds before the answer. `lost`: do what was
    asked, and cut the connection in place of the answer. `damage`: one bit of the body that is sent, or of the answer's,
    is another.
    """

    stall: float = 0.0
    status: int | None = None
    retry_after: int | None = None
    drop: int | None = None
    late: float = 0.0
    lost: bool = False
    damage: Literal["request", "answer"] | None = None
    message: str | None = None


Faults = Callable[[int, Request], Fault | None]


@dataclass
class Exchange:
    """One request: `range` is its Range header, `sent` and `received` are bytes of body, 0 is the status before an answer."""

    number: int
    method: str
    path: str
    range: str | None
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Log:
    """The last requests, oldest first. Reading it while requests run is safe. `told` is called with each when it has ended."""

    told: Callable[[Exchange], None] | None = None

    _kept: deque[Exchange] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def append(self, exchange: Exchange) -> None:
        """Keep one more."""
        with self._lock:
            self._kept.append(exchange)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()

    def all(self, method: str | None = None, containing: str = "") -> list[Exchange]:
        """Those of one method, or whose path contains a text."""
        with self._lock:
            return [each for each in self._kept if method in {None, each.method} and containing in each.path]


class Dropped(Exception):
    """Ends a request whose connection was cut."""


class Outermost:
    """ASGI middleware around everything: counts requests from 1, logs them, asks `faults` what to do to each."""

    def __init__(self, app: ASGIApp, log: Log, faults: Callable[[], Faults | None]) -> None:
        self.app = app
        self.log = log
        self.faults = faults
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        seen = Exchange(next(self._numbers), request.method, scope["path"], request.headers.get("range"))
        self.log.append(seen)  # first, as a client that has its answer may look here before this method ends
        decide = self.faults()
        fault = decide(seen.number, request) if decide is not None else None

        whole = True

        def damaged(message: Message) -> Message:
            """The message with a bit in the middle of the first body flipped."""
            nonlocal whole
            body = bytearray(message.get("body", b""))
            if body and whole:
                whole = False
                body[len(body) // 2] ^= 1
            return {**message, "body": bytes(body)} if body else message

        async def counted_receive() -> Message:
            message = await receive()
            seen.received += len(message.get("body", b""))
            if fault is not None and fault.damage == "request":
                message = damaged(message)
            return message

        async def counted_send(message: Message) -> None:
            seen.status = message.get("status", seen.status)
            if fault is not None and message["type"] == "http.response.start":
                await asyncio.sleep(fault.late)
                if fault.lost:
                    _cut(send, flush=False)
                    raise Dropped
            if fault is not None and fault.damage == "answer":
                message = damaged(message)
            body = message.get("body", b"")
            if fault is not None and fault.drop is not None and seen.sent + len(body) > fault.drop:
                kept = body[: fault.drop - seen.sent]
                seen.sent += len(kept)
                await send({"type": "http.response.body", "body": kept, "more_body": True})
                _cut(send, flush=True)
                raise Dropped
            seen.sent += 0 if request.method == "HEAD" else len(body)
            await send(message)

        try:
            if fault is not None and fault.stall:
                await asyncio.sleep(fault.stall)
            if fault is not None and fault.drop == 0:
                _cut(send, flush=False)
                return
            if fault is not None and fault.status is not None:
                headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                refusal = JSONResponse({"error": fault.message or f"Fault {fault.status}"}, fault.status, headers)
                await refusal(scope, counted_receive, counted_send)
                return
            await self.app(scope, counted_receive, counted_send)
        except Dropped:
            return
        finally:
            if self.log.told is not None:
                self.log.told(seen)


def _cut(send: Send, *, flush: bool) -> None:
    """Close the client's connection. ASGI has no word for that, so this asks uvicorn's cycle, whose method `send` is."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.close() if flush else transport.abort()
