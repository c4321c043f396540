"""A large new file, written from front to back past the page cache.

A checkpoint is as large as memory or larger. Through the page cache each of its bytes is copied once more, takes a page that
held something useful, and waits there for the kernel to write it back; `cp` does that. Here bytes are gathered in a few
buffers, which go to the disk as they are (O_DIRECT) while the next one is being filled. Where a file system has no such way,
they are written as usual.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

# As much as the kernel hands to a disk at once, or more; a multiple of every disk's block, and small enough to stay in the
# processor's cache: with four times as much the same file took a third longer.
BUFFER_BYTES = 1 << 20
# One is filled while the others are on their way.
BUFFERS = 4
O_DIRECT = getattr(os, "O_DIRECT", 0)


class LargeFile:
    """The new file `path`, open for writing within a `with`. Errors are the operating system's (OSError).

    The next bytes go where `space` says, and `filled` tells how many did. Without `finish` the file is not whole.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)
        self._pool = ThreadPoolExecutor(BUFFERS - 1)
        self._under_way: deque[tuple[Future[None], memoryview]] = deque()
        self._free = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(BUFFERS)]  # aligned, as O_DIRECT asks
        self._buffer = self._free.pop()
        self._start = self._used = 0

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)

    def reserve(self, count: int) -> None:
        """Claim the space of a file of `count` bytes."""
        # Where a file system has no such call the C library writes single bytes, which none takes past the page cache.
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~O_DIRECT)
        os.posix_fallocate(self._descriptor, 0, count)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)

    def space(self) -> memoryview:
        """Where the next bytes go: some of them, at least one."""
        if self._used == BUFFER_BYTES:
            self._send()
        return self._buffer[self._used :]

    def filled(self, count: int) -> None:
        """The first `count` bytes of `space` are there now."""
        self._used += count

    def write(self, data: memoryview) -> None:
        """Append `data`, bytes."""
        while data.nbytes:
            space = self.space()
            count = min(data.nbytes, space.nbytes)
            space[:count] = data[:count]
            self.filled(count)
            data = data[count:]

    def pad(self, alignment: int) -> None:
        """Append zeros up to a multiple of `alignment`."""
        self.write(memoryview(bytes(-(self._start + self._used) % alignment)))

    def finish(self) -> None:
        """Bring all of it to the disk, and let the buffers go."""
        for written, _ in self._under_way:
            written.result()
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)  # the last bytes fill no block
        self._write(self._buffer[: self._used], self._start)
        os.fsync(self._descriptor)
        self._under_way.clear()
        self._free.clear()
        self._buffer = memoryview(b"")

    def _send(self) -> None:
        """Send the buffer on its way and take another one."""
        self._under_way.append((self._pool.submit(self._write, self._buffer, self._start), self._buffer))
        self._start, self._used = self._start + self._used, 0
        if self._free:
            self._buffer = self._free.pop()
        else:
            written, self._buffer = self._under_way.popleft()
            written.result()

    def _write(self, data: memoryview, start: int) -> None:
        while data.nbytes:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            try:
                count = os.pwrite(self._descriptor, data, start)
            except OSError as error:
                if error.errno != errno.EINVAL or not flags & O_DIRECT:
                    raise
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~O_DIRECT)
                continue
            data, start = data[count:], start + count
