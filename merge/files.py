"""Small things about files: written whole or not at all, errors in one sentence, checksums. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge.errors import DestinationError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{error.filename or what}: cannot be written ({error.strerror or error})") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_checksum(content: Path | bytes, checksum: str) -> bool:
    """Whether a file or its bytes have the checksum that the Hub tells: SHA-256 of a large file, git's blob id of another."""
    if len(checksum) != 64:
        return blob_id(content if isinstance(content, bytes) else content.read_bytes()) == checksum
    return (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)) == checksum


def blob_id(data: bytes) -> str:
    """git's name for a file with these bytes, in hexadecimal."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
