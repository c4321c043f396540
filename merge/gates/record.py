"""What is kept of a calibration beside the gates: figures by layer and the text that was written, in the gates file's header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from merge import findings as f
from merge.errors import SourceError
from merge.gates.figures import LayerFigures

if TYPE_CHECKING:
    from merge.gates.expansion import Sample
    from merge.gates.prompts import ExpertPrompts
    from merge.gates.routed import Calibration

# Part of every content address: to be raised when the same inputs give other gates.
ALGORITHM = 6
METADATA = "calibration"
# An expert is idle when it is the best for less than this part of an equal share of the tokens.
IDLE = 0.25
# Two experts cannot be told apart where, of their tokens that go to either, fewer than this share go to the right one.
TOLD_APART = 0.6
# So many tokens should find their own expert among the experts used.
ENOUGH = 0.9


@dataclass(frozen=True)
class LayerRecord(LayerFigures):
    """One layer's fit: see `merge.gates.discriminant.Fit`."""

    ridge: float
    scale: float


@dataclass(frozen=True)
class Written:
    """A text that a model wrote from a short prompt: see `merge.gates.expansion.Sample`."""

    expert: int
    prompt: str
    beginning: str
    text: str


@dataclass(frozen=True)
class Record:
    """A calibration's figures: `held_out` says whether they are of held-out prompts, `cut` and `thinned` which experts'
    (from 1) texts were cut to the context or used in part. `first` and `peers`: see `merge.gates.routed.Calibration`."""

    layers: tuple[LayerRecord, ...]
    held_out: bool
    cut: tuple[int, ...] = ()
    thinned: tuple[int, ...] = ()
    written: tuple[Written, ...] = ()
    first: tuple[int, ...] = ()
    peers: dict[str, tuple[LayerFigures, ...]] = field(default_factory=dict)
    has_bos: bool = True


_RECORD = TypeAdapter(Record)


def record_of(made: Calibration, samples: Sequence[Sample] = ()) -> Record:
    layers = tuple(LayerRecord(**asdict(fit.figures), ridge=fit.ridge, scale=fit.scale) for fit in made.fits)
    written = tuple(Written(**asdict(sample)) for sample in samples)
    return Record(
        layers,
        made.held_out,
        made.texts.cut,
        made.texts.thinned,
        written,
        made.first,
        dict(made.peers),
        made.texts.has_bos,
    )


def to_metadata(record: Record) -> dict[str, str]:
    """The record for a gates file's header."""
    return {"mode": "discriminant", METADATA: _RECORD.dump_json(record).decode()}


def read_record(path: Path) -> Record | None:
    """The record in a gates file; None where its mode leaves none. Raises SourceError where it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA)
        return None if text is None else _RECORD.validate_json(text)
    except (OSError, SafetensorError, ValidationError) as error:
        raise SourceError(f"{path}: not a gates file ({error})") from None


def routed_key(
    experts: Sequence[ExpertPrompts], merged: str, seed: int, ridge: float | None, expand: str | None
) -> str:
    """The content address of a discriminant router: 64 hexadecimal digits. `merged` identifies the merged model without
    its gates, `expand` who writes text from short prompts (`base`, `experts` or None)."""
    made_from: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "mode": "discriminant",
        "merged": merged,
        "ridge": ridge,
        "expand": expand,
        "seed": seed if expand else None,
        "prompts": [[list(expert.positive), list(expert.negative)] for expert in experts],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def written_key(experts: Sequence[ExpertPrompts], writers: Sequence[str], seed: int) -> str:
    """The content address of the text that models write: `writers` are the fingerprints of those that do."""
    made_from = [ALGORITHM, list(writers), seed, [list(expert.positive) for expert in experts]]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def advice(
    record: Record, names: Sequence[str], per_token: int, lines: Mapping[int, int | None]
) -> Iterator[f.Finding]:
    """What a calibration says to the recipe's author. `names` are the experts', `lines` where they stand in the recipe."""
    layers, count = record.layers, len(names)
    for expert in record.cut:
        yield f.PromptsCut(lines.get(expert - 1), number=expert)
    for expert in record.thinned:
        yield f.PromptsThinned(lines.get(expert - 1), number=expert)
    if not record.has_bos:
        yield f.NoBos(None)
    if count == 1:
        return
    if not record.held_out:
        yield f.NothingToHoldOut(None)
        return
    for expert, name in enumerate(names):
        share = sum(layer.shares[expert] for layer in layers) / len(layers)
        if share < IDLE / count:
            yield f.IdleExpert(lines.get(expert), number=expert + 1, model=name, percent=f"{100 * share:.1f}")
    for first in range(count):
        for second in range(first + 1, count):
            alike = [i for i, layer in enumerate(layers) if _told_apart(layer, first, second) < TOLD_APART]
            if alike:
                yield f.ExpertsAlike(
                    lines.get(second), first=first + 1, second=second + 1, layers=_ranges(alike), count=len(layers)
                )
    reach = [sum(layer.reach[k] for layer in layers) / len(layers) for k in range(count)]
    # That all of them are enough needs no saying.
    enough = next((k for k in range(1, count) if reach[k - 1] >= ENOUGH), per_token)
    if enough != per_token:
        yield f.ExpertsPerTokenAdvice(
            None,
            per_token=per_token,
            percent=f"{100 * reach[min(per_token, count) - 1]:.0f}",
            enough=enough,
            enough_percent=f"{100 * reach[enough - 1]:.0f}",
        )


def _told_apart(layer: LayerRecord, a: int, b: int) -> float:
    """Of the tokens of two experts that go to either, the share that goes to the right one."""
    right = layer.goes_to[a][a] + layer.goes_to[b][b]
    wrong = layer.goes_to[a][b] + layer.goes_to[b][a]
    return right / (right + wrong) if right + wrong else 1.0


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7, 9-10`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
