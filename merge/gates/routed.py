"""The discriminant router, fitted layer by layer on the merged model.

A layer's router is fitted on what its MoE block receives when the layers below already route with their new routers, so it
is calibrated on the activations it will see; each prompt passes on routed as if it had been left out of the fit, as new text
would be. The pass streams one layer of weights at a time; the tokens of all prompts move together from layer to layer.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from merge.errors import SourceError
from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.families.mixture import PER_TOKEN
from merge.forward import Progress, Run, StreamedLayer, StreamedModel, resolve_device
from merge.gates.added import Rows, with_kept
from merge.gates.batches import Packed, packed
from merge.gates.discriminant import Fit, fit_router, rows_of
from merge.gates.discriminant import Rows as FitRows
from merge.gates.figures import LayerFigures
from merge.gates.first_token import first_token_experts
from merge.gates.held_out import routed
from merge.gates.prompts import ExpertPrompts, Text, Texts, calibration_texts, load_tokenizer

# A router to compare with: its gate (E, H) in a layer, for a text that it must not have been made from.
Peer: TypeAlias = Callable[[int, Text], torch.Tensor]
DTYPE = torch.bfloat16
# The scale of the logits, as a part of the one at which the experts' weights are the most likely. The likelihood knows the
# experts by their prompts alone; the merged model's loss also knows how good they are at them. It was lower with this than
# with 1 for each of the three sets of prompts of the demo's experts in benchmarks/routing.py: the others' weight costs next to
# nothing where an expert is better than they are, and helps where it is not.
SOFTNESS = 0.4
# And where the weights of a token's experts are not scaled to 1 (norm_topk_prob is false): what they lack is lost, so the router
# has to be sharp. The lowest loss among 0.4, 1, 2, 4 and 10 of the demo's experts as Qwen2-MoE; of the base four times 4 is better
# by .02 nats.
SOFTNESS_UNSCALED = 2.0


@dataclass(frozen=True)
class Calibration:
    """Routers, layer -> (experts, hidden), and how each was found; the texts they were fitted on; whether there were
    prompts to hold out (otherwise the figures of the fits are those of the tokens they were fitted on).

    `first`: the experts that a BOS goes to, if it is sent anywhere on purpose. `peers` has the figures of the routers it is
    compared with, by name.
    """

    gates: dict[int, torch.Tensor]
    fits: tuple[Fit, ...]
    texts: Texts
    held_out: bool
    first: tuple[int, ...] = ()
    peers: Mapping[str, tuple[LayerFigures, ...]] = field(default_factory=dict)


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
    peers: Mapping[str, Peer] | None = None,
    softness: float | None = None,
) -> Calibration:
    """Fit the routers of the merged model whose `config`, `tensors` and `evaluator` are given.

    `shared` are the prompts of shared experts that have a gate: its row stands below the router's. `kept` are the rows, by
    layer, of experts that a mixture has already; those of `experts` are then told from each other and from text of the
    `others`, and get the kept rows' length. `peers` are routers to compare with on the same tokens.
    Of a dense model the routers that would stand at its MLPs are fitted. `ridge` fixes the regularisation instead of choosing
    it; `softness` is a factor on the scale of the logits, by default the one that suits the model. Raises PromptError for a
    prompt that gives no gate, SourceError where the model or its tokenizer cannot be read, UsageError for a device that is not
    there.
    """
    kept, count, peers = kept or {}, len(experts), peers or {}
    if softness is None:
        softness = SOFTNESS if config.get("norm_topk_prob", True) else SOFTNESS_UNSCALED
    experts = [*experts, others] if others else experts
    texts = calibration_texts(load_tokenizer(tokenizer_folder), [*experts, *shared], config)
    own = [i for i, text in enumerate(texts.texts) if text.expert < len(experts)]
    rows = _rows(len(experts), [texts.texts[i] for i in own])
    shared_rows = [_against_experts(texts.texts, len(experts), len(experts) + s) for s in range(len(shared))]
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    # A gate must be there when its layer is loaded; the fit replaces it before the layer runs.
    empty = torch.zeros(len(kept.get(0, ())) + count + len(shared), hidden)
    evaluator = Evaluator(evaluator.files, dict.fromkeys(range(layers), empty))
    # On a CPU a layer's experts are read one after the other: a router sees many tokens, and these take longer than that.
    if memory is None and resolve_device(device).type == "cpu":
        memory = 0
    model = StreamedModel(config, tensors, evaluator, device, DTYPE, memory)
    in_rows = packed([text.ids for text in texts.texts])
    # The held-out logits of each batch's tokens: their places in the batch, and their rows in a fit.
    held_out = rows.can_hold_out and bool(model.gates(0)) and len(experts) <= hidden and not others
    held = _held_rows(texts.texts, own, in_rows) if held_out else []
    first: tuple[int, ...] = ()
    if held_out and texts.has_bos:
        first = first_token_experts(
            model, [texts.texts[i] for i in own], count, next(config[key] for key in PER_TOKEN if key in config)
        )
    run = model.start(in_rows.batches)
    gates: dict[int, torch.Tensor] = {}
    fits: list[Fit] = []
    compared: dict[str, list[LayerFigures]] = {name: [] for name in peers}
    for layer in attention_once(model.layers(), len(run.hidden)):
        modules = model.gates(layer.index)
        router = modules[0][0] if modules else None
        received = in_rows.split(router_inputs(layer, run, router))
        pin = (received[own[0]][0], first) if first else None
        inputs = [x[text.skipped :] for x, text in zip(received, texts.texts, strict=True)]
        x = torch.cat([inputs[i] for i in own])  # (n, H)
        if not torch.isfinite(x).all():
            raise SourceError(
                f"layer {layer.index}: the activations are not finite numbers, so no gate can be made of them"
            )
        fit = fit_router(x, rows, ridge, softness, pin, model.device)
        fits.append(fit)
        for name, peer in peers.items():
            logits = torch.cat([inputs[i] @ peer(layer.index, texts.texts[i]).to(x).T for i in own])  # (n, E)
            compared[name].append(rows.figures(logits))
        router_rows = fit.gate
        if others:  # as sure of its expert as it is against the others
            new = (fit.gate[:count] - fit.gate[count:]).numpy()
            router_rows = torch.from_numpy(with_kept(kept[layer.index], new))
        gate = torch.cat([router_rows, *(_sigmoid_gate(inputs, one, ridge, model.device) for one in shared_rows)])
        gates[layer.index] = gate
        if layer.index + 1 < layers:  # nothing comes after the last one
            for module, row in modules:
                with torch.no_grad():
                    module.weight.copy_(gate[row : row + len(module.weight)])  # type: ignore[operator, arg-type]
            with ExitStack() as stack:
                if router is not None and held_out:
                    given = [(places, fit.logits[found]) for places, found in held]
                    stack.enter_context(routed(router, fit.gate, given))
                layer.advance(run)
        if progress:
            progress(1)
    peer_figures = {name: tuple(figures) for name, figures in compared.items()}
    return Calibration(gates, tuple(fits), texts, rows.can_hold_out, first, peer_figures)


def _held_rows(texts: Sequence[Text], own: Sequence[int], in_rows: Packed) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By batch the places of the experts' tokens in it, and which rows of the fit they are."""
    tokens: list[list[torch.Tensor]] = [[torch.zeros(0, dtype=torch.long)] for _ in in_rows.batches]
    rows: list[list[torch.Tensor]] = [[torch.zeros(0, dtype=torch.long)] for _ in in_rows.batches]
    count = 0
    for i in own:
        place = in_rows.places[i]
        tokens[place.batch].append(in_rows.tokens(i, texts[i].skipped))
        rows[place.batch].append(torch.arange(count, count + texts[i].tokens))
        count += texts[i].tokens
    return [(torch.cat(at), torch.cat(found)) for at, found in zip(tokens, rows, strict=True)]


