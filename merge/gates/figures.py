"""What a router does with tokens whose expert is known. Plain values; torch only where they are worked out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerFigures:
    """One layer, on tokens of held-out prompts where there are any, each expert's tokens weighing the same:

    `goes_to[e][f]`: share of e's tokens whose best expert is f; `reach[k-1]`: share of tokens whose own expert is among the
    best k; `top_weight`: mean weight of the best expert, and `entropy` of the weights, in nats, both of the softmax over all
    experts.
    """

    goes_to: tuple[tuple[float, ...], ...]
    reach: tuple[float, ...]
    top_weight: float
    entropy: float

    @property
    def accuracy(self) -> float:
        """Share of tokens whose best expert is their own."""
        return self.reach[0]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of tokens for which each expert is the best, each expert's tokens counting the same."""
        return tuple(sum(column) / len(self.goes_to) for column in zip(*self.goes_to, strict=True))


def layer_figures(z: torch.Tensor, own: torch.Tensor, weight: torch.Tensor) -> LayerFigures:
    """The figures of tokens with logits `z` (n, E), of experts `own` (n,), weighing `weight` (n,), which sums to 1."""
    experts = z.shape[1]
    order = z.argsort(dim=1, descending=True, stable=True)  # (n, E)
    goes_to = weight.new_zeros(experts, experts)
    goes_to.index_put_((own, order[:, 0]), weight, accumulate=True)
    goes_to /= goes_to.sum(1, keepdim=True).clamp(min=1e-300)
    reach = (weight @ (order == own[:, None]).to(weight)).cumsum(0).clamp(max=1.0)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(1) @ weight
    top = log_p.max(1).values.exp() @ weight
    return LayerFigures(tuple(map(tuple, goes_to.tolist())), tuple(reach.tolist()), float(top), float(entropy))
