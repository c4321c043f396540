"""Changing a repository: how each file is to be sent, large files, and the commit itself."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bot.hub import attributes, describe, errors, names, uploads, web
from bot.hub.changes import Change, Copy, Delete, DeleteFolder, Put
from bot.hub.objects import Pointer
from bot.hub.repository import File, Repository
from bot.hub.uploads import Slot
from bot.hub.web import base_url, caller, hub, repository, route, with_json

_MAX_CHANGES = 50_000
_LFS_MEDIA_TYPE = "application/vnd.git-lfs+json"


def preupload(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/{kind}s/{repo}/preupload/{revision}: for each file "lfs" or "regular", and what is there already."""
    found = repository(request, "write")
    commit = found.resolve(request.path_params["revision"])
    patterns = attributes.large_patterns(_text(found, commit, ".gitattributes"))
    ignore = body.get("gitIgnore")
    ignore = ignore if isinstance(ignore, str) else _text(found, commit, ".gitignore")
    answers = []
    for file in _list(body, "files"):
        path, size = names.path(file.get("path")), file.get("size")
        try:
            sample = base64.b64decode(file.get("sample") or "", validate=True)
        except (TypeError, ValueError):
            raise errors.bad_request("A sample is not base64.") from None
        large = (
            (isinstance(size, int) and size > hub(request).limits.regular)
            or attributes.is_large(path, patterns)
            or attributes.is_binary(sample)
        )
        there = found.find(commit, path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": attributes.is_ignored(path, ignore),
                "oid": there.etag if isinstance(there, File) else None,
            }
        )
    return JSONResponse({"files": answers, "commitOid": commit})


def batch(request: Request, body: dict[str, Any]) -> Response:
    """POST /{repo}.git/info/lfs/objects/batch (operation "upload" only: downloads go through /resolve)."""
    found = repository(request, "write")
    if body.get("operation") != "upload":
        raise errors.bad_request('Only the operation "upload" is supported.')
    base = f"{base_url(request)}/{found.name.url_path}.git/info/lfs"
    multipart = "multipart" in (body.get("transfers") or [])
    limits, store = hub(request).limits, hub(request).store
    answers = [uploads.actions(store, found, base, each, limits, multipart) for each in _list(body, "objects")]
    return JSONResponse({"transfer": "basic", "objects": answers}, media_type=_LFS_MEDIA_TYPE)


async def storage(request: Request) -> Response:
    """PUT /{repo}.git/info/lfs/storage/{oid}: an object, or a part of one, at an address that this Hub signed."""
    store, slot = hub(request).store, _slot(request)
    found = await run_in_threadpool(store.get, web.target(request))
    if slot.part:
        etag = await uploads.receive_part(store, slot, request.stream())
    else:
        await uploads.receive(store, found, slot, request.stream())
        etag = slot.sha256
    return Response(status_code=200, headers={"ETag": f'"{etag}"'})


def complete(request: Request, body: dict[str, Any]) -> Response:
    """POST /{repo}.git/info/lfs/complete/{oid}: all parts have been sent."""
    store, slot = hub(request).store, _slot(request)
    if slot.part or not slot.stride:
        raise errors.forbidden("This address is not for completion.")
    uploads.complete(store, store.get(web.target(request)), slot)
    return JSONResponse({"success": True})


def verify(request: Request, body: dict[str, Any]) -> Response:
    """POST /{repo}.git/info/lfs/verify: whether an object has arrived."""
    found = repository(request, "write")
    oid, size = uploads.object_of(body)
    path = found.lfs_path(oid)
    if not path.is_file() or path.stat().st_size != size:
        raise errors.HubError(404, f"The object {oid} has not arrived.")
    return JSONResponse({}, media_type=_LFS_MEDIA_TYPE)


async def commit(request: Request) -> Response:
    """POST /api/{kind}s/{repo}/commit/{revision}[?create_pr=1]: newline-delimited JSON, a header and changes."""
    found = await run_in_threadpool(repository, request, "write")
    reader = CommitReader(found, hub(request).limits.regular)
    async for lines in _lines(request.stream(), reader.line_bytes):
        await run_in_threadpool(reader.feed, lines)
    return await run_in_threadpool(_commit, request, found, reader)


