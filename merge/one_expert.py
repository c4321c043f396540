"""A layer's experts one after the other, for a device whose memory does not hold them all.

Sixteen experts of a 70B base are 22 GB a layer in bfloat16, one of them 1.4 GB. transformers keeps a layer's experts in
parameters (E, R, C); here the module sees parameters of one expert (1, R, C) and the tokens that go to it with a weight
above 0, expert by expert, so the arithmetic, and the order in which the experts' outputs are added, stay its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Fills a place (1, R, C) with one expert's part of the parameter of this name.
Load = Callable[[str, int, torch.Tensor], None]


@contextmanager
def one_expert_at_a_time(
    module: nn.Module, names: Sequence[str], load: Load, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Run transformers' module of all experts with one of them in memory at a time, for the time of a `with`.

    `names` are its parameters; their storage before is put back after.
    """
    experts: Any = module
    whole, count = experts.forward, experts.num_experts
    before = {name: getattr(experts, name) for name in names}
    place = {name: torch.empty(1, *x.shape[1:], dtype=dtype, device=device) for name, x in before.items()}

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)  # (N, H)
        hit = torch.zeros(count, dtype=torch.bool, device=top_k_index.device)
        hit[top_k_index[top_k_weights != 0]] = True
        for expert in hit.nonzero()[:, 0].tolist():
            token, choice = torch.where((top_k_index == expert) & (top_k_weights != 0))  # (n,)
            for name, x in place.items():
                load(name, expert, x)
            made = whole(
                hidden[token], torch.zeros_like(token)[:, None], top_k_weights[token, choice][:, None]
            )  # (n, H)
            out.index_add_(0, token, made.to(out.dtype))
        return out

    for name, x in place.items():
        experts._parameters[name] = nn.Parameter(x, requires_grad=False)
    experts.num_experts, experts.forward = 1, forward
    try:
        yield
    finally:
        del experts.forward
        experts.num_experts = count
        experts._parameters.update(before)
