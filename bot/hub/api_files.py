"""Files at a revision: content, listing, information about paths."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bot.hub import describe, downloads, errors, names, web
from bot.hub.repository import File
from bot.hub.web import repository, route, with_json

_PER_PAGE, _PER_PAGE_EXPANDED = 1000, 50
_TEXT = (".md", ".txt", ".yaml", ".yml", ".csv", ".gitattributes", ".gitignore", ".jinja", ".py")


def resolve(request: Request) -> Response:
    """GET and HEAD /{repo}/resolve/{revision}/{path}"""
    found = repository(request, "download")
    path = names.path(request.path_params["path"])
    commit = found.resolve(request.path_params["revision"])
    file = found.find(commit, path)
    if not isinstance(file, File):
        raise errors.entry_not_found(path, commit)
    headers = {
        "ETag": f'"{file.etag}"',
        "X-Repo-Commit": commit,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        "X-Content-Type-Options": "nosniff",  # a file is data, whatever a browser would make of it
    }
    if file.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
    source = found.lfs_path(file.lfs.sha256) if file.lfs else found.objects.read(file.oid, "blob")
    return downloads.respond(source, file.size, request.headers, headers, _media_type(path))


def tree(request: Request) -> Response:
    """GET /api/{kind}s/{repo}/tree/{revision}[/{path}]"""
    found, query = repository(request, "read"), request.query_params
    commit = found.resolve(request.path_params["revision"])
    under = names.folder(request.path_params.get("path", ""))
    expand = web.flag(query.get("expand", ""))
    entries = list(found.walk(commit, under, recursive=web.flag(query.get("recursive", ""))))
    size = _PER_PAGE_EXPANDED if expand else _PER_PAGE
    return web.page(request, entries, size, lambda part: describe.items(found, commit, part, expand=expand))


def paths_info(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/{kind}s/{repo}/paths-info/{revision}: what is there of the paths asked for."""
    found = repository(request, "read")
    commit = found.resolve(request.path_params["revision"])
    paths = body.get("paths", [])
    if not isinstance(paths, list):
        raise errors.bad_request('"paths" must be a list.')
    entries = [entry for path in paths if (entry := found.find(commit, names.folder(path))) is not None]
    return JSONResponse(describe.items(found, commit, entries, expand=web.flag(body.get("expand", ""))))


def safetensors_metadata(request: Request) -> Response:
    """GET /api/models/{repo}/safetensors-metadata/{index}: the headers of all shards on ``main`` in one answer."""
    found = repository(request, "download")
    commit = found.resolve("main")
    path = names.path(request.path_params["path"])
    by_path = {file.path: file for file in found.files(commit)}
    headers = describe.safetensors_headers(found, by_path, path)
    if not headers:
        raise errors.entry_not_found(path, commit)
    return JSONResponse({"index": {}, "headers": headers})


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    at = "/api/{kind:kind}/{owner:part}/{name:part}"
    rest = "{owner:part}/{name:part}/resolve/{revision:part}/{path:rest}"
    return [
        route(f"{at}/tree/{{revision:part}}", tree),
        route(f"{at}/tree/{{revision:part}}/{{path:rest}}", tree),
        route(f"{at}/paths-info/{{revision:part}}", with_json(paths_info), "POST"),
        route(f"{at}/safetensors-metadata/{{path:rest}}", safetensors_metadata),
        route(f"/{{kind:kind}}/{rest}", resolve),
        route(f"/{rest}", resolve),
    ]


def _media_type(path: str) -> str:
    if path.endswith(".json"):
        return "application/json"
    return "text/plain; charset=utf-8" if path.endswith(_TEXT) else "application/octet-stream"
