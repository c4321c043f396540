"""How much disk a build takes, worked out from headers: each output file in turn, and the source tensors that are held for it.

Under `max_disk` every shard and every part of a GGUF file is one `Item`: its source tensors are fetched, it is written,
uploaded and deleted. Items are taken in the order of the layers they hold, so that a source tensor is fetched once and let go
when the last item that reads it is done. What does not fit goes early, and is fetched again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bot.quants import SMALL_PARTS
from merge.checkpoint import Checkpoint
from merge.errors import UsageError
from merge.expr import nbytes, reads
from merge.plan import MergePlan, OutputTensor
from merge.ranged import RECENT, Key, bytes_of
from merge.recipe import DISCRIMINANT, RANDOM_GATES
from merge.writer import shard_name, shards_of
from quants.families import first_moe_layer
from quants.filetypes import FILE_TYPES
from quants.layout import gguf_layout, wants_imatrix
from quants.split import SplitFile, sources_of

# Beside weights: logs, headers, cards, what the file system takes for itself.
MARGIN = 8_000_000
# The smallest parts that are tried, and the most files that a release may be cut into.
SMALLEST, MOST = 1 << 20, 2000
# At most about what a tensor takes in a safetensors header.
HEADER_BYTES = 256
TWIN = ".twin"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """An output file: its name, its size in bytes at most, and the source tensors that it reads."""

    name: str
    bytes: int
    reads: frozenset[Key]


@dataclass(frozen=True)
class Schedule:
    """Items in the order in which they are made; `peak` bytes of disk and `download` bytes are what that takes."""

    items: tuple[Item, ...]
    peak: int
    download: int

    def next_use(self, step: int) -> Mapping[Key, int]:
        """By source tensor after how many steps it is wanted, from `step` on; those that never are, are not in it."""
        found: dict[Key, int] = {}
        for ahead, item in enumerate(self.items[step:]):
            for key in item.reads:
                found.setdefault(key, ahead)
        return found


def parse_size(text: str) -> int:
    """Bytes that a person writes as `14GB`, `500 MB`, `13GiB`. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write it as 14GB or 13GiB")
    base = 1024 if match[3] else 1000
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * base**power)


def in_order(plan: MergePlan, items: Sequence[Item]) -> list[Item]:
    """Items by the place in the model of what they hold; a twin of the first layers comes before all."""
    place: dict[Key, int] = {}
    for position, tensor in enumerate(plan.tensors):
        for read in reads(tensor.expr):
            place.setdefault((read.source, read.tensor), position)
    return sorted(items, key=lambda item: median([place[key] for key in item.reads] or [0]))


def schedule(
    items: Sequence[Item], sources: Mapping[str, Checkpoint], capacity: int, held: frozenset[Key] = frozenset()
) -> Schedule | None:
    """What making `items` in this order takes, if it can be done with `capacity` bytes; else None. `held` are source tensors
    that are there at the beginning."""
    sizes = {key: bytes_of([key], sources) for item in items for key in item.reads}
    uses: dict[Key, list[int]] = {}
    for step, item in enumerate(items):
        for key in item.reads:
            uses.setdefault(key, []).append(step)
    peak = download = 0
    for step, item in enumerate(items):
        later = {key: next((use for use in uses.get(key, ()) if use >= step), None) for key in held}
        held = frozenset(key for key, use in later.items() if use is not None)
        wanted = item.reads - held
        total = sum(sizes[key] for key in held) + sum(sizes[key] for key in wanted) + item.bytes
        for key in sorted(held - item.reads, key=lambda key: later[key] or 0, reverse=True):
            if total <= capacity:
                break
            held -= {key}
            total -= sizes[key]
        if total > capacity:
            return None
        download += sum(sizes[key] for key in wanted)
        held |= item.reads
        peak = max(peak, total)
    return Schedule(tuple(items), peak, download)