def attention_once(layers: Iterable[StreamedLayer], batches: int) -> Iterator[StreamedLayer]:
    """The layers, of which each is run twice over so many batches, up to its router and then as a whole: the second time its
    attention gives what it gave the first time."""
    for layer in layers:
        attention: Any = layer.module.get_submodule("self_attn")
        attention.forward = _Once(attention.forward, batches, layer.device)
        try:
            yield layer
        finally:
            del attention.forward


class _Once:
    """Computes for each of the batches in turn, and then gives the same again."""

    def __init__(self, compute: Callable[..., tuple[Any, ...]], batches: int, device: torch.device) -> None:
        self.compute, self.left, self.device = compute, batches, device
        self.found: deque[tuple[Any, ...]] = deque()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not self.left:
            hidden, *others = self.found.popleft()
            return (hidden.to(self.device), *others)
        self.left -= 1
        made = self.compute(*args, **kwargs)
        self.found.append((made[0].cpu(), *[None] * len(made[1:])))  # the others are weights, which no layer uses
        return made


def router_inputs(layer: StreamedLayer, run: Run, router: nn.Module | None) -> list[torch.Tensor]:
    """What a layer's router (of a dense layer: its MLP) receives, (B, T, H) for each batch, float32, in host memory: of many
    tokens it is more than a GPU has room for."""
    module: nn.Module = layer.module.get_submodule("mlp") if router is None else router
    seen: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(catch)
    try:
        for b, hidden in enumerate(run.hidden):
            try:
                layer.output(run, b)
            except _Reached:
                found.append(seen.pop().view(hidden.shape).float().cpu())
    finally:
        hook.remove()
    return found


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
    inputs: Sequence[torch.Tensor], fitted: tuple[list[int], FitRows], ridge: float | None, device: torch.device
) -> torch.Tensor:
    """The gate (1, H) whose sigmoid is the share of the shared expert: the difference of the two rows of a softmax."""
    used, rows = fitted
    gate = fit_router(torch.cat([inputs[i] for i in used]), rows, ridge, device=device).gate  # (2, H)
    return gate[1:] - gate[:1]


def _rows(experts: int, texts: Sequence[Text]) -> FitRows:
    """What to fit on: texts are held out by prompt; an expert's only prompt by piece, its only piece in two halves.

    A text that was written from a prompt of a few words counts as a prompt. Leaving out all that was written from one leaves out
    a subject of its own; of real text fewer tokens were routed rightly then (.824 instead of .856 in benchmarks/routing.py).
    """
    sets, tokens, groups = [], [], []
    numbers: dict[tuple[int, bool, int, int], int] = {}
    prompts = defaultdict[tuple[int, bool], list[int]](list)  # of each expert's texts, the prompts that they are of
    for text in texts:
        prompts[text.expert, text.positive].append(text.prompt)
    only = {key for key, found in prompts.items() if len(set(found)) == 1}
    for i, text in enumerate(texts):
        only_prompt = (text.expert, text.positive) in only
        parts = [text.tokens]
        if len(prompts[text.expert, text.positive]) == 1 and text.tokens > 1:
            parts = [text.tokens // 2, text.tokens - text.tokens // 2]
        for part, count in enumerate(parts):
            key = (text.expert, text.positive, text.prompt, 2 * i + part if only_prompt else -1)
            sets.append((text.expert, text.positive))
            tokens.append(count)
            groups.append(numbers.setdefault(key, len(numbers)))
    return rows_of(experts, sets, tokens, groups)
