"""What is not about one repository: who am I, token exchange, checking a card, and collections."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from bot.hub import card, errors, names, web
from bot.hub.access import Caller
from bot.hub.collection import ITEM_TYPES
from bot.hub.names import KINDS
from bot.hub.web import base_url, caller, hub, route, with_json

_COLLECTIONS_PER_PAGE = 100


def whoami(request: Request) -> Response:
    """GET /api/whoami-v2"""
    token = caller(request).token
    if token is None:
        raise errors.login_needed()
    namespaces = {scope for scope in token.scope if "/" not in scope and scope not in {"*", token.name}}
    role = {"admin": "write", "write": "write", "read": "read"}[token.rights]
    return JSONResponse(
        {
            "type": "user",
            "id": hashlib.sha256(token.name.encode()).hexdigest()[:24],
            "name": token.name,
            "fullname": token.name,
            "isPro": False,
            "orgs": [{"type": "org", "name": each, "fullname": each} for each in sorted(namespaces)],
            "auth": {"type": "access_token", "accessToken": {"displayName": token.name, "role": role}},
        }
    )


def exchange(request: Request, body: dict[str, Any]) -> Response:
    """POST /oauth/token"""
    form = {key: value[0] if isinstance(value, list) and value else value for key, value in body.items()}
    return JSONResponse(hub(request).exchange.exchange(form, {base_url(request)}))


def validate_yaml(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/validate-yaml"""
    content = body.get("content")
    if not isinstance(content, str):
        raise errors.bad_request('"content" must be a text.')
    wrong, doubtful = card.problems(content)
    status = 400 if wrong else 200
    if request.headers.get("accept") == "text/plain":
        return PlainTextResponse("\n".join(wrong), status)
    messages = {"errors": [{"message": each} for each in wrong], "warnings": [{"message": each} for each in doubtful]}
    return JSONResponse(messages, status)


def create_collection(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/collections"""
    asking = caller(request)
    owner = names.namespace(body.get("namespace") or asking.name)
    asking.check_namespace(owner)
    made = hub(request).collections.create(owner, body.get("title"), body.get("description"), body.get("private"))
    return JSONResponse(made)


def list_collections(request: Request) -> Response:
    """GET /api/collections, with ``owner``"""
    asking, owner = caller(request), request.query_params.get("owner")
    chosen = [
        {key: value for key, value in _shown(request, asking, each).items() if key != "position"}
        for each in hub(request).collections.all()
        if owner in {None, each["owner"]["name"]} and _visible(asking, each)
    ]
    return web.page(request, chosen, _COLLECTIONS_PER_PAGE, list)


def get_collection(request: Request) -> Response:
    """GET /api/collections/{slug}"""
    asking = caller(request)
    found = hub(request).collections.get(*_slug(request))
    if not _visible(asking, found):
        raise errors.HubError(404, "Collection not found")
    return JSONResponse(_shown(request, asking, found))


def update_collection(request: Request, body: dict[str, Any]) -> Response:
    """PATCH /api/collections/{slug}"""
    asking = _may_write(request)
    updated = hub(request).collections.update(*_slug(request), body)
    return JSONResponse({"success": True, "data": _shown(request, asking, updated)})


def delete_collection(request: Request) -> Response:
    """DELETE /api/collections/{slug}"""
    _may_write(request)
    hub(request).collections.delete(*_slug(request))
    return JSONResponse({"success": True})


def add_item(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/collections/{slug}/items. A repository must exist and be one that the caller may see."""
    asking = _may_write(request)
    entry = body.get("item")
    kind, identifier = (entry.get("type"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    if kind not in ITEM_TYPES or not isinstance(identifier, str) or not identifier:
        raise errors.bad_request(f'"item" needs an id, and a type of {", ".join(ITEM_TYPES)}.')
    if kind in KINDS and not _exists(request, asking, kind, identifier):
        raise errors.repo_not_found()
    value = hub(request).collections.add(*_slug(request), kind, identifier, body.get("note"))
    return JSONResponse(_shown(request, asking, value))


def update_item(request: Request, body: dict[str, Any]) -> Response:
    """PATCH /api/collections/{slug}/items/{item}"""
    _may_write(request)
    hub(request).collections.update_item(*_slug(request), request.path_params["item"], body)
    return JSONResponse({"success": True})


def delete_item(request: Request) -> Response:
    """DELETE /api/collections/{slug}/items/{item}"""
    _may_write(request)
    hub(request).collections.delete_item(*_slug(request), request.path_params["item"])
    return JSONResponse({"success": True})


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    one = "/api/collections/{owner:part}/{slug:part}"
    return [
        route("/api/whoami-v2", whoami),
        route("/oauth/token", with_json(exchange), "POST"),
        route("/api/validate-yaml", with_json(validate_yaml), "POST"),
        route("/api/collections", list_collections),
        route("/api/collections", with_json(create_collection), "POST"),
        route(one, get_collection),
        route(one, with_json(update_collection), "PATCH"),
        route(one, delete_collection, "DELETE"),
        route(f"{one}/items", with_json(add_item), "POST"),
        route(f"{one}/items/{{item:part}}", with_json(update_item), "PATCH"),
        route(f"{one}/items/{{item:part}}", delete_item, "DELETE"),
    ]


def _slug(request: Request) -> tuple[str, str]:
    return request.path_params["owner"], request.path_params["slug"]


def _may_write(request: Request) -> Caller:
    """The caller, if the collection's owner is one it may write for. Raises HubError(404) for what it cannot see."""
    asking = caller(request)
    found = hub(request).collections.get(*_slug(request))
    if not _visible(asking, found):
        raise errors.HubError(404, "Collection not found")
    asking.check_namespace(found["owner"]["name"])
    return asking


def _visible(asking: Caller, value: dict[str, Any]) -> bool:
    owner = value["owner"]["name"]
    return not value["private"] or (asking.token is not None and asking.token.covers_namespace(owner))


def _shown(request: Request, asking: Caller, value: dict[str, Any]) -> dict[str, Any]:
    """A collection without the repositories that this caller may not know of, or that are gone."""
    items = [
        each
        for each in value["items"]
        if each["type"] not in KINDS or _exists(request, asking, each["type"], each["id"])
    ]
    return {**value, "items": items}


def _exists(request: Request, asking: Caller, kind: str, identifier: str) -> bool:
    try:
        found = hub(request).store.get(names.repo_id(kind, identifier))
        return asking.sees(found.name, found.settings)
    except errors.HubError:
        return False
