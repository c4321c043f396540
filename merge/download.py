"""Downloads that go on where they stopped, also after the process was killed, and are checked before they count.

huggingface_hub begins a file again when its process ended (since 2.x each download has a temporary file of its own), which for
a 5 GB shard on a slow line is an evening. So weights are fetched here, by plain HTTPS ranges through the client's own session,
into `<cache>/moerge/`. What the client's cache has already is linked instead.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from merge.errors import DestinationError, SourceError
from merge.files import has_checksum

# How often a transfer is taken up again without a byte having come, and the pause before the first time, in seconds.
ATTEMPTS = 5
PAUSE = 1.0
# Answers that may be others in a moment.
PASSING = (408, 425, 429, 500, 502, 503, 504)


def download(
    url: str,
    headers: Mapping[str, str],
    target: Path,
    *,
    size: int,
    checksum: str | None,
    advance: Callable[[int], None],
    offset: int = 0,
) -> None:
    """Fetch `url` from byte `offset` on to `target`, which then has `size` bytes and, where one is known, this checksum.

    An earlier attempt's bytes (`target.partial`) are kept and only the rest is asked for. Raises SourceError where what
    came is not the file, DestinationError where it cannot be written; httpx2 and huggingface_hub errors pass through.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if target.is_file() and target.stat().st_size == size:
        advance(size)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".partial")) as partial:
            if target.is_file() and target.stat().st_size == size:  # another process finished it while we waited
                advance(size)
                return
            have = min(partial.seek(0, 2), size)
            partial.truncate(have)
            advance(have)
            _transfer(url, headers, partial, size, advance, offset)
            _check(partial, target, checksum)
            Path(partial.name).rename(target)
    except HfHubHTTPError:  # an OSError too, but not of this machine
        raise
    except OSError as error:
        raise DestinationError(f"{target}: cannot be written ({error.strerror or error})") from None


def _transfer(
    url: str, headers: Mapping[str, str], file: BinaryIO, size: int, advance: Callable[[int], None], offset: int
) -> None:
    """Append what is missing of `size` bytes; a broken transfer is taken up again as long as it gets anywhere."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    failures = 0
    while (have := file.tell()) < size:
        try:
            for chunk in _stream(url, headers, offset + have, offset + size):
                file.write(chunk)
                advance(len(chunk))
            if file.tell() == have:
                raise httpx2.ReadError("nothing came")
        except (httpx2.TransportError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, HfHubHTTPError) and status not in PASSING:
                raise
            failures = failures + 1 if file.tell() == have else 1
            if failures >= ATTEMPTS:
                raise
            time.sleep(_pause(error, failures))


def _stream(url: str, headers: Mapping[str, str], start: int, stop: int) -> Iterator[bytes]:
    """The bytes of `url` from `start` to `stop`."""
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    left = stop - start
    with get_session().stream("GET", url, headers=asked, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        skip = start if response.status_code == 200 else 0  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():  # as they come: a chunk of some size would lose what a break leaves of it
            piece = chunk[skip:][:left]
            skip = max(0, skip - len(chunk))
            left -= len(piece)
            if piece:
                yield piece
            if not left:  # what follows is not asked for
                return


def _pause(error: Exception, failures: int) -> float:
    """Seconds to wait: what the server asks for, within reason, else longer each time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else PAUSE * 2 ** (failures - 1)


def _check(file: BinaryIO, target: Path, checksum: str | None) -> None:
    file.flush()
    if checksum is not None and not has_checksum(Path(file.name), checksum):
        file.truncate(0)  # nothing of it can be trusted
        raise SourceError(f"{target.name}: what was downloaded is not the file on the Hub (checksum); try again")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The partial file, open at its end and ours alone; a second process waits for the first."""
    while True:
        path.touch()
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The one before us may have finished and renamed the file we waited for.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.seek(0, 2)
                yield file
                return
