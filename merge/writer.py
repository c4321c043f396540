"""Writes a plan as a checkpoint: `model-0000N-of-0000M.safetensors`, the index, config.json, and the files copied along.

Where an output tensor is a bare read, its bytes go from file to file untouched; everything else is evaluated slice by slice.
Memory stays flat whatever the model's size. The checkpoint grows in a folder named `<name>.partial`, which becomes `<name>`
when all of it is on the disk: nothing half-written looks finished. A run that was cut off goes on behind the last finished
shard.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from merge.checkpoint import INDEX, SINGLE, Checkpoint
from merge.errors import DestinationError, MoergeError, SourceError
from merge.expr import Expr, Read, nbytes, pieces
from merge.files import sync_folder, write_atomically, writing
from merge.large_file import LargeFile
from merge.plan import MergePlan, OutputTensor
from merge.source_files import Files, fill

# Shards of at most this many bytes: the size the Hub's own tools use.
SHARD_BYTES = 5 * 10**9
# Names the plan and gates a folder belongs to, until all of it is there.
MARKER = ".moerge-merge"


class Contents(Protocol):
    """The bytes that a plan's expressions stand for: a `merge.stored.Stored`, or a `merge.evaluate.Evaluator`."""

    files: Mapping[str, Files]

    def stored(self, x: Expr, /) -> Iterator[memoryview]: ...


def write_checkpoint(
    plan: MergePlan,
    base: Checkpoint,
    contents: Contents,
    out: Path,
    *,
    gates_key: str,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
    clean_up: Callable[[], None] = lambda: None,
) -> None:
    """Write the checkpoint of `plan` to the new folder `out`. `base` is the plan's base with its files on this machine.

    `advance` is told of bytes written. `clean_up` is called when all of it is there, and again where a run was ended before
    it could say so. Raises DestinationError where `out` exists or cannot be written, SourceError where a
    source cannot be read to its end or changes meanwhile.
    """
    partial, identity = out.with_name(out.name + ".partial"), f"{plan.identity()} {gates_key} {shard_bytes}"
    if out.exists() and _marked(out) != identity:
        raise DestinationError(f"{out}: exists already; choose another folder, or remove it to merge again")
    with writing(out):
        if not out.exists():
            _prepare(partial, identity)
            _write_shards(plan, contents, partial, shard_bytes, advance)
            _write_small_files(plan, base, partial, shard_bytes)
            partial.rename(out)
        sync_folder(out.parent)
        clean_up()
        (out / MARKER).unlink()


def is_cut_off(out: Path) -> bool:
    """Whether `out` is a merge's folder with everything in it, whose run was ended before it could say so."""
    return _marked(out) is not None


def shard_name(number: int, count: int) -> str:
    """The Hub's name of shard `number` of `count`."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _marked(folder: Path) -> str | None:
    """The merge that a folder belongs to, if it is not done."""
    marker = folder / MARKER
    return marker.read_text(encoding="utf-8") if marker.is_file() else None


def _prepare(partial: Path, identity: str) -> None:
    """An empty partial folder, or the one that an earlier run of the same merge left."""
    if _marked(partial) != identity:
        if partial.exists():
            if _marked(partial) is None and any(path.name != f"{MARKER}.tmp" for path in partial.iterdir()):
                raise DestinationError(f"{partial}: is not a merge's; move it away, or choose another folder")
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_atomically(partial / MARKER, identity.encode())
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()


def _write_shards(
    plan: MergePlan, contents: Contents, partial: Path, shard_bytes: int, advance: Callable[[int], None]
) -> None:
    shards = shards_of(plan.tensors, shard_bytes)
    paths = [partial / shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    sizes = [sum(nbytes(tensor.expr) for tensor in shard) for shard in shards]
    _check_space(partial, sum(size for path, size in zip(paths, sizes, strict=True) if not path.exists()))
    for shard, path, size in zip(shards, paths, sizes, strict=True):
        if path.exists():
            advance(size)
        else:
            write_shard(shard, contents, path, advance)


def _check_space(folder: Path, needed: int) -> None:
    """Said before anything is copied, where it is certain: not every file system tells its free space."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:
        raise DestinationError(
            f"{folder}: {needed / 1e9:.1f} GB are to be written, and {disk.free / 1e9:.1f} GB are free there; "
            "make room, or choose a folder on another disk"
        )


def shards_of(tensors: tuple[OutputTensor, ...], shard_bytes: int) -> list[list[OutputTensor]]:
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


def write_shard(tensors: list[OutputTensor], contents: Contents, path: Path, advance: Callable[[int], None]) -> None:
    """Write a shard; it has its name only when all of it is on the disk. On an error nothing of it is left."""
    temporary = path.with_suffix(".tmp")
    try:
        with LargeFile(temporary) as file:
            file.write(_header(tensors))
            for tensor in tensors:
                for piece in pieces(tensor.expr):
                    if isinstance(piece, Read):
                        _copy(contents.files, piece, file, advance)
                    else:
                        for data in contents.stored(piece):
                            file.write(data)
                            advance(data.nbytes)
            for source in contents.files.values():
                source.check_unchanged()
            file.finish()
    except (MoergeError, OSError):
        with suppress(OSError):
            temporary.unlink()
        raise
    temporary.rename(path)


def _header(tensors: list[OutputTensor]) -> memoryview:
    """What a safetensors file begins with. Format: https://huggingface.co/docs/safetensors/index#format"""
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
    return memoryview(struct.pack("<Q", len(raw)) + raw)


def _copy(files: Mapping[str, Files], piece: Read, file: LargeFile, advance: Callable[[int], None]) -> None:
    """Append the bytes of a source's tensor, or of a part of it, to a file."""
    done, size = 0, nbytes(piece)
    while done < size:
        place = file.space()[: size - done]
        fill(files, piece, place, done)
        file.filled(place.nbytes)
        advance(place.nbytes)
        done += place.nbytes


def _write_small_files(plan: MergePlan, base: Checkpoint, partial: Path, shard_bytes: int) -> None:
    shards = shards_of(plan.tensors, shard_bytes)
    if len(shards) > 1:
        weight_map = {t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards, 1) for t in shard}
        index = {"metadata": {"total_size": plan.checkpoint_bytes}, "weight_map": weight_map}
        write_atomically(partial / INDEX, _json(index))
    write_described(plan, base, partial)


def write_described(plan: MergePlan, base: Checkpoint, folder: Path) -> None:
    """Write all of a checkpoint but its weights into `folder`: config.json, tokenizer, and what else the base brings along.

    Raises SourceError where a file of `base`, the plan's base on this machine, cannot be read.
    """
    assert base.folder is not None
    for companion in plan.companions:
        _copy_companion(base.folder / companion, folder / companion)
    write_atomically(folder / "config.json", _json(dict(plan.config)))


def _copy_companion(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from None
    write_atomically(target, data)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
