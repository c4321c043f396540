"""Writes a plan as a checkpoint: `model-0000N-of-0000M.safetensors`, the index, config.json, and the files copied along.

Where an output tensor is a bare read, its bytes go from file to file untouched, inside the kernel where it can; everything
else is evaluated slice by slice. Memory stays flat whatever the model's size. The checkpoint grows in a folder named
`<name>.partial`, which becomes `<name>` when all of it is on the disk: nothing half-written looks finished. A run that was cut
off goes on behind the last finished shard.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from merge.checkpoint import INDEX, SINGLE, Checkpoint
from merge.errors import DestinationError, SourceError
from merge.evaluate import Evaluator
from merge.expr import Read, nbytes, pieces
from merge.files import sync_folder, write_atomically, writing
from merge.plan import MergePlan, OutputTensor

# Shards of at most this many bytes: the size the Hub's own tools use.
SHARD_BYTES = 5 * 10**9
COPY_BYTES = 8 << 20
# Names the plan and gates a partial folder belongs to; removed before the folder gets its name.
MARKER = ".moerge-merge"


def write_checkpoint(
    plan: MergePlan,
    base: Checkpoint,
    evaluator: Evaluator,
    out: Path,
    *,
    gates_key: str,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the checkpoint of `plan` to the new folder `out`. `base` is the plan's base with its files on this machine.

    `advance` is told of bytes written. Raises DestinationError where `out` exists or cannot be written, SourceError where a
    source cannot be read to its end.
    """
    if out.exists():
        raise DestinationError(f"{out}: exists already; choose another folder, or remove it to merge again")
    partial = out.with_name(out.name + ".partial")
    with writing(out):
        _prepare(partial, f"{plan.identity()} {gates_key} {shard_bytes}")
        shards = _shards(plan.tensors, shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = shard_name(number, len(shards))
            if (partial / name).exists():
                advance(sum(nbytes(tensor.expr) for tensor in shard))
            else:
                _write_shard(shard, evaluator, partial / name, advance)
        if len(shards) > 1:
            weight_map = {t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards, 1) for t in shard}
            index = {"metadata": {"total_size": plan.checkpoint_bytes}, "weight_map": weight_map}
            write_atomically(partial / INDEX, _json(index))
        assert base.folder is not None
        for companion in plan.companions:
            _copy_companion(base.folder / companion, partial / companion)
        write_atomically(partial / "config.json", _json(dict(plan.config)))
        (partial / MARKER).unlink()
        partial.rename(out)
        sync_folder(out.parent)


def shard_name(number: int, count: int) -> str:
    """The Hub's name of shard `number` of `count`."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _prepare(partial: Path, identity: str) -> None:
    """An empty partial folder, or the one that an earlier run of the same merge left."""
    marker = partial / MARKER
    if not (marker.is_file() and marker.read_text(encoding="utf-8") == identity):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        marker.write_text(identity, encoding="utf-8")
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()


def _shards(tensors: tuple[OutputTensor, ...], shard_bytes: int) -> list[list[OutputTensor]]:
    """Tensors in order, cut where the next one would make a shard larger than `shard_bytes`."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + nbytes(tensor.expr) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes(tensor.expr)
    return shards


def _write_shard(tensors: list[OutputTensor], evaluator: Evaluator, path: Path, advance: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + nbytes(tensor.expr)
        header[tensor.name] = {
            "dtype": tensor.expr.dtype,
            "shape": list(tensor.expr.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned to eight bytes
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            for piece in pieces(tensor.expr):
                if isinstance(piece, Read):
                    _copy_bytes(*evaluator.files[piece.source].place(piece.tensor), file.fileno(), advance)
                    continue
                for part in evaluator.slices(piece):
                    data = memoryview(part.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
                    _write_all(file.fileno(), data)
                    advance(data.nbytes)
        os.fsync(file.fileno())
    temporary.rename(path)


def _copy_bytes(source: Path, start: int, count: int, target: int, advance: Callable[[int], None]) -> None:
    """Append `count` bytes of `source` from `start` to the file descriptor `target`."""
    try:
        with source.open("rb", buffering=0) as file:
            in_kernel = True
            while count:
                wanted = min(count, COPY_BYTES)
                if in_kernel:
                    try:
                        done = os.copy_file_range(file.fileno(), target, wanted, offset_src=start)
                    except OSError:
                        # Two file systems, or one that cannot; a real fault shows again in the plain copy.
                        in_kernel = False
                        continue
                else:
                    data = os.pread(file.fileno(), wanted, start)
                    _write_all(target, memoryview(data))
                    done = len(data)
                if done == 0:
                    raise SourceError(f"{source}: ended {count} bytes early; it is truncated or was changed meanwhile")
                start, count = start + done, count - done
                advance(done)
    except FileNotFoundError:
        raise SourceError(f"{source}: is not there any more") from None


def _write_all(target: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(target, data) :]


def _copy_companion(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from None
    write_atomically(target, data)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
