"""How much disk a build takes, worked out from headers: each output file in turn, and the source tensors that are held for it.

Under `max_disk` every shard and every part of a GGUF file is one `Item`: its source tensors are fetched, it is written,
uploaded and deleted. Items are taken in the order of the layers they hold, so that a source tensor is fetched once and let go
when the last item that reads it is done. What does not fit goes early, and is fetched again. A router that needs the layers
below it and no more is calibrated on the way: each of its steps is an item that leaves no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bot.passes import EMBEDDED, EMBEDDING, by_layer, passes_after, passes_before, read
from bot.quants import SMALL_PARTS
from merge.checkpoint import Checkpoint
from merge.errors import UsageError
from merge.expr import Expr, gate_layers, nbytes, reads
from merge.plan import MergePlan, OutputTensor
from merge.ranged import Key, bytes_of
from merge.writer import shard_name, shards_of
from quants.families import first_moe_layer
from quants.filetypes import FILE_TYPES
from quants.layout import gguf_layout, wants_imatrix
from quants.split import SplitFile, expressions_of

# Beside weights: logs, headers, cards, what the file system takes for itself.
MARGIN = 8_000_000
# The smallest parts that are tried, and the most files that a release may be cut into.
SMALLEST, MOST = 1 << 20, 2000
# Twice as many files are made only where less than this share of the bytes is then downloaded.
WORTH_IT = 0.98
# At most about what a tensor takes in a safetensors header.
HEADER_BYTES = 256
TWIN, GATES = ".twin", ".gates"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """An output file: its name, its size in bytes at most, the source tensors that it reads, and of how many layers, from the
    first on, the router must be known. Or a step of the router's calibration, which leaves no file."""

    name: str
    bytes: int
    reads: frozenset[Key]
    routers: int = 0

    @property
    def layer(self) -> int | None:
        """The layer whose router this step of the calibration gives; None for a file."""
        return int(self.name.removesuffix(GATES)) if self.name.endswith(GATES) else None


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
        for one in reads(tensor.expr):
            place.setdefault((one.source, one.tensor), position)
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
        # By name where two are wanted at the same time: a run after a kill must cut the release into the same files.
        for key in sorted(held - item.reads, key=lambda key: (later[key] or 0, key), reverse=True):
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
        if sum(item.layer is None for item in items) > MOST:
            break
        needed = bytes_of({key for item in items for key in item.reads}, plan.sources)
        held, passed, download = read(plan, passes_before(plan), max_disk - fixed)
        _, passed_after, download_after = read(plan, passes_after(plan), max_disk - fixed)
        found = schedule(items, plan.sources, max_disk - fixed, held)
        if found is not None:
            tried += 1
            peak = max(found.peak, passed, passed_after)
            download += found.download + download_after
            if best is None or download < WORTH_IT * best.download:
                best = Bounded(Schedule(found.items, peak, found.download), shards, splits, fixed, download)
            if download <= needed:
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
        _item(name, sum(nbytes(tensor.expr) + HEADER_BYTES for tensor in tensors), [tensor.expr for tensor in tensors])
        for name, tensors in shards.items()
    ]
    twins = []
    for split in splits.values():
        for index, (path, part) in enumerate(zip(split.paths, split.parts, strict=True)):
            items.append(_item(path.name, split.file_bytes(part, first=index == 0), expressions_of(part)))
        twin = split.twin_tensors(first_moe_layer(plan.config))
        size = split.file_bytes(twin, first=True)
        twins.append(_item(f"{split.paths[0].name}{TWIN}", size, expressions_of(twin)))
    return _with_gates(plan, [*twins, *in_order(plan, items)])


def _item(name: str, size: int, exprs: Iterable[Expr]) -> Item:
    exprs = list(exprs)
    keys = frozenset((one.source, one.tensor) for x in exprs for one in reads(x))
    return Item(name, size, keys, 1 + max((layer for x in exprs for layer in gate_layers(x)), default=-1))


def _with_gates(plan: MergePlan, items: Sequence[Item]) -> list[Item]:
    """`items`, and before the first that holds a layer's router the step that makes it: of layer 0 from the embedding, of each
    other one by running the base's layer below it."""
    if not by_layer(plan):
        return list(items)
    layers: dict[int, set[Key]] = {}
    for name in plan.dense_tensors if plan.gate_mode != EMBEDDED else ():
        if match := _LAYER.search(name):
            layers.setdefault(int(match[1]) + 1, set()).add((plan.base, name))
    layers[0] = {(plan.base, EMBEDDING)}
    known, found = 0, []
    for item in items:
        for layer in range(known, item.routers):
            found.append(Item(f"{layer}{GATES}", 0, frozenset(layers.get(layer, ()))))
        known = max(known, item.routers)
        found.append(item)
    return found


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