class CommitReader:
    """Reads a commit's lines. Files are stored as they come: until the commit is made nothing refers to them."""

    def __init__(self, repo: Repository, regular_bytes: int) -> None:
        self.repo = repo
        self.regular_bytes = regular_bytes
        self.line_bytes = regular_bytes * 4 // 3 + 65536
        self.header: dict[str, Any] | None = None
        self.changes: list[Change] = []

    def feed(self, lines: list[bytes]) -> None:
        """Take some whole lines. Raises HubError(400, 413)."""
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                key, fields = value["key"], value["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise errors.bad_request("A line of the commit is not a JSON object with key and value.") from None
            if not isinstance(fields, dict):
                raise errors.bad_request(f"The value of {key!r} is not an object.")
            if (key == "header") != (self.header is None):
                raise errors.bad_request("A commit begins with its header, and has one.")
            if key == "header":
                self.header = fields
            elif len(self.changes) >= _MAX_CHANGES:
                raise errors.too_large(f"A commit may have at most {_MAX_CHANGES} changes.")
            else:
                self.changes.append(self._change(key, fields))

    def _change(self, key: object, fields: dict[str, Any]) -> Change:
        match key:
            case "file":
                return self._file(names.path(fields.get("path")), fields)
            case "lfsFile":
                return self._large_file(names.path(fields.get("path")), fields)
            case "deletedFile":
                return Delete(names.path(fields.get("path")))
            case "deletedFolder":
                return DeleteFolder(names.folder(fields.get("path")))
            case "copyFile":
                revision = fields.get("srcRevision")
                if revision is not None and not (isinstance(revision, str) and names.is_commit(revision)):
                    revision = names.ref(revision)
                return Copy(names.path(fields.get("srcPath")), revision, names.path(fields.get("path")))
        raise errors.bad_request(f"Unknown change in a commit: {key!r}.")

    def _file(self, path: str, fields: dict[str, Any]) -> Put:
        content = fields.get("content")
        if not isinstance(content, str) or fields.get("encoding", "utf-8") not in {"utf-8", "base64"}:
            raise errors.bad_request(f"The content of {path!r} must be a text, in utf-8 or base64.")
        try:
            base64_ = fields.get("encoding") == "base64"
            data = base64.b64decode(content, validate=True) if base64_ else content.encode()
        except (binascii.Error, ValueError):
            raise errors.bad_request(f"The content of {path!r} cannot be decoded.") from None
        if len(data) > self.regular_bytes:
            text = (
                f"{path!r} has {len(data)} bytes: above {self.regular_bytes} a file must be sent as a large file (LFS)."
            )
            raise errors.too_large(text)
        pointer = Pointer.decode(data)
        if pointer is not None and not self.repo.lfs_path(pointer.sha256).is_file():
            raise errors.bad_request(f"LFS pointer pointed to a file that does not exist: {path!r}.")
        return Put(path, self.repo.objects.write("blob", data))

    def _large_file(self, path: str, fields: dict[str, Any]) -> Put:
        if fields.get("algo", "sha256") != "sha256":
            raise errors.bad_request("The only algorithm for large files is sha256.")
        oid = names.sha256(fields.get("oid"))
        try:
            size = self.repo.lfs_path(oid).stat().st_size
        except OSError:
            raise errors.bad_request(f"LFS pointer pointed to a file that does not exist: {path!r} ({oid}).") from None
        if fields.get("size", size) != size:
            raise errors.bad_request(f"{path!r} has {size} bytes, not {fields['size']}.")
        return Put(path, self.repo.objects.write("blob", Pointer(oid, size).encode()))


def _commit(request: Request, found: Repository, reader: CommitReader) -> Response:
    if reader.header is None:
        raise errors.bad_request("A commit begins with its header.")
    summary, description = reader.header.get("summary"), reader.header.get("description") or ""
    parent = reader.header.get("parentCommit")
    if not isinstance(summary, str) or not summary.strip() or not isinstance(description, str):
        raise errors.bad_request("A commit needs a summary.")
    if parent is not None and not (isinstance(parent, str) and names.is_commit(parent)):
        raise errors.bad_request("parentCommit is not a commit's full hash.")
    oid, pull = found.commit(
        request.path_params["revision"],
        reader.changes,
        author=caller(request).name,
        title=summary,
        body=description,
        parent=parent,
        pull_request=web.flag(request.query_params.get("create_pr", "")),
    )
    page = f"{base_url(request)}/{found.name.url_path}"
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "hookOutput": ""}
    if pull is not None:
        answer["pullRequestUrl"] = f"{page}/discussions/{pull}"
    return JSONResponse(answer)


async def _lines(body: AsyncIterator[bytes], longest: int) -> AsyncIterator[list[bytes]]:
    """The lines of a body, as many at a time as have arrived. Raises HubError(413) for one that is too long."""
    buffer = bytearray()
    searched = 0
    async for chunk in body:
        buffer += chunk
        end = buffer.rfind(b"\n", searched)
        if end >= 0:
            whole = bytes(buffer[:end])
            del buffer[: end + 1]
            yield whole.split(b"\n")
        searched = len(buffer)
        if searched > longest:
            raise errors.too_large("A regular file of this commit is too large: it must be sent as a large file (LFS).")
    yield [bytes(buffer)]


def _slot(request: Request) -> Slot:
    secret = hub(request).store.secret
    return Slot.parse(web.target(request).url_path, request.path_params["oid"], request.query_params, secret)


def _text(found: Repository, commit_: str, path: str) -> str:
    file = found.find(commit_, path)
    return describe.text(found, file if isinstance(file, File) else None) or ""


def _list(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = body.get(key)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise errors.bad_request(f'"{key}" must be a list of objects.')
    return value


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    at = "/api/{kind:kind}/{owner:part}/{name:part}"
    found = [
        route(f"{at}/preupload/{{revision:part}}", with_json(preupload), "POST"),
        route(f"{at}/commit/{{revision:part}}", commit, "POST"),
    ]
    for prefix in ("/{kind:kind}", ""):
        lfs = f"{prefix}/{{owner:part}}/{{name:part}}.git/info/lfs"
        found += [
            route(f"{lfs}/objects/batch", with_json(batch), "POST"),
            route(f"{lfs}/storage/{{oid}}", storage, "PUT"),
            route(f"{lfs}/complete/{{oid}}", with_json(complete), "POST"),
            route(f"{lfs}/verify", with_json(verify), "POST"),
        ]
    return found
