"""GGUF files on disk: several file types in one pass over the source, whole or split, with flat memory.

A file is written from front to back under a temporary name beside its own and renamed when all of it is on the disk, so
nothing half-written ever looks finished. Its space is claimed at the start: a full disk is known before the work, not after it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.errors import DestinationError, SourceError
from merge.large_file import LargeFile
from quants.filetypes import ALIGNMENT, TENSOR_TYPES, FileType, padded, tensor_bytes
from quants.header import header
from quants.kernels import encode, float32
from quants.layout import GgufTensor, Layout
from quants.mixtures import needs_importance
from quants.rows import Contents, row_count, rows
from quants.split import shard_paths, shards

# Elements that one thread takes at a time: 2 MiB as float32, so that memory is flat even with a hundred threads.
TASK_ELEMENTS = 1 << 19

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
class OpenFile:
    """A file under its temporary name, its header written. Its tensors follow in this order."""

    path: Path
    temporary: Path
    data: LargeFile
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenTarget:
    types: Mapping[str, str]
    files: tuple[OpenFile, ...]

    @property
    def places(self) -> dict[str, OpenFile]:
        return {name: file for file in self.files for name in file.tensors}


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
                files.append(cleanup.enter_context(begin(types, tensors, metadata, path, temporary)))
            opened.append(OpenTarget(types, tuple(files)))
        count = threads or len(os.sched_getaffinity(0))
        write_tensors(layout, contents, opened, count, progress or (lambda _: None), importance or {})
        for open_target in opened:
            # The first file, which makes the others usable, gets its name last.
            for file in reversed(open_target.files):
                with destination(file.path):
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


@contextlib.contextmanager
def begin(
    types: Mapping[str, str], tensors: Sequence[GgufTensor], metadata: Mapping[str, Any], path: Path, temporary: Path
) -> Iterator[OpenFile]:
    """A file with its header, open for the data of `tensors`, whose space is claimed."""
    head = header(metadata, tensors, types)
    size = sum(padded(tensor_bytes(types[tensor.name], tensor.expr.shape)) for tensor in tensors)
    with destination(path):
        opened = LargeFile(temporary)
    with opened:
        with destination(path):
            opened.reserve(len(head) + size)
            opened.write(memoryview(head))
        yield OpenFile(path, temporary, opened, tuple(tensor.name for tensor in tensors))


# A tensor, and the rows of it that one thread takes: start, stop.
_Task = tuple[GgufTensor, int, int]


def write_tensors(
    layout: Layout,
    contents: Contents,
    targets: Sequence[OpenTarget],
    threads: int,
    progress: Progress,
    importance: Importance,
) -> None:
    """Every tensor of every file, and all of it to the disk. Threads make the blocks, some rows each; they are written in order."""
    places = [target.places for target in targets]

    def encoded(tensor: GgufTensor, start: int, stop: int) -> dict[str, npt.NDArray[np.uint8]]:
        """The bytes of some rows in each of the types that they have."""
        values = rows(contents, tensor.expr, start, stop)
        kinds = dict.fromkeys(target.types[tensor.name] for target in targets)
        wide = float32(values) if any(TENSOR_TYPES[kind].elements > 1 for kind in kinds) else values
        weights = importance.get(tensor.name)
        if weights is not None and len(weights):
            weights = weights[start * len(weights) // row_count(tensor.expr)]
        try:
            return {kind: encode(wide if TENSOR_TYPES[kind].elements > 1 else values, kind, weights) for kind in kinds}
        except ValueError as error:
            raise SourceError(f"tensor {tensor.name} cannot be stored: {error}") from None

    def store(task: _Task, blocks: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        tensor, _, stop = task
        for target, of_target in zip(targets, places, strict=True):
            data, file = blocks[target.types[tensor.name]], of_target[tensor.name]
            with destination(file.path):
                file.data.write(data.data)
                if stop == row_count(tensor.expr):
                    file.data.pad(ALIGNMENT)
                    if tensor.name == file.tensors[-1]:
                        file.data.finish()
            progress(data.nbytes)

    with ThreadPoolExecutor(threads, thread_name_prefix="gguf") as pool:
        under_way: deque[tuple[_Task, Future[dict[str, npt.NDArray[np.uint8]]]]] = deque()
        try:
            for task in _tasks(layout.tensors):
                under_way.append((task, pool.submit(encoded, *task)))
                if len(under_way) > 2 * threads:
                    done, blocks = under_way.popleft()
                    store(done, blocks.result())
            while under_way:
                done, blocks = under_way.popleft()
                store(done, blocks.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tasks(tensors: Sequence[GgufTensor]) -> Iterator[_Task]:
    """Tensors in slices of whole rows, none of which reaches over two experts: each has its own importance."""
    for tensor in tensors:
        total = row_count(tensor.expr)
        matrices = tensor.expr.shape[0] if len(tensor.expr.shape) == 3 else 1
        height = total // matrices
        step = max(1, TASK_ELEMENTS // tensor.expr.shape[-1])
        for matrix in range(matrices):
            for start in range(0, height, step):
                yield tensor, matrix * height + start, matrix * height + min(start + step, height)


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
