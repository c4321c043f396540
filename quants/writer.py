"""GGUF files on disk: several file types in one pass over the source, whole or split, with flat memory.

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
import numpy.typing as npt

from merge.errors import DestinationError, SourceError
from quants.filetypes import TENSOR_TYPES, FileType, padded, tensor_bytes
from quants.kernels import encode, float32
from quants.layout import GgufTensor, Layout
from quants.mixtures import needs_importance
from quants.rows import Contents, row_count, rows
from quants.split import shard_paths, shards

# Elements that one thread takes at a time: 4 MiB as float32, so that memory is flat even with a hundred threads.
TASK_ELEMENTS = 1 << 20

# Called with the bytes written since the last call.
Progress = Callable[[int], None]


# By GGUF tensor name the importance of each column: float32 (experts, or 1, row length).
Importance = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Target:
    """A file to be written: where, of what type, and with which metadata (gguf's GGUFValue by key).

    With `max_bytes` it is written in several, each with at most that much tensor data if its tensors allow.
    """

    path: Path
    file_type: FileType
    metadata: Mapping[str, Any]
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A file under its temporary name. `offsets` says where the data of its tensors begin."""

    path: Path
    temporary: Path
    descriptor: int
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OpenTarget:
    types: Mapping[str, str]
    files: tuple[_OpenFile, ...]

    @property
    def places(self) -> dict[str, _OpenFile]:
        return {name: file for file in self.files for name in file.offsets}


def write_ggufs(
    layout: Layout,
    contents: Contents,
    targets: Sequence[Target],
    progress: Progress | None = None,
    threads: int | None = None,
    importance: Importance | None = None,
) -> list[list[Path]]:
    """Writes all `targets`, evaluating every tensor once; returns the files of each.

    `threads` is one per processor unless given. Raises DestinationError where a file cannot be written and SourceError
    where a tensor cannot be stored; then none of the targets is there, and no partial file is left.
    """
    with contextlib.ExitStack() as cleanup:
        opened: list[OpenTarget] = []
        for target in targets:
            types = layout.types(target.file_type, importance is not None)
            _require_importance(target.file_type, types, importance)
            parts = shards(layout, types, target.max_bytes)
            files = []
            for index, (path, tensors) in enumerate(zip(shard_paths(target.path, len(parts)), parts, strict=True)):
                temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
                cleanup.callback(temporary.unlink, missing_ok=True)
                metadata = shard_metadata(target.metadata, index, len(parts), len(layout.tensors))
                with destination(path):
                    files.append(begin(layout, types, tensors, metadata, path, temporary))
                cleanup.callback(os.close, files[-1].descriptor)
            opened.append(OpenTarget(types, tuple(files)))
        count = threads or len(os.sched_getaffinity(0))
        write_tensors(layout, contents, opened, count, progress or (lambda _: None), importance or {})
        for open_target in opened:
            # The first file, which makes the others usable, gets its name last.
            for file in reversed(open_target.files):
                with destination(file.path):
                    os.fsync(file.descriptor)
                    file.temporary.rename(file.path)
        for folder in {target.path.parent for target in targets}:
            _sync_folder(folder)
    return [[file.path for file in open_target.files] for open_target in opened]


def _require_importance(file_type: FileType, types: Mapping[str, str], importance: Importance | None) -> None:
    for name, kind in types.items():
        if needs_importance(file_type, name, kind) and name not in (importance or {}):
            raise SourceError(
                f"{file_type.name} needs an importance matrix, and there is none for {name}; make one with --imatrix"
            )


def shard_metadata(metadata: Mapping[str, Any], index: int, count: int, tensors: int) -> dict[str, Any]:
    """The first file of a split one has all the metadata, each says which it is."""
    from gguf import GGUFValue, GGUFValueType

    if count == 1:
        return dict(metadata)
    split = {
        "split.no": GGUFValue(index, GGUFValueType.UINT16),
        "split.count": GGUFValue(count, GGUFValueType.UINT16),
        "split.tensors.count": GGUFValue(tensors, GGUFValueType.INT32),
    }
    return {**(metadata if index == 0 else {}), **split}


def begin(
    layout: Layout,
    types: Mapping[str, str],
    tensors: Sequence[GgufTensor],
    metadata: Mapping[str, Any],
    path: Path,
    temporary: Path,
) -> _OpenFile:
    """Writes header, metadata and tensor list, and claims the space of the data."""
    import gguf

    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.kv_data[0] = dict(metadata)
    relative: dict[str, int] = {}
    size = 0
    for tensor in tensors:
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
    return _OpenFile(path, temporary, descriptor, {name: start + offset for name, offset in relative.items()})


def write_tensors(
    layout: Layout,
    contents: Contents,
    targets: Sequence[OpenTarget],
    threads: int,
    progress: Progress,
    importance: Importance,
) -> None:
    """Every tensor of every file, in tasks of some rows each; tasks know their place, so their order does not matter."""
    places = [target.places for target in targets]

    def task(tensor: GgufTensor, start: int, stop: int) -> int:
        values = rows(contents, tensor.expr, start, stop)
        kinds = {target.types[tensor.name] for target in targets}
        wide = float32(values) if any(TENSOR_TYPES[kind].elements > 1 for kind in kinds) else values
        weights = importance.get(tensor.name)
        if weights is not None and len(weights):
            weights = weights[start * len(weights) // row_count(tensor.expr)]
        written = 0
        encoded = {}
        for target, of_target in zip(targets, places, strict=True):
            kind, file = target.types[tensor.name], of_target[tensor.name]
            if kind not in encoded:
                try:
                    encoded[kind] = encode(wide if TENSOR_TYPES[kind].elements > 1 else values, kind, weights)
                except ValueError as error:
                    raise SourceError(f"tensor {tensor.name} cannot be stored: {error}") from None
            row = tensor_bytes(kind, tensor.expr.shape[-1:])
            with destination(file.path):
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
    """Tensors in slices of whole rows, none of which reaches over two experts: each has its own importance."""
    for tensor in tensors:
        total = row_count(tensor.expr)
        matrices = tensor.expr.shape[0] if len(tensor.expr.shape) == 3 else 1
        height = total // matrices
        step = max(1, TASK_ELEMENTS // tensor.expr.shape[-1])
        for matrix in range(matrices):
            for start in range(0, height, step):
                yield tensor, matrix * height + start, matrix * height + min(start + step, height)


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
def destination(path: Path) -> Iterator[None]:
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
