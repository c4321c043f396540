"""The Hub as an ASGI application: routes, errors as the client expects them, and two layers around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bot.hub import api_account, api_commit, api_files, api_jobs, api_repos, errors, pages
from bot.hub.access import Registry, Token
from bot.hub.collection import Collections
from bot.hub.errors import HubError
from bot.hub.faults import Faults, Log, Outermost
from bot.hub.jobs import Jobs
from bot.hub.objects import MissingObject
from bot.hub.oidc import Exchange, Publisher
from bot.hub.store import Store
from bot.hub.uploads import Limits
from bot.hub.web import Hub

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_DRAINED_BYTES, _DRAIN_SECONDS = 64 << 20, 10.0


def open_hub(
    root: Path,
    *,
    tokens: Iterable[Token] = (),
    publishers: Iterable[Publisher] = (),
    jwks: Path | None = None,
    limits: Limits | None = None,
    jobs: bool = False,
) -> Hub:
    """A Hub on a folder, which is made if need be. Raises StoreError where the folder cannot be one."""
    store = Store(root)
    registry = Registry(root, store.secret, tokens)
    exchange = Exchange(registry, publishers, jwks)
    return Hub(store, registry, Collections(root / "collections"), exchange, limits or Limits(), Jobs(jobs))


def application(hub: Hub, log: Log, faults: Callable[[], Faults | None]) -> ASGIApp:
    """The application; `log` takes every request, `faults` gives what may go wrong on purpose."""
    routes = [
        *api_account.routes(),
        *api_jobs.routes(),
        *api_repos.routes(),
        *api_files.routes(),
        *api_commit.routes(),
        Route("/api/{path:path}", _no_such_route, methods=_METHODS),
        *pages.routes(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HubError: _refused,
            HTTPException: _http_error,
            # The repository was deleted while it was read.
            MissingObject: _gone,
            FileNotFoundError: _gone,
            ClientDisconnect: _gone,
        },
    )
    app.router.redirect_slashes = False
    app.state.hub = hub
    return Outermost(_RawPath(_Drained(app)), log, faults)


class _RawPath:
    """Routes on the path as it was sent: in ``tree/refs%2Fpr%2F1/folder`` the revision is one part, with slashes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            if not raw.isascii():
                await JSONResponse({"error": "The URL is not valid."}, 400)(scope, receive, send)
                return
            scope = {**scope, "path": raw.partition(b"?")[0].decode("ascii")}
        await self.app(scope, receive, send)


class _Drained:
    """Reads what is left of a refused request's body before the refusal is sent.

    A server that answers and closes while the client still sends makes the client see a broken connection in place
    of the answer. What is left is read up to a limit; a client that asked first (``Expect``) has not begun to send.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key for key, _ in scope["headers"]}
        more = bool(headers & {b"content-length", b"transfer-encoding"}) and b"expect" not in headers

        async def watched() -> Message:
            nonlocal more
            message = await receive()
            more = more and message.get("more_body", False)
            return message

        async def drain() -> None:
            count = 0
            while more and count < _DRAINED_BYTES:
                count += len((await watched()).get("body", b""))

        async def draining(message: Message) -> None:
            if message.get("status", 0) >= 400 and more:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(drain(), _DRAIN_SECONDS)
            await send(message)

        await self.app(scope, watched, draining)


def _no_such_route(request: Request) -> Response:
    """An address of the API that is not here: kept from being taken for a repository of the owner "api"."""
    raise HTTPException(404, "The embedded Hub does not have this part of the API.")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return JSONResponse(error.body, error.status, error.headers)


def _gone(request: Request, error: Exception) -> Response:
    return _refused(request, errors.repo_not_found())


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404 and (path.startswith(("/api/models/", "/api/datasets/")) or "/resolve/" in path):
        return _gone(request, error)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
