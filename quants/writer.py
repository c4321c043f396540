"""GGUF files on disk: several file types in one pass over the source, with flat memory.

A file is written under a temporary name beside its own and renamed when all of it is on the disk, so nothing half-written
ever looks finished. Its space is claimed at the start: a full disk is known before the work, not after it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.errors import DestinationError, SourceError
from merge.evaluate import Evaluator
from quants.filetypes import FileType, padded, tensor_bytes
from quants.kernels import encode
from quants.layout import GgufTensor, Layout
from quants.rows import row_count, rows

# Elements that one thread takes at a time: 4 MiB as float32, so that memory is flat even with a hundred threads.
TASK_ELEMENTS = 1 << 20

# Called with the bytes written since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A file to be written: where, of what type, and with which metadata (gguf's GGUFValue by key)."""

    path: Path
    file_type: FileType
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    types: Mapping[str, str]
    offsets: Mapping[str, int]


def write_gguf(
    layout: Layout,
    metadata: Mapping[str, Any],
    evaluator: Evaluator,
    path: Path,
    file_type: FileType,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Writes one file; see write_ggufs."""
    write_ggufs(layout, evaluator, [Target(path, file_type, metadata)], progress, threads)


def write_ggufs(
    layout: Layout,
    evaluator: Evaluator,
    targets: Sequence[Target],
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Writes all `targets`, evaluating every tensor once.

    `threads` is one per processor unless given. Raises DestinationError where a file cannot be written and SourceError
    where a tensor cannot be stored; then none of the targets is there, and no partial file is left.
    """
    with contextlib.ExitStack() as cleanup:
        partial: list[tuple[Path, Target]] = []
        files: list[_OpenFile] = []
        for target in targets:
            temporary = target.path.with_name(f".{target.path.name}.{secrets.token_hex(4)}.part")
            cleanup.callback(temporary.unlink, missing_ok=True)
            with _destination(target.path):
                files.append(_begin(layout, target, temporary))
            cleanup.callback(os.close, files[-1].descriptor)
            partial.append((temporary, target))
        count = threads or len(os.sched_getaffinity(0))
        _write_tensors(layout, evaluator, list(zip(targets, files, strict=True)), count, progress or (lambda _: None))
        for (temporary, target), file in zip(partial, files, strict=True):
            with _destination(target.path):
                os.fsync(file.descriptor)
                temporary.rename(target.path)
        for folder in {target.path.parent for target in targets}:
            _sync_folder(folder)


def _begin(layout: Layout, target: Target, temporary: Path) -> _OpenFile:
    """Writes header, metadata and tensor list, and claims the space of the data."""
    import gguf

    types = layout.types(target.file_type)
    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.kv_data[0] = dict(target.metadata)
    relative: dict[str, int] = {}
    size = 0
    for tensor in layout.tensors:
        nbytes = tensor_bytes(types[tensor.name], tensor.expr.shape)
        kind = gguf.GGMLQuantizationType[types[tensor.name]]
        # With the dtype of one element named, the shape is taken in elements.
        writer.add_tensor_info(tensor.name, tensor.expr.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        relative[tensor.name] = size
        size += padded(nbytes)
    writer.write_header_to_file(temporary)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        start = padded(os.fstat(descriptor).st_size)
        os.posix_fallocate(descriptor, 0, start + size)
    except BaseException:
        os.close(descriptor)
        raise
    return _OpenFile(descriptor, types, {name: start + offset for name, offset in relative.items()})


def _write_tensors(
    layout: Layout,
    evaluator: Evaluator,
    files: Sequence[tuple[Target, _OpenFile]],
    threads: int,
    progress: Progress,
) -> None:
    """Every tensor of every file, in tasks of some rows each; tasks know their place, so their order does not matter."""

    def task(tensor: GgufTensor, start: int, stop: int) -> int:
        values = rows(evaluator, tensor.expr, start, stop)
        written = 0
        encoded = {}
        for target, file in files:
            kind = file.types[tensor.name]
            if kind not in encoded:
                try:
                    encoded[kind] = encode(values, kind)
                except ValueError as error:
                    raise SourceError(f"tensor {tensor.name} cannot be stored: {error}") from None
            row = tensor_bytes(kind, tensor.expr.shape[-1:])
            with _destination(target.path):
                _write_all(file.descriptor, encoded[kind].data, file.offsets[tensor.name] + start * row)
            written += encoded[kind].nbytes
        return written

    with ThreadPoolExecutor(threads, thread_name_prefix="gguf") as pool:
        pending: set[Future[int]] = set()
        try:
            for work in _tasks(layout.tensors):
                pending.add(pool.submit(task, *work))
                if len(pending) > 2 * threads:
                    pending = _collect(pending, progress)
            while pending:
                pending = _collect(pending, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tasks(tensors: Sequence[GgufTensor]) -> Iterator[tuple[GgufTensor, int, int]]:
    for tensor in tensors:
        total = row_count(tensor.expr)
        step = max(1, TASK_ELEMENTS // tensor.expr.shape[-1])
        for start in range(0, total, step):
            yield tensor, start, min(start + step, total)


def _collect(pending: set[Future[int]], progress: Progress) -> set[Future[int]]:
    """Waits for some tasks, reports what they wrote, and returns the others. Raises what a task raised."""
    done, others = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        progress(future.result())
    return others


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _destination(path: Path) -> Iterator[None]:
    """Turns the system's errors on writing `path` into a sentence."""
    try:
        yield
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written ({error.strerror or error})") from None


def _sync_folder(folder: Path) -> None:
    """Makes the renames in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
