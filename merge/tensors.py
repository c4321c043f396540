"""What a header says of one tensor, whatever the format of its file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from merge.dtypes import SIZES


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint. `start` is the offset of its first byte in `file`; both are None where only config.json is
    known, and `start` alone for a pickle checkpoint that is not on this machine yet."""

    dtype: str
    shape: tuple[int, ...]
    file: str | None = None
    start: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * SIZES[self.dtype]
