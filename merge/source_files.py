"""The bytes of a source's tensors on this machine: read for copying and for slices, memory-mapped for whole weights.

A mapping costs no memory of its own and no copy, but a file that shrinks under it ends the process with a signal where
numbers are read from it. So slices, which is how a merge does its arithmetic, are read.
No torch is imported before a number is asked for.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from merge.checkpoint import Checkpoint
from merge.dtypes import SIZES, TORCH_TYPE
from merge.errors import SourceError
from merge.expr import Read
from merge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

# Up to so many bytes are read, more are mapped.
READ_BYTES = 64 << 20
# Linux's, which Python's mmap names from 3.13 on.
MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class _Open:
    """An open file, what it was when it was opened, and its bytes."""

    path: Path
    descriptor: int
    stamp: tuple[int, int, int]
    map: mmap.mmap


class Files:
    """The bytes of one checkpoint's tensors, in a local folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.folder is None or checkpoint.tensors is None:
            raise SourceError(f"{checkpoint.name}: its weights are not on this machine")
        self._checkpoint = checkpoint
        self._folder = checkpoint.folder
        self._tensors: Mapping[str, TensorInfo] = checkpoint.tensors
        self._opened: dict[str, _Open] = {}
        weakref.finalize(self, _close, self._opened)

    def fill(self, place: memoryview, tensor: str, start: int) -> None:
        """Fill `place` with the bytes of `tensor` from `start` on. Raises SourceError where they are not there."""
        _, file, begin = self._place(tensor)
        _fill(place, file, begin + start)

    def flat(self, tensor: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `tensor` in its own dtype, flattened; not to be written to."""
        import torch

        info, file, begin = self._place(tensor)
        dtype, size = getattr(torch, TORCH_TYPE[info.dtype]), SIZES[info.dtype]
        if start == stop:
            return torch.empty(0, dtype=dtype)
        offset, count = begin + start * size, (stop - start) * size
        # The old pickle layout does not align its tensors, and a view must be aligned.
        if count <= READ_BYTES or offset % size:
            return torch.frombuffer(_read(file, offset, count), dtype=dtype)
        if os.fstat(file.descriptor).st_size < offset + count:
            raise _truncated(file.path)
        return torch.frombuffer(file.map, dtype=dtype, count=stop - start, offset=offset)

    def check_unchanged(self) -> None:
        """Raise SourceError where a file that was read from is not any more what it was."""
        for file in self._opened.values():
            try:
                now = _stamp(file.path.stat())
            except OSError:
                now = None
            if now != file.stamp:
                raise SourceError(f"{file.path}: was changed while it was being read; run again when it is at rest")

    def _place(self, tensor: str) -> tuple[TensorInfo, _Open, int]:
        info = self._tensors.get(tensor)
        if info is None:
            raise SourceError(f"{self._checkpoint.name}: tensor {tensor!r} is not in it any more")
        assert info.file is not None
        assert info.start is not None
        return info, self._open(info.file), info.start

    def _open(self, file: str) -> _Open:
        if file not in self._opened:
            path = self._folder / file
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
            status = os.fstat(descriptor)
            if status.st_size != self._checkpoint.files.get(file, status.st_size):
                os.close(descriptor)
                raise _truncated(path)
            # Private pages, because torch wants writable ones; nothing ever writes to them, so no memory is set aside.
            flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(descriptor, status.st_size, flags=flags, prot=protection)
            self._opened[file] = _Open(path, descriptor, _stamp(status), mapped)
        return self._opened[file]


def fill(files: Mapping[str, Files], read: Read, place: memoryview, start: int) -> None:
    """Fill `place` with the bytes of an expression's Read from byte `start` of it on: of a tensor, or of a part of one."""
    files[read.source].fill(place, read.tensor, read.start * SIZES[read.dtype] + start)


def open_files(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Files]:
    """The bytes of each checkpoint of a plan, local by now or fetched tensor by tensor."""
    return {key: _open_one(checkpoint) for key, checkpoint in checkpoints.items()}


def _open_one(checkpoint: Checkpoint) -> Files:
    if checkpoint.ranges is None:
        return Files(checkpoint)
    from merge.ranged import RangedFiles

    return RangedFiles(checkpoint, checkpoint.ranges)


def _read(file: _Open, offset: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    data = np.empty(count, dtype=np.uint8)
    _fill(data.data, file, offset)
    return data


def _fill(place: memoryview, file: _Open, offset: int) -> None:
    done = 0
    while done < place.nbytes:
        try:
            got = os.preadv(file.descriptor, [place[done:]], offset + done)
        except OSError as error:
            raise SourceError(f"{file.path}: cannot be read ({error.strerror})") from None
        if got == 0:
            raise _truncated(file.path)
        done += got


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _truncated(path: Path) -> SourceError:
    return SourceError(f"{path}: is not as long as it was; it is truncated or was changed meanwhile")


def _close(opened: dict[str, _Open]) -> None:
    for file in opened.values():
        os.close(file.descriptor)
