"""Files on their way out: whole or one range of bytes, streamed (RFC 9110, section 14)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_CHUNK_BYTES = 1 << 20


class NotSatisfiable(Exception):
    """The range lies outside the file: status 416."""


def parse_range(header: str | None, size: int) -> range | None:
    """The bytes that a ``Range`` header asks for of a file of `size` bytes; None for all of it.

    A header with several ranges, or in another unit, is ignored, as a server may. Raises NotSatisfiable.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":  # the last so many bytes
        count = min(int(match[2]), size)
        if count == 0:
            raise NotSatisfiable
        return range(size - count, size)
    first = int(match[1])
    last = min(int(match[2]), size - 1) if match[2] else size - 1
    if match[2] and int(match[2]) < first:
        return None  # not a valid range: ignored
    if first >= size:
        raise NotSatisfiable
    return range(first, last + 1)


def respond(
    source: Path | bytes, size: int, request_headers: Mapping[str, str], headers: Mapping[str, str], media_type: str
) -> Response:
    """A response with the content of a file, or with the part that the request's ``Range`` asks for.

    `headers` carry the ETag; ``If-Range`` and ``If-None-Match`` are compared with it. Starlette leaves the body of
    a HEAD request out by itself.
    """
    etag = headers["ETag"]
    common = {**headers, "Accept-Ranges": "bytes"}
    if request_headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=common)
    asked = request_headers.get("range") if request_headers.get("if-range", etag) == etag else None
    try:
        part = parse_range(asked, size)
    except NotSatisfiable:
        return Response(status_code=416, headers={**common, "Content-Range": f"bytes */{size}"})
    wanted = range(size) if part is None else part
    common["Content-Length"] = str(len(wanted))
    status = 200
    if part is not None:
        status, common["Content-Range"] = 206, f"bytes {part.start}-{part.stop - 1}/{size}"
    if isinstance(source, bytes):
        return Response(source[wanted.start : wanted.stop], status, common, media_type)
    return _FileStream(source, wanted, status, common, media_type)


class _FileStream(StreamingResponse):
    """A slice of a file; for HEAD the headers alone."""

    def __init__(self, path: Path, part: range, status: int, headers: Mapping[str, str], media_type: str) -> None:
        # Opened now: a file deleted while it is sent is still sent to its end, and one that is gone is a 404.
        self._descriptor = os.open(path, os.O_RDONLY)
        super().__init__(_chunks(self._descriptor, part), status, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                await super().__call__(scope, receive, send)
        finally:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)


async def _chunks(descriptor: int, part: range) -> AsyncIterator[bytes]:
    position = part.start
    while position < part.stop:
        data = await run_in_threadpool(os.pread, descriptor, min(_CHUNK_BYTES, part.stop - position), position)
        if not data:
            raise EOFError("the file is shorter than it was")
        position += len(data)
        yield data
