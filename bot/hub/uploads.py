"""Large files on their way in: signed addresses to send them to, and bodies checked as they stream.

Git LFS batch API (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md) with the Hub's multipart
extension: the upload action's header carries ``chunk_size`` and one address per part, and its address is where the
client reports completion. As with the real Hub's storage, the addresses need no token: they are signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool

from bot.hub import errors, names
from bot.hub.repository import Repository
from bot.hub.store import Store

_EXPIRES_SECONDS = 24 * 3600
_BUFFER_BYTES = 1 << 20
_MAX_PARTS = 10_000
MAX_BYTES = 1 << 40


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes: from `multipart` on a file is sent in parts of `part`; above `regular` it must be a large file."""

    multipart: int = 1 << 30
    part: int = 64 << 20
    regular: int = 10_000_000


@dataclass(frozen=True)
class Slot:
    """The right to send one object, or one part of it, to one repository."""

    url_path: str
    sha256: str
    size: int
    part: int  # 0: the object as a whole, or its completion
    stride: int  # bytes from the start of one part to the next
    expires: int
    upload: str  # name of the unfinished file under incoming/, for parts

    def query(self, secret: bytes) -> str:
        """The signed query string of this slot's address."""
        return urlencode({**self._fields(), "signature": self._signature(secret)})

    @classmethod
    def parse(cls, url_path: str, sha256: str, query: Any, secret: bytes) -> Slot:
        """The slot that a request names. Raises HubError(403) where the signature or the time is wrong."""
        try:
            numbers = {key: int(query[key]) for key in ("size", "part", "stride", "expires")}
            slot = cls(url_path, names.sha256(sha256), upload=query["upload"], **numbers)
            given = query["signature"]
        except (KeyError, ValueError):
            raise errors.forbidden("The upload address is not complete.") from None
        if not hmac.compare_digest(given.encode(), slot._signature(secret).encode()):
            raise errors.forbidden("The upload address was not made by this Hub.")
        if slot.expires < time.time():
            raise errors.forbidden("The upload address has expired.")
        return slot

    def _fields(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "part": self.part,
            "stride": self.stride,
            "expires": self.expires,
            "upload": self.upload,
        }

    def _signature(self, secret: bytes) -> str:
        text = "\0".join(["upload", self.url_path, self.sha256, *map(str, self._fields().values())])
        return hmac.new(secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def actions(
    store: Store, repository: Repository, base: str, item: Any, limits: Limits, multipart: bool
) -> dict[str, Any]:
    """The batch API's answer for one object: nothing to do where the repository has it, else where to send it.

    `base` is the address of the LFS routes, `multipart` whether the client knows parts. Raises HubError(400).
    """
    oid, size = object_of(item)
    answer: dict[str, Any] = {"oid": oid, "size": size}
    present = repository.lfs_path(oid)
    if present.is_file():
        if present.stat().st_size != size:
            raise errors.bad_request(f"The object {oid} is known, and its size is not {size}.")
        return answer
    url_path, expires = repository.name.url_path, int(time.time()) + _EXPIRES_SECONDS
    verify = {"href": f"{base}/verify"}
    if not multipart or size < limits.multipart:
        slot = Slot(url_path, oid, size, 0, 0, expires, "")
        upload: dict[str, Any] = {"href": f"{base}/storage/{oid}?{slot.query(store.secret)}"}
    else:
        part = max(limits.part, -(-size // _MAX_PARTS))
        count = -(-size // part)
        unfinished = store.temporary().name
        header = {"chunk_size": str(part)}
        for number in range(1, count + 1):
            length = min(part, size - part * (number - 1))
            slot = Slot(url_path, oid, length, number, part, expires, unfinished)
            header[f"{number:05}"] = f"{base}/storage/{oid}?{slot.query(store.secret)}"
        done = Slot(url_path, oid, size, 0, part, expires, unfinished)
        upload = {"href": f"{base}/complete/{oid}?{done.query(store.secret)}", "header": header}
    return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def object_of(item: Any) -> tuple[str, int]:
    """SHA-256 and size in bytes of an object in an LFS request. Raises HubError(400)."""
    if not isinstance(item, dict):
        raise errors.bad_request("An object with oid and size is expected.")
    size = item.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_BYTES:
        raise errors.bad_request("Invalid size.")
    return names.sha256(item.get("oid")), size


async def receive(store: Store, repository: Repository, slot: Slot, body: AsyncIterator[bytes]) -> None:
    """Take an object in one piece. It is kept only if size and SHA-256 are those announced: else HubError(400)."""
    temporary = store.temporary()
    try:
        digest = await _stream(body, temporary, 0, slot.size, os.O_CREAT | os.O_EXCL)
        if digest != slot.sha256:
            raise errors.bad_request(f"The content does not have the SHA-256 that was announced: {slot.sha256}.")
        await run_in_threadpool(_place, temporary, repository.lfs_path(slot.sha256))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


async def receive_part(store: Store, slot: Slot, body: AsyncIterator[bytes]) -> str:
    """Take one part of an object, at its place in the unfinished file; the part's ETag (its SHA-256)."""
    return await _stream(body, store.incoming / slot.upload, slot.stride * (slot.part - 1), slot.size, os.O_CREAT)


def complete(store: Store, repository: Repository, slot: Slot) -> None:
    """Accept the parts as one object: HubError(400) unless together they are the object that was announced."""
    target = repository.lfs_path(slot.sha256)
    temporary = store.incoming / slot.upload
    if target.is_file():  # the answer to an earlier completion was lost
        return
    try:
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    except FileNotFoundError:
        raise errors.bad_request("No part of this object has arrived.") from None
    if (size, digest) != (slot.size, slot.sha256):
        temporary.unlink(missing_ok=True)
        raise errors.bad_request(f"The parts together are not the object that was announced: {slot.sha256}.")
    _place(temporary, target)


async def _stream(body: AsyncIterator[bytes], path: Path, offset: int, size: int, flags: int) -> str:
    """Write exactly `size` bytes at `offset`; their SHA-256. Raises HubError(400) for any other number of bytes."""
    sha, received, buffer = hashlib.sha256(), 0, bytearray()
    descriptor = os.open(path, os.O_WRONLY | flags, 0o644)

    def flush(data: bytes, at: int) -> None:
        sha.update(data)
        view = memoryview(data)
        while view:
            count = os.pwrite(descriptor, view, at)
            view, at = view[count:], at + count

    try:
        async for chunk in body:
            buffer += chunk
            if received + len(buffer) > size:
                raise errors.bad_request(f"The content is longer than the {size} bytes that were announced.")
            if len(buffer) >= _BUFFER_BYTES:
                await _run(flush, bytes(buffer), offset + received)
                received += len(buffer)
                buffer.clear()
        await _run(flush, bytes(buffer), offset + received)
        received += len(buffer)
    finally:
        os.close(descriptor)
    if received != size:
        raise errors.bad_request(f"The content has {received} bytes, and {size} were announced.")
    return sha.hexdigest()


async def _run(function: Callable[[bytes, int], None], data: bytes, at: int) -> None:
    await run_in_threadpool(function, data, at)


def _place(temporary: Path, target: Path) -> None:
    """Move a checked object to its final name. Raises HubError(404) where the repository was deleted meanwhile."""
    try:
        target.parent.parent.mkdir(exist_ok=True)
        target.parent.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise errors.repo_not_found() from None
    temporary.chmod(0o444)
    temporary.replace(target)