@dataclass(frozen=True)
class Bounded:
    """How a plan is built in a bounded space: the schedule, and what each of its items is, by name."""

    schedule: Schedule
    shards: Mapping[str, list[OutputTensor]]
    splits: Mapping[str, SplitFile]
    fixed: int
    download: int

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that are promised to be enough."""
        return self.schedule.peak + self.fixed


def plan_bounded(plan: MergePlan, max_disk: int) -> Bounded:
    """How `plan` is built within `max_disk` bytes, from headers alone: in files as large as possible, each source byte fetched
    once if that can be. Raises UsageError where it cannot be done, with what it would take."""
    layout = gguf_layout(plan.config, {tensor.name: tensor.expr for tensor in plan.tensors}) if plan.quants else None
    fixed = _fixed_bytes(plan)
    needed = bytes_of({(r.source, r.tensor) for t in plan.tensors for r in reads(t.expr)}, plan.sources)
    best: Bounded | None = None
    part, tried = SMALL_PARTS, 0
    while part >= SMALLEST and tried < 4:
        shards = _shards(plan, part)
        with_imatrix = wants_imatrix(plan.quants)
        splits = {
            name: SplitFile.of(layout, FILE_TYPES[name], Path(f"{plan.name}-{name}.gguf"), part, with_imatrix)
            for name in plan.quants
            if layout is not None
        }
        items = _items(plan, shards, splits)
        if len(items) > MOST:
            break
        found, passed, download = after_passes(plan, items, max_disk - fixed)
        if found is not None:
            tried += 1
            peak = max(found.peak, passed)
            if best is None or download + found.download < best.download:
                best = Bounded(
                    Schedule(found.items, peak, found.download), shards, splits, fixed, download + found.download
                )
            if download + found.download <= needed:
                break
        part //= 2
    if best is None:
        least = schedule(items, plan.sources, 1 << 60)
        peak = least.peak if least is not None else 0
        raise UsageError(
            f"{plan.name}: cannot be built within {max_disk / 1e9:.1f} GB; about {(peak + fixed) / 1e9:.1f} GB are needed"
        )
    return best


def _shards(plan: MergePlan, part: int) -> dict[str, list[OutputTensor]]:
    shards = shards_of(plan.tensors, part)
    return {shard_name(number, len(shards)): shard for number, shard in enumerate(shards, 1)}


def _items(plan: MergePlan, shards: Mapping[str, list[OutputTensor]], splits: Mapping[str, SplitFile]) -> list[Item]:
    """Everything that is made, in order."""
    items = [
        Item(
            name,
            sum(nbytes(tensor.expr) + HEADER_BYTES for tensor in tensors),
            frozenset((read.source, read.tensor) for tensor in tensors for read in reads(tensor.expr)),
        )
        for name, tensors in shards.items()
    ]
    twins = []
    for split in splits.values():
        for index, (path, part) in enumerate(zip(split.paths, split.parts, strict=True)):
            keys = frozenset(key for tensor in part for key in sources_of(tensor))
            items.append(Item(path.name, split.file_bytes(part, first=index == 0), keys))
        twin = split.twin_tensors(first_moe_layer(plan.config))
        keys = frozenset(key for tensor in twin for key in sources_of(tensor))
        twins.append(Item(f"{split.paths[0].name}{TWIN}", split.file_bytes(twin, first=True), keys))
    return [*twins, *in_order(plan, items)]


def after_passes(plan: MergePlan, items: Sequence[Item], capacity: int) -> tuple[Schedule | None, int, int]:
    """The schedule of `items` after gates and importance matrix have read what they need, in the order of the layers; how
    much disk those take, and how much they download. What they leave here is not fetched again."""
    made = [(read.source, read.tensor) for tensor in plan.tensors for read in reads(tensor.expr)]
    base = [(plan.base, name) for name in plan.sources[plan.base].tensors or {}]
    passes: list[list[Key]] = []
    if plan.gate_mode not in RANDOM_GATES:
        passes.append(made if plan.gate_mode == DISCRIMINANT else base)
        for model in plan.models if plan.experts_whole else ():
            passes.append([(key, name) for key in model if key for name in plan.sources[key].tensors or {}])
    if wants_imatrix(plan.quants):
        passes.append(made)
    held: dict[Key, int] = {}
    peak = download = 0
    for keys in passes:
        sizes = {key: bytes_of([key], plan.sources) for key in keys}
        room = capacity - RECENT * max(sizes.values(), default=0) - sum(held.values())
        for key, size in sizes.items():
            if key in held:
                continue
            download += size
            if size <= room:  # the others come and go
                held[key] = size
                room -= size
        whole = sum(size for key, size in sizes.items() if key not in held) + sum(held.values())
        peak = max(peak, min(capacity, whole))
    return schedule(items, plan.sources, capacity, frozenset(held)), peak, download


def _fixed_bytes(plan: MergePlan) -> int:
    """What lies there all the time: gates, importance matrix, the base's small files, reports."""
    base = plan.sources[plan.base]
    small = sum(base.files.get(name, 0) for name in plan.companions)
    layers, hidden = plan.config["num_hidden_layers"], plan.config["hidden_size"]
    gates: int = layers * hidden * (plan.kept_experts + len(plan.gated)) * 4
    matrix = 0
    if wants_imatrix(plan.quants):
        matrix = 8 * sum(tensor.expr.shape[-1] for tensor in plan.tensors if len(tensor.expr.shape) > 1)
    index = 256 * len(plan.tensors)
    # Twice the small files: as they came, and beside the model.
    return MARGIN + 2 * (small + gates + matrix + index)
