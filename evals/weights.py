"""Weights that are not numbers: one NaN makes every answer nothing, and no one sees it in a file's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from merge.evaluate import Evaluator
from merge.expr import Expr, elements

# By the size of an element: an integer of that size, and the bits of the exponent, all of which are set in NaN and infinity.
EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


@dataclass(frozen=True)
class BrokenTensor:
    """A tensor with elements that are NaN or infinite, and how many of how many."""

    name: str
    broken: int
    elements: int


def broken_tensors(
    tensors: Mapping[str, Expr], evaluator: Evaluator, progress: Callable[[int], None] = lambda count: None
) -> tuple[BrokenTensor, ...]:
    """The tensors that hold NaN or infinite numbers. `progress` is told of bytes looked at."""
    found = []
    for name, x in tensors.items():
        broken = 0
        for part in evaluator.slices(x):
            broken += _broken(part)
            progress(part.nbytes)
        if broken:
            found.append(BrokenTensor(name, broken, elements(x)))
    return tuple(found)


def _broken(x: torch.Tensor) -> int:
    """How many of the elements of `x` (n) are NaN or infinite."""
    integer, exponent = EXPONENTS[x.dtype]
    # The largest exponent tells in one pass whether there is any; counting them is for the rare file that has.
    bits = x.view(integer).bitwise_and(exponent)
    return int((bits == exponent).sum()) if int(bits.max()) == exponent else 0
