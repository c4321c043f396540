"""Routing that is decided from outside: what a router makes of a token is replaced by logits that are given.

So a calibration's prompts pass through the merged model as text that the router was never fitted on would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from merge.forward import Run, StreamedModel


@dataclass(frozen=True)
class Layout:
    """Where token sequences lie in batches: `rows[b]` are the numbers of those in batch b, `widths[b]` is its width."""

    rows: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]

    def places(self, b: int, skipped: Sequence[int], lengths: Sequence[int]) -> dict[int, torch.Tensor]:
        """By sequence of batch b the places (n,) of its tokens from `skipped` to `lengths` among the batch's B*T."""
        return {
            i: torch.arange(skipped[i], lengths[i]) + row * self.widths[b]
            for row, i in enumerate(self.rows[b])
            if lengths[i] > skipped[i]
        }


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


def losses(model: StreamedModel, run: Run, ids: Sequence[Sequence[int]], layout: Layout) -> list[float]:
    """By token sequence the sum of its tokens' losses, in nats, after the last layer: each token but the first is predicted."""
    found = [0.0] * len(ids)
    for piece in model.logits(run):
        for row, i in enumerate(layout.rows[piece.batch]):
            stop = min(piece.start + piece.values.shape[1], len(ids[i]) - 1)
            if stop > piece.start:
                wanted = torch.tensor(ids[i][piece.start + 1 : stop + 1], device=piece.values.device)
                scores = piece.values[row, : stop - piece.start].float()  # (t, V)
                found[i] += float(nn.functional.cross_entropy(scores, wanted, reduction="sum"))
    return found
