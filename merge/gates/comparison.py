"""Routers to compare a calibration with, on its own held-out tokens: mergekit's `hidden`, and one drawn at random.

`hidden` is made as `merge.gates.mergekit` makes it, but of each text's tokens it is asked, the prompt that the text is from is
left out of it: a mean over prompts needs no second pass for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import StreamedModel
from merge.gates.batches import packed
from merge.gates.mergekit import HIDDEN_DTYPE
from merge.gates.prompts import WINDOW, ExpertPrompts, Text, load_tokenizer, tokenize
from merge.gates.random import random_gates
from merge.gates.report import unit
from merge.gates.routed import Peer

# Of an expert's prompts so many are read at most, taken evenly: it is a comparison, not the router.
MAX_PROMPTS = 64


@dataclass(frozen=True)
class _Prompt:
    """A prompt and its last token's hidden states entering each layer (L, H)."""

    expert: int
    positive: bool
    text: str
    states: torch.Tensor


def hidden_peer(
    raw: Sequence[ExpertPrompts],
    calibrated: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    device: str = "auto",
) -> Peer:
    """mergekit's `hidden` router of the recipe's own prompts `raw`, for texts of the prompts `calibrated`.

    `config`, `tensors` and `evaluator` are the dense base model's. Raises as `merge.gates.mergekit.calibrate` does.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    window = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
    chosen = [
        (number, positive, text)
        for number, expert in enumerate(raw)
        for positive, prompts in ((True, expert.positive), (False, expert.negative))
        for text in prompts[:: -(-len(prompts) // MAX_PROMPTS) or 1]
    ]
    ids = [tokenize(tokenizer, text)[:window] for *_, text in chosen]
    states = _last_states(StreamedModel(config, tensors, evaluator, device, HIDDEN_DTYPE), ids)
    prompts = [_Prompt(*one, states[i]) for i, one in enumerate(chosen)]
    gates: dict[tuple[int, bool, str | None], torch.Tensor] = {}

    def peer(layer: int, text: Text) -> torch.Tensor:
        owner = calibrated[text.expert]
        left_out = (owner.positive if text.positive else owner.negative)[text.prompt]
        known = any(p.text == left_out and (p.expert, p.positive) == (text.expert, text.positive) for p in prompts)
        key = (text.expert, text.positive, left_out if known else None)
        if key not in gates:
            gates[key] = _hidden_gate(prompts, len(raw), *key)
        return gates[key][layer]

    return peer


def random_peer(layers: int, experts: int, hidden: int, seed: int) -> Peer:
    """The router of `gate_mode: random`."""
    gates = random_gates("random", layers, experts, hidden, seed)
    return lambda layer, text: torch.from_numpy(gates[layer])


def _last_states(model: StreamedModel, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """The hidden states entering each layer at each sequence's last token: (N, L, H), float32."""
    rows = packed(ids)
    found = torch.zeros(len(ids), model.num_layers, model.config.hidden_size)
    run = model.start(rows.batches)
    for layer in model.layers():
        for i, place in enumerate(rows.places):
            found[i, layer.index] = run.hidden[place.batch][place.row, place.stop - 1].float()
        if layer.index + 1 < model.num_layers:
            layer.advance(run)
    return found


def _hidden_gate(
    prompts: Sequence[_Prompt], experts: int, expert: int, positive: bool, left_out: str | None
) -> torch.Tensor:
    """The router (L, E, H) without the prompt `left_out` of `expert`, unless it is the only one."""
    rows = []
    for number in range(experts):
        means = []
        for sign in (True, False):
            mine = [p for p in prompts if (p.expert, p.positive) == (number, sign)]
            kept = [p for p in mine if (number, sign, p.text) != (expert, positive, left_out)] or mine
            means += [torch.stack([p.states for p in kept]).mean(0)] if kept else []
        rows.append(unit(means[0] - means[1] if len(means) == 2 else means[0]))  # (L, H)
    return torch.stack(rows, 1)
