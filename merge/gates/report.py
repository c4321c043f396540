"""What a router's weights alone say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Above this ratio of the largest to the smallest singular value mergekit warns of a degenerate router.
MAX_CONDITION = 5.0
# A vector shorter than this is not scaled up to length 1.
MIN_NORM = 1e-8


@dataclass(frozen=True)
class LayerReport:
    """One layer's router. `condition` is the ratio of its largest to its smallest singular value (infinite where an
    expert's vector is a combination of the others); `cosine` the largest between two experts, `pair` (0 and None for a
    single expert)."""

    layer: int
    condition: float
    cosine: float
    pair: tuple[int, int] | None

    @property
    def is_degenerate(self) -> bool:
        return self.condition > MAX_CONDITION


def gate_report(gates: Mapping[int, torch.Tensor], experts: int | None = None) -> tuple[LayerReport, ...]:
    """How well each layer's router can tell the experts apart; `gates` maps a layer to (rows, hidden), of which the first
    `experts` are the router's (all, if not given), and others the gate of a shared expert."""
    layers = []
    for layer, gate in sorted(gates.items()):
        gate = gate[:experts].float()
        condition = float(torch.linalg.cond(gate)) if torch.isfinite(gate).all() else math.inf
        cosines = (unit(gate) @ unit(gate).T).fill_diagonal_(-math.inf)  # (E, E)
        pair = None
        if len(gate) > 1:
            first, second = divmod(int(cosines.argmax()), len(gate))
            pair = (min(first, second), max(first, second))
        layers.append(LayerReport(layer, condition, float(cosines.max()) if pair else 0.0, pair))
    return tuple(layers)


def unit(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., H) scaled to length 1 along its last dimension."""
    length: torch.Tensor = x.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM)  # (..., 1)
    return x / length
