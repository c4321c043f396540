"""What a checkpoint's writer needs of a plan's expressions: their bytes.

Most of a merge is copied, and a random router is only rounded. torch, two seconds of importing, comes in at the first
expression that needs arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from merge.expr import Expr, Gate
from merge.source_files import Files

if TYPE_CHECKING:
    import torch

    from merge.evaluate import Evaluator


class Stored:
    """The bytes of expressions over local checkpoints and gates, layer -> (experts, hidden), float32."""

    def __init__(self, files: Mapping[str, Files], gates: Mapping[int, npt.NDArray[np.float32]]) -> None:
        self.files = files
        self._gates = gates

    def stored(self, x: Expr) -> Iterator[memoryview]:
        """The bytes of `x` as a checkpoint has them, slice by slice."""
        if isinstance(x, Gate):
            rows = self._gates[x.layer][x.first : x.first + x.shape[0]]
            yield rounded(rows, x.dtype).data.cast("B")
        else:
            yield from self.evaluator.stored(x)

    def flat(self, x: Expr, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `x` in row-major order, in its dtype."""
        return self.evaluator.flat(x, start, stop)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What makes numbers of them."""
        from merge.evaluate import Evaluator

        return Evaluator(self.files, self._gates)


def exact(raw: memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """The numbers in a weight's bytes."""
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def rounded(x: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32 | np.float16 | np.uint16]:
    """`x`, finite numbers, in a weight's dtype, rounded to the nearest (of two as near to the even one); BF16 as its bits."""
    x = np.ascontiguousarray(x)
    if dtype == "BF16":
        bits = x.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
    return x.astype({"F32": np.float32, "F16": np.float16}[dtype])
