"""The discriminant router, fitted layer by layer on the merged model.

A layer's router is fitted on what its MoE block receives when the layers below already route with their new routers, so it
is calibrated on the activations it will see. The pass streams one layer of weights at a time; the tokens of all prompts
move together from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge.errors import SourceError
from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Batch, Progress, Run, StreamedLayer, StreamedModel
from merge.gates.added import Rows, with_kept
from merge.gates.discriminant import Fit, fit_router, rows_of
from merge.gates.discriminant import Rows as FitRows
from merge.gates.prompts import ExpertPrompts, Text, Texts, calibration_texts, load_tokenizer

DTYPE = torch.bfloat16
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Calibration:
    """Routers, layer -> (experts, hidden), and how each was found; the texts they were fitted on; whether there were
    prompts to hold out (otherwise the figures of the fits are those of the tokens they were fitted on)."""

    gates: dict[int, torch.Tensor]
    fits: tuple[Fit, ...]
    texts: Texts
    held_out: bool


class _Reached(Exception):
    """The router's input is there."""


def calibrate_discriminant(
    experts: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    device: str = "auto",
    ridge: float | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
    shared: Sequence[ExpertPrompts] = (),
    kept: Mapping[int, Rows] | None = None,
    others: ExpertPrompts | None = None,
) -> Calibration:
    """Fit the routers of the merged model whose `config`, `tensors` and `evaluator` are given.

    `shared` are the prompts of shared experts that have a gate: its row stands below the router's. `kept` are the rows, by
    layer, of experts that a mixture has already; those of `experts` are then told from each other and from text of the
    `others`, and get the kept rows' length.
    Of a dense model the routers that would stand at its MLPs are fitted. `ridge` fixes the regularisation instead of choosing
    it. Raises PromptError for a prompt that gives no gate, SourceError where the model or its tokenizer cannot be read,
    UsageError for a device that is not there.
    """
    kept, count = kept or {}, len(experts)
    experts = [*experts, others] if others else experts
    texts = calibration_texts(load_tokenizer(tokenizer_folder), [*experts, *shared], config)
    own = [i for i, text in enumerate(texts.texts) if text.expert < len(experts)]
    rows = _rows(len(experts), [texts.texts[i] for i in own])
    shared_rows = [_against_experts(texts.texts, len(experts), len(experts) + s) for s in range(len(shared))]
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    # A gate must be there when its layer is loaded; the fit replaces it before the layer runs.
    empty = torch.zeros(len(kept.get(0, ())) + count + len(shared), hidden)
    evaluator = Evaluator(evaluator.files, dict.fromkeys(range(layers), empty))
    model = StreamedModel(config, tensors, evaluator, device, DTYPE, memory)
    order, batches = batched([text.ids for text in texts.texts])
    run = model.start(batches)
    gates: dict[int, torch.Tensor] = {}
    fits = []
    for layer in model.layers():
        modules = model.gates(layer.index)
        router = modules[0][0] if modules else None
        inputs = dict(zip(order, router_inputs(layer, run, batches, router), strict=True))
        inputs = {i: inputs[i][text.skipped :] for i, text in enumerate(texts.texts)}
        x = torch.cat([inputs[i] for i in own])  # (n, H)
        if not torch.isfinite(x).all():
            raise SourceError(
                f"layer {layer.index}: the activations are not finite numbers, so no gate can be made of them"
            )
        fit = fit_router(x, rows, ridge)
        fits.append(fit)
        router_rows = fit.gate
        if others:  # as sure of its expert as it is against the others
            new = (fit.gate[:count] - fit.gate[count:]).numpy()
            router_rows = torch.from_numpy(with_kept(kept[layer.index], new))
        gates[layer.index] = gate = torch.cat(
            [router_rows, *(_sigmoid_gate(inputs, one, ridge) for one in shared_rows)]
        )
        if layer.index + 1 < layers:
            for module, first in modules:
                with torch.no_grad():
                    module.weight.copy_(gate[first : first + len(module.weight)])  # type: ignore[operator, arg-type]
            layer.advance(run)
        if progress:
            progress(1)
    return Calibration(gates, tuple(fits), texts, rows.can_hold_out)


def router_inputs(
    layer: StreamedLayer, run: Run, batches: Sequence[Batch], router: nn.Module | None
) -> list[torch.Tensor]:
    """What a layer's router (of a dense layer: its MLP) receives, (T, H) for each row of the batches in turn, float32 and
    without padding."""
    module: nn.Module = layer.module.get_submodule("mlp") if router is None else router
    seen: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(catch)
    try:
        for b, batch in enumerate(batches):
            try:
                layer.output(run, b)
            except _Reached:
                x = seen.pop().view(*batch.input_ids.shape, -1)  # (B, T, H)
                mask = batch.attention_mask
                lengths = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
                found += [row[:length].float() for row, length in zip(x, lengths, strict=True)]
    finally:
        hook.remove()
    return found


def batched(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[Batch]]:
    """Token sequences as batches of similar lengths, padded on the right, where padding changes nothing before it; and
    their numbers in the order in which they stand there."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]]) <= TOKENS_PER_BATCH:
            stop += 1
        width = len(rows[order[stop - 1]])
        lengths = torch.tensor([len(rows[i]) for i in order[start:stop]])
        ids = torch.tensor([[*rows[i], *[rows[i][0]] * (width - len(rows[i]))] for i in order[start:stop]])  # (B, T)
        batches.append(Batch(ids, (torch.arange(width) < lengths[:, None]).long()))
        start = stop
    return order, batches


def _against_experts(texts: Sequence[Text], experts: int, shared: int) -> tuple[list[int], FitRows]:
    """What the gate of shared expert number `shared` is fitted on: its own texts against the experts'."""
    used = [i for i, text in enumerate(texts) if text.expert in (*range(experts), shared)]
    # Each text's expert becomes 1 for the shared one and 0 for the others; what is not the shared one's is the others'.
    two = []
    for i in used:
        text = texts[i]
        number = text.expert * len(texts) + text.prompt  # prompts of different experts stay different
        two.append(replace(text, expert=int(text.expert == shared), prompt=number, positive=True))
        if text.expert == shared and not text.positive:
            two[-1] = replace(two[-1], expert=0)
    return used, _rows(2, two)


def _sigmoid_gate(
    inputs: Mapping[int, torch.Tensor], fitted: tuple[list[int], FitRows], ridge: float | None
) -> torch.Tensor:
    """The gate (1, H) whose sigmoid is the share of the shared expert: the difference of the two rows of a softmax."""
    used, rows = fitted
    gate = fit_router(torch.cat([inputs[i] for i in used]), rows, ridge).gate  # (2, H)
    return gate[1:] - gate[:1]


def _rows(experts: int, texts: Sequence[Text]) -> FitRows:
    """What to fit on: texts are held out by prompt; an expert's only prompt by piece, its only piece in two halves."""
    sets, tokens, groups = [], [], []
    numbers: dict[tuple[int, bool, int, int], int] = {}
    for i, text in enumerate(texts):
        alike = [other for other in texts if (other.expert, other.positive) == (text.expert, text.positive)]
        only_prompt = len({other.prompt for other in alike}) == 1
        parts = [text.tokens]
        if len(alike) == 1 and text.tokens > 1:
            parts = [text.tokens // 2, text.tokens - text.tokens // 2]
        for part, count in enumerate(parts):
            key = (text.expert, text.positive, text.prompt, 2 * i + part if only_prompt else -1)
            sets.append((text.expert, text.positive))
            tokens.append(count)
            groups.append(numbers.setdefault(key, len(numbers)))
    return rows_of(experts, sets, tokens, groups)
