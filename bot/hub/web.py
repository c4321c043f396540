"""What every endpoint needs: the Hub behind the request, who asks, which repository, bodies, pages of a list."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bot.hub import errors, names
from bot.hub.access import Caller, Registry
from bot.hub.collection import Collections
from bot.hub.jobs import Jobs
from bot.hub.names import RepoKind, RepoName
from bot.hub.oidc import Exchange
from bot.hub.repository import Repository
from bot.hub.store import Store
from bot.hub.uploads import Limits

_BODY_BYTES = 8 << 20
JsonEndpoint = Callable[[Request, dict[str, Any]], Response]
Need = Literal["read", "download", "write"]


@dataclass(frozen=True)
class Hub:
    """Everything an endpoint works on."""

    store: Store
    registry: Registry
    collections: Collections
    exchange: Exchange
    limits: Limits
    jobs: Jobs


class _Kind(Convertor[RepoKind]):
    regex = "models|datasets|spaces"

    def convert(self, value: str) -> RepoKind:
        return names.kind(value.removesuffix("s"))


class _Part(Convertor[str]):
    """One part of the path as it was sent, decoded: ``refs%2Fpr%2F1`` is one part."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return names.unquote(value)


class _Rest(_Part):
    regex = ".*"


register_url_convertor("kind", _Kind())
register_url_convertor("part", _Part())
register_url_convertor("rest", _Rest())


def hub(request: Request) -> Hub:
    """The Hub that the application serves."""
    found: Hub = request.app.state.hub
    return found


def caller(request: Request) -> Caller:
    """Who asks. Raises HubError(401) for an unknown token."""
    return hub(request).registry.caller(request.headers.get("authorization"))


def target(request: Request) -> RepoName:
    """The repository that the path names."""
    params = request.path_params
    return names.repo(params.get("kind", "model"), params["owner"], params["name"])


def repository(request: Request, need: Need) -> Repository:
    """The repository that the path names, if the caller may do to it what is needed. Raises HubError."""
    asking = caller(request)
    found = hub(request).store.get(target(request))
    check = {"read": asking.check_read, "download": asking.check_download, "write": asking.check_write}[need]
    check(found.name, found.settings)
    return found


def base_url(request: Request) -> str:
    """The server's address, as this client reached it, without a closing slash."""
    return f"{request.url.scheme}://{request.url.netloc}"


def with_json(endpoint: JsonEndpoint) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that is called in a thread with the request's body, a JSON object or a form."""

    async def read_and_call(request: Request) -> Response:
        return await run_in_threadpool(endpoint, request, await read_object(request))

    read_and_call.__doc__ = endpoint.__doc__
    return read_and_call


async def read_object(request: Request) -> dict[str, Any]:
    """The body as an object; of a form every value is a list. Raises HubError(400, 413)."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES:
            raise errors.too_large(f"The body of this request may have at most {_BODY_BYTES} bytes.")
    try:
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return dict(parse_qs(body.decode(), keep_blank_values=True, max_num_fields=10_000))
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise errors.bad_request("The body is not JSON.") from None
    if not isinstance(value, dict):
        raise errors.bad_request("The body is not a JSON object.")
    return value


def page(request: Request, items: Sequence[Any], size: int, shown: Callable[[Sequence[Any]], list[Any]]) -> Response:
    """One page of a list, with a Link header to the next: `size` entries, or the query's ``limit`` if that is less."""
    limit, start = number(request, "limit", size), number(request, "cursor", 0)
    limit = max(1, min(limit, size))
    headers = {}
    if start + limit < len(items):
        following = request.url.include_query_params(limit=limit, cursor=start + limit)
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(shown(items[start : start + limit]), headers=headers)


def number(request: Request, key: str, default: int) -> int:
    """A query parameter that is a number from 0 on. Raises HubError(400)."""
    value = request.query_params.get(key, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 12):
        raise errors.bad_request(f"{key} must be a number.")
    return int(value)


def flag(value: object) -> bool:
    """A truth value of a query or a form."""
    return str(value[0] if isinstance(value, list) and value else value).lower() in {"1", "true"}


def route(path: str, endpoint: Callable[[Request], Any], *methods: str) -> Route:
    """A route; GET also answers HEAD."""
    return Route(path, endpoint, methods=list(methods or ("GET",)))
