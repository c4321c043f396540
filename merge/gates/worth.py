"""What each expert is worth in this merge: its loss as it is, and with the base's attention around its MLPs.

A full fine-tune's MLPs were trained together with its own attention; the merge keeps the base's. On the expert's calibration
text three losses tell how much of its skill is left: of the base, of the expert as it is (`own`), and of the merged model with
every token sent to that expert (`shared`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Progress, StreamedModel
from merge.gates.batches import packed
from merge.gates.held_out import losses, routed, sent
from merge.gates.prompts import ExpertPrompts, calibration_texts, load_tokenizer

# A model to run: config.json, tensors, and what evaluates them.
Model: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Expr], Evaluator]
DTYPE = torch.bfloat16
# Of each expert's text about so many tokens are read.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Worth:
    """Losses in nats per token on `tokens` tokens of an expert's calibration text; `own` is None where the expert is no dense
    model of its own."""

    expert: int
    tokens: int
    base: float
    own: float | None
    shared: float


def expert_worth(
    experts: Sequence[ExpertPrompts],
    merged: Model,
    base: Model,
    own: Callable[[int], Model | None],
    tokenizer_folder: Path,
    device: str = "auto",
    progress: Progress | None = None,
    memory: int | None = None,
) -> tuple[Worth, ...]:
    """The worth of each expert of a merged model, on its positive prompts; nothing where it has more experts than dimensions.

    `own(e)` gives the dense model that expert e is from. Raises as `merge.gates.routed.calibrate_discriminant` does.
    """
    config = merged[0]
    if len(experts) > config["hidden_size"]:
        return ()
    positive = [ExpertPrompts(expert.positive) for expert in experts]
    texts: list[tuple[int, tuple[int, ...]]] = []
    for text in calibration_texts(load_tokenizer(tokenizer_folder), positive, config).texts:
        if sum(len(ids) for expert, ids in texts if expert == text.expert) < MAX_TOKENS and len(text.ids) > 1:
            texts.append((text.expert, text.ids))
    owners = [expert for expert, _ in texts]
    of_base = _mean_losses(_streamed(base, device, memory), texts, None, progress)
    of_shared = _mean_losses(_streamed(merged, device, memory), texts, len(experts), progress)
    found = []
    for e in sorted(set(owners)):
        mine, model = [text for text in texts if text[0] == e], own(e)
        of_own = None if model is None else _mean_losses(_streamed(model, device, memory), mine, None, progress)[e]
        found.append(Worth(e, sum(len(ids) - 1 for _, ids in mine), of_base[e], of_own, of_shared[e]))
    return tuple(found)


def _streamed(model: Model, device: str, memory: int | None) -> StreamedModel:
    config, tensors, evaluator = model
    return StreamedModel(config, tensors, evaluator, device, DTYPE, memory)


def _mean_losses(
    model: StreamedModel, texts: Sequence[tuple[int, tuple[int, ...]]], experts: int | None, progress: Progress | None
) -> dict[int, float]:
    """By expert its texts' loss, nats per token; with `experts` of them every token is sent to its text's own."""
    ids = [ids for _, ids in texts]
    rows = packed(ids)
    run = model.start(rows.batches)
    for layer in model.layers(progress):
        modules = model.gates(layer.index)
        if experts is None or not modules:
            layer.advance(run)
            continue
        given = [
            sent(batch, experts, [(rows.tokens(i), texts[i][0]) for i, _ in rows.of_batch(b)])
            for b, batch in enumerate(rows.batches)
        ]
        with routed(modules[0][0], torch.zeros(experts, model.config.hidden_size), given):
            layer.advance(run)
    found = losses(model, run, ids, rows)
    return {
        e: sum(x for x, (owner, _) in zip(found, texts, strict=True) if owner == e)
        / sum(len(i) - 1 for owner, i in texts if owner == e)
        for e in {owner for owner, _ in texts}
    }
