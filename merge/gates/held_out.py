"""Routing that is decided from outside: what a router makes of a token is replaced by logits that are given.

So a calibration's prompts pass through the merged model as text that the router was never fitted on would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from merge.forward import Batch, Run, StreamedModel
from merge.gates.batches import Packed

# Logit of an expert that a token is not to go to: its weight beside one of 0 is 0 in float32.
FAR = -200.0


@contextmanager
def routed(router: nn.Module, gate: torch.Tensor, given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Let `router`, called for one batch after the other, see `given[b]`: the tokens at places (n,) have logits (n, E), all
    others those of `gate` (E, H), which needs E <= H.

    A router of any family multiplies what it is given by its weight. So it is given the logits themselves, followed by
    zeros, and the identity for a weight.
    """
    experts, hidden = gate.shape
    turn = iter(given)
    weight = router.weight
    assert isinstance(weight, torch.Tensor)

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        z = x.reshape(-1, hidden).float() @ gate.to(x.device).T  # (B*T, E)
        places, logits = next(turn)
        z[places.to(x.device)] = logits.to(z)
        instead = x.new_zeros(len(z), hidden)
        instead[:, :experts] = z
        return (instead.view(x.shape), *args[1:])

    with torch.no_grad():
        before = weight.clone()
        weight.copy_(torch.eye(experts, hidden))
    hook = router.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            weight.copy_(before)


def sent(batch: Batch, experts: int, tokens: Iterable[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `routed` is given for a batch, so that these of its tokens (n,) go to this expert alone each."""
    logits = torch.zeros(batch.input_ids.numel(), experts)
    for places, expert in tokens:
        logits[places] = FAR
        logits[places, expert] = 0
    return torch.arange(len(logits)), logits


def losses(model: StreamedModel, run: Run, ids: Sequence[Sequence[int]], packed: Packed) -> list[float]:
    """By token sequence the sum of its tokens' losses, in nats, after the last layer: each token but the first is predicted."""
    found = [0.0] * len(ids)
    for piece in model.logits(run):
        end = piece.start + piece.values.shape[1]
        for i, place in packed.of_batch(piece.batch):
            start, stop = max(piece.start, place.start), min(end, place.stop - 1)
            if stop > start:
                wanted = torch.tensor(ids[i][start + 1 - place.start : stop + 1 - place.start])
                scores = piece.values[place.row, start - piece.start : stop - piece.start].float()  # (t, V)
                found[i] += float(nn.functional.cross_entropy(scores, wanted.to(scores.device), reduction="sum"))
    return found
