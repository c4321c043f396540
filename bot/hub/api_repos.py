"""Repositories: create, delete, rename, settings, information, references, commits."""

from __future__ import annotations

import itertools
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bot.hub import describe, errors, names, web
from bot.hub.names import RepoKind, RepoName
from bot.hub.repository import REF_KINDS, Settings
from bot.hub.web import base_url, caller, hub, repository, route, with_json

_COMMITS_PER_PAGE, _REPOS_PER_PAGE = 50, 100


def create(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/repos/create"""
    name, asking = _named(request, body), caller(request)
    asking.check_namespace(name.owner)
    settings = Settings(private=_private(body) or False)
    try:
        hub(request).store.create(name, settings, asking.name)
    except errors.HubError as error:
        if error.status == 409:  # the client reads `url` from this answer too
            raise errors.conflict(f"You already created this {name.kind} repo", **_address(request, name)) from None
        raise
    return JSONResponse(_address(request, name))


def delete(request: Request, body: dict[str, Any]) -> Response:
    """DELETE /api/repos/delete"""
    asking, store = caller(request), hub(request).store
    found = store.get(_named(request, body))
    asking.check_read(found.name, found.settings)
    asking.check_namespace(found.name.owner)
    store.delete(found)
    return JSONResponse({"success": True})


def move(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/repos/move"""
    asking, store = caller(request), hub(request).store
    kind = names.kind(body.get("type"))
    found, target = store.get(names.repo_id(kind, body.get("fromRepo"))), names.repo_id(kind, body.get("toRepo"))
    asking.check_read(found.name, found.settings)
    asking.check_namespace(found.name.owner)
    asking.check_namespace(target.owner)
    store.move(found, target)
    return JSONResponse(_address(request, target))


def settings(request: Request, body: dict[str, Any]) -> Response:
    """PUT /api/{kind}s/{repo}/settings"""
    changes: dict[str, Any] = {}
    private = _private(body)
    if private is not None:
        changes["private"] = private
    if "gated" in body:
        if body["gated"] not in {"auto", "manual"} and body["gated"] is not False:
            raise errors.bad_request('"gated" is one of "auto", "manual", false.')
        changes["gated"] = body["gated"]
    updated = repository(request, "write").update(**changes)
    return JSONResponse({"private": updated.private, "gated": updated.gated})


def info(request: Request) -> Response:
    """GET /api/{kind}s/{repo} and /revision/{revision}, with ``expand`` (one or more properties) no more than that."""
    found, query = repository(request, "read"), request.query_params
    commit = found.resolve(request.path_params.get("revision", "main"))
    expand = [*query.getlist("expand"), *query.getlist("expand[]")]
    if other := set(expand) - describe.PROPERTIES.keys():
        raise errors.bad_request(f"Cannot expand {min(other)!r}: this Hub does not have it.")
    return JSONResponse(describe.repository(found, commit, blobs=web.flag(query.get("blobs", "")), expand=expand))


def listing(request: Request) -> Response:
    """GET /api/{kind}s, with ``author`` and ``search``: what the caller may see, without its files."""
    asking, query = caller(request), request.query_params
    kind: RepoKind = request.path_params["kind"]
    chosen = [
        each
        for each in hub(request).store.all(kind)
        if asking.sees(each.name, each.settings)
        and query.get("author") in {None, each.name.owner}
        and query.get("search", "").lower() in each.name.id.lower()
    ]

    def shown(part: Any) -> list[Any]:
        values = [describe.repository(each, each.resolve("main")) for each in part]
        return [{key: value for key, value in each.items() if key not in {"siblings", "cardData"}} for each in values]

    return web.page(request, chosen, _REPOS_PER_PAGE, shown)


def refs(request: Request) -> Response:
    """GET /api/{kind}s/{repo}/refs"""
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    prefixes = {
        REF_KINDS["branches"]: "branches",
        REF_KINDS["tags"]: "tags",
        REF_KINDS["pull requests"]: "pullRequests",
    }
    for full, commit in repository(request, "read").refs().items():
        for prefix, group in prefixes.items():
            if full.startswith(f"{prefix}/"):
                short = full if group == "pullRequests" else full.removeprefix(f"{prefix}/")
                answer[group].append({"name": short, "ref": full, "targetCommit": commit})
    if not web.flag(request.query_params.get("include_prs", "")):
        del answer["pullRequests"]
    return JSONResponse(answer)


def create_branch(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/{kind}s/{repo}/branch/{ref}"""
    start = body.get("startingPoint") or "main"
    repository(request, "write").create_ref("branches", request.path_params["ref"], _revision(start))
    return JSONResponse({})


def delete_branch(request: Request) -> Response:
    """DELETE /api/{kind}s/{repo}/branch/{ref}"""
    repository(request, "write").delete_ref("branches", request.path_params["ref"])
    return JSONResponse({})


def create_tag(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/{kind}s/{repo}/tag/{revision}: a light tag; its message is not kept."""
    repository(request, "write").create_ref("tags", names.ref(body.get("tag")), request.path_params["ref"])
    return JSONResponse({})


def delete_tag(request: Request) -> Response:
    """DELETE /api/{kind}s/{repo}/tag/{ref}"""
    repository(request, "write").delete_ref("tags", request.path_params["ref"])
    return JSONResponse({})


def commits(request: Request) -> Response:
    """GET /api/{kind}s/{repo}/commits/{revision}"""
    found = repository(request, "read")
    start = web.number(request, "cursor", 0)
    history = found.history(found.resolve(request.path_params["revision"]))
    # Only as far back as the page and whether there is another: a page's cost does not grow with the history below it.
    known = list(itertools.islice(history, start + _COMMITS_PER_PAGE + 1))

    def shown(part: Any) -> list[Any]:
        answers = [describe.commit(oid, value) for oid, value in part]
        if "formatted" in request.query_params.getlist("expand[]"):
            for each in answers:
                each["formatted"] = {"title": _escaped(each["title"]), "message": _escaped(each["message"])}
        return answers

    return web.page(request, known, _COMMITS_PER_PAGE, shown)


def auth_check(request: Request) -> Response:
    """GET /api/{kind}s/{repo}/auth-check[/write]"""
    repository(request, "write" if request.url.path.endswith("/write") else "download")
    return JSONResponse({})


def unknown(request: Request) -> Response:
    """A repository's name without an owner: the real Hub has a few such models, this one has none."""
    raise errors.repo_not_found()


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    at = "/api/{kind:kind}/{owner:part}/{name:part}"
    return [
        route("/api/repos/create", with_json(create), "POST"),
        route("/api/repos/delete", with_json(delete), "DELETE"),
        route("/api/repos/move", with_json(move), "POST"),
        route("/api/{kind:kind}", listing),
        route(f"{at}/settings", with_json(settings), "PUT"),
        route(f"{at}/revision/{{revision:part}}", info),
        route(f"{at}/refs", refs),
        route(f"{at}/branch/{{ref:part}}", with_json(create_branch), "POST"),
        route(f"{at}/branch/{{ref:part}}", delete_branch, "DELETE"),
        route(f"{at}/tag/{{ref:part}}", with_json(create_tag), "POST"),
        route(f"{at}/tag/{{ref:part}}", delete_tag, "DELETE"),
        route(f"{at}/commits/{{revision:part}}", commits),
        route(f"{at}/auth-check", auth_check),
        route(f"{at}/auth-check/write", auth_check),
        route(at, info),
        route("/api/{kind:kind}/{name:part}", unknown),
    ]


def _named(request: Request, body: dict[str, Any]) -> RepoName:
    owner = body.get("organization") or caller(request).name
    return names.repo(body.get("type"), owner, body.get("name"))


def _address(request: Request, name: RepoName) -> dict[str, str]:
    return {"url": f"{base_url(request)}/{name.url_path}", "name": name.id}


def _private(body: dict[str, Any]) -> bool | None:
    """Whether the body asks for a private repository; None where it does not say."""
    visibility = body.get("visibility")
    if visibility is None:
        return bool(body["private"]) if body.get("private") is not None else None
    if visibility not in {"public", "private"}:
        raise errors.bad_request('"visibility" is one of "public", "private".')
    return bool(visibility == "private")


def _revision(value: object) -> str:
    return value if isinstance(value, str) and names.is_commit(value) else names.ref(value)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
