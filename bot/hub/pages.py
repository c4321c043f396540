"""Pages for people, so that the links in a card lead somewhere: what is there, and a card's text. Everything escaped."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from bot.hub import describe, errors, names
from bot.hub.names import KINDS
from bot.hub.repository import File, Folder, Repository, iso
from bot.hub.web import base_url, caller, hub, repository, route

_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "X-Frame-Options": "DENY"}
_STYLE = "body{font:16px sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}pre{white-space:pre-wrap}"


def index(request: Request) -> Response:
    """GET /: the repositories that the caller may see."""
    asking = caller(request)
    body = ""
    for kind in KINDS:
        visible = [each.name for each in hub(request).store.all(kind) if asking.sees(each.name, each.settings)]
        links = [_link(f"/{name.url_path}", name.id) for name in visible]
        body += f"<h2>{kind}s</h2>{_list(links)}" if links else ""
    return _page("Hub", body or "<p>No repositories yet.</p>")


def overview(request: Request) -> Response:
    """GET /{repo}: its card's text and its files."""
    found = repository(request, "read")
    commit = found.resolve("main")
    readme = found.find(commit, "README.md")
    text = describe.text(found, readme if isinstance(readme, File) else None)
    card = f"<pre>{escape(text)}</pre>" if text else "<p>No model card.</p>"
    return _page(found.name.id, card + _entries(found, commit, "main", ""))


def tree(request: Request) -> Response:
    """GET /{repo}/tree/{revision}[/{path}]"""
    found = repository(request, "read")
    revision, path = request.path_params["revision"], names.folder(request.path_params.get("path", ""))
    return _page(f"{found.name.id}/{path}", _entries(found, found.resolve(revision), revision, path))


def blob(request: Request) -> Response:
    """GET /{repo}/blob/{revision}/{path}"""
    found = repository(request, "download")
    revision, path = request.path_params["revision"], names.path(request.path_params["path"])
    commit = found.resolve(revision)
    file = found.find(commit, path)
    if not isinstance(file, File):
        raise errors.entry_not_found(path, commit)
    text = describe.text(found, file)
    facts = f"<p>{file.size} bytes, {escape(file.etag)} {_link(_url(found, 'resolve', revision, path), 'download')}</p>"
    return _page(path, facts + (f"<pre>{escape(text)}</pre>" if text is not None else ""))


def commit(request: Request) -> Response:
    """GET /{repo}/commit/{hash}"""
    found = repository(request, "read")
    oid = found.resolve(request.path_params["revision"])
    value = found.objects.commit(oid)
    facts = f"<p>{escape(value.author)}, {iso(value.date)}, {_link(_url(found, 'tree', oid, ''), oid)}</p>"
    return _page(value.title, f"{facts}<pre>{escape(value.body)}</pre>")


def pull_request(request: Request) -> Response:
    """GET /{repo}/discussions/{number}: the commit that the pull request ends with."""
    found = repository(request, "read")
    oid = found.resolve(f"refs/pr/{request.path_params['number']}")
    return RedirectResponse(f"{base_url(request)}{_url(found, 'commit', oid, '')}", 307)


def collection(request: Request) -> Response:
    """GET /collections/{slug}"""
    asking, store = caller(request), hub(request).store
    found = hub(request).collections.get(request.path_params["owner"], request.path_params["slug"])
    if found["private"]:
        asking.check_namespace(found["owner"]["name"])
    links = []
    for item in found["items"]:
        if item["type"] not in KINDS:
            links.append(escape(item["id"]))
            continue
        name = names.repo_id(item["type"], item["id"])
        if (store.folder(name) / "repo.json").is_file() and asking.sees(name, store.get(name).settings):
            links.append(_link(f"/{name.url_path}", name.id))
    return _page(found["title"], f"<p>{escape(found['description'] or '')}</p>{_list(links)}")


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    found = [route("/", index), route("/collections/{owner:part}/{slug:part}", collection)]
    for at in ("/{kind:kind}/{owner:part}/{name:part}", "/{owner:part}/{name:part}"):
        found += [
            route(at, overview),
            route(f"{at}/tree/{{revision:part}}", tree),
            route(f"{at}/tree/{{revision:part}}/{{path:rest}}", tree),
            route(f"{at}/blob/{{revision:part}}/{{path:rest}}", blob),
            route(f"{at}/commit/{{revision:part}}", commit),
            route(f"{at}/discussions/{{number:int}}", pull_request),
        ]
    return found


def _entries(found: Repository, commit_: str, revision: str, path: str) -> str:
    links = []
    for entry in found.walk(commit_, path, recursive=False):
        name = entry.path.rpartition("/")[2]
        if isinstance(entry, Folder):
            links.append(_link(_url(found, "tree", revision, entry.path), f"{name}/"))
        else:
            links.append(f"{_link(_url(found, 'blob', revision, entry.path), name)} ({entry.size} bytes)")
    return f"<h2>Files</h2>{_list(links)}"


def _url(found: Repository, view: str, revision: str, path: str) -> str:
    return f"/{found.name.url_path}/{view}/{quote(revision, safe='')}/{quote(path)}".rstrip("/")


def _link(url: str, text: str) -> str:
    return f'<a href="{escape(url)}">{escape(text)}</a>'


def _list(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _page(title: str, body: str) -> Response:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return HTMLResponse(f"{head}<h1>{escape(title)}</h1>{body}", headers=_POLICY)
