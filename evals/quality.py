"""What quantising did to a model: how far the quant's predictions are from those of the unquantised weights.

On one fixed text, token by token: the Kullback-Leibler divergence from the model's distribution to the quant's, how often
both have the same most likely token, and the quant's perplexity. Both are run by merge.forward on the weights alone, the
quant's turned back into numbers (llama.cpp also rounds activations while it computes; that is not in these figures).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Batch, Run, StreamedModel

TEXT = Path(__file__).parent / "texts" / "quality.txt"
# Tokens of a piece of the text, and the most pieces that are used.
PIECE, PIECES = 256, 4
# Seconds that measuring may take; the text is cut to what fits.
BUDGET = 900.0


@dataclass(frozen=True, slots=True)
class Quality:
    """A quant against the model: mean divergence in nats per token, share of equal top tokens (0 to 1), perplexity."""

    kl: float
    top1: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Qualities by file type, the model's own perplexity, and on how many tokens they were measured."""

    quants: Mapping[str, Quality]
    perplexity: float
    tokens: int


# A model's tensors and what evaluates them.
Weights = tuple[Mapping[str, Expr], Evaluator]


def pieces(ids: Sequence[int], length: int = PIECE) -> list[Batch]:
    """Token ids cut into pieces of equal length, one batch each; what is left over at the end is not used, unless the
    text is shorter than one piece."""
    length = min(length, len(ids))
    return [Batch(torch.tensor([ids[at : at + length]])) for at in range(0, len(ids) - length + 1, length)]


def measure(
    config: Mapping[str, Any],
    reference: Weights,
    quants: Mapping[str, Callable[[], Weights]],
    batches: Sequence[Batch],
    *,
    device: str = "auto",
    budget: float = BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Measures each of `quants` (opened one at a time) against `reference` on as many of `batches` as the time allows.

    `progress` is told of each model that has run. Raises SourceError where the model cannot be run.
    """
    batches = list(batches[:PIECES])
    model = StreamedModel(config, *reference, device=device)
    started = time.monotonic()
    pilot = model.advance(model.start(batches[:1]))
    each = (time.monotonic() - started) * (1 + len(quants))
    batches = batches[: max(1, int(budget / max(each, 1e-3)))]
    run = model.advance(model.start(batches)) if len(batches) > 1 else pilot
    own = _compare(model, run, model, run, batches)
    found = {}
    if progress:
        progress(1)
    for name, opened in quants.items():
        other = StreamedModel(config, *opened(), device=device)
        found[name] = _compare(model, run, other, other.advance(other.start(batches)), batches)
        if progress:
            progress(1)
    tokens = sum(batch.input_ids.numel() - batch.input_ids.shape[0] for batch in batches)
    return Measured(found, own.perplexity, tokens)


def _compare(model: StreamedModel, run: Run, other: StreamedModel, other_run: Run, batches: Sequence[Batch]) -> Quality:
    """Logits are made a slice of positions at a time, the same of both models."""
    divergence = same = loss = 0.0
    count = 0
    both = zip(model.logits(run), other.logits(other_run), strict=True)
    # A model makes its logits for one at a time.
    for ours, theirs in both if other is not model else ((logits, logits) for logits in model.logits(run)):
        ids = batches[ours.batch].input_ids
        # What follows each position of the slice; nothing follows the last one.
        targets = ids[:, ours.start + 1 : ours.start + 1 + ours.values.shape[1]].to(ours.values.device)  # (B, t)
        known = targets.shape[1]
        p = ours.values[:, :known].float().log_softmax(-1)  # (B, t, V)
        q = theirs.values[:, :known].float().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q.gather(-1, targets[..., None]).sum())
        count += targets.numel()
    return Quality(max(0.0, divergence / count), same / count, math.exp(min(loss / count, 700.0)))
