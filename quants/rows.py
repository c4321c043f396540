"""Rows of a GGUF tensor's expression as numbers, a few at a time: numpy arrays, of BF16 their bits as uint16.

Most tensors are copies of a checkpoint's, whose bytes are read as they are; torch, two seconds of importing, comes in at the
first expression that needs arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from merge.dtypes import SIZES
from merge.expr import Expr, Read
from merge.source_files import Files, fill
from quants.nodes import GgufExpr, HeadRows, Part, Permute, RopeFactors, Stack

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Contents(Protocol):
    """The numbers that expressions stand for: a `merge.stored.Stored`, or a `merge.evaluate.Evaluator`."""

    files: Mapping[str, Files]

    def flat(self, x: Expr, start: int, stop: int, /) -> torch.Tensor: ...


def row_count(x: GgufExpr) -> int:
    """Rows of `x` with all leading dimensions taken together; a vector is one row."""
    return math.prod(x.shape[:-1])


def rows(contents: Contents, x: GgufExpr, start: int, stop: int) -> Array:
    """Rows start..stop of `x` in its own dtype: shape (stop - start, row length)."""
    match x:
        case RopeFactors():
            return _rope_factors(x)[start:stop]
        case Stack():
            each = row_count(x.xs[0])
            parts = []
            while start < stop:
                expert, first = divmod(start, each)
                last = min(each, first + stop - start)
                parts.append(rows(contents, x.xs[expert], first, last))
                start += last - first
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        case Part():
            return _part(contents, x, start, stop)
        case Permute():
            return _permuted(contents, x, start, stop)
        case HeadRows():
            return _head_rows(contents, x, start, stop)
        case _:
            length = x.shape[-1]
            return _flat(contents, x, start * length, stop * length).reshape(stop - start, length)


def _flat(contents: Contents, x: Expr, start: int, stop: int) -> Array:
    """Elements start..stop of a checkpoint's expression."""
    if isinstance(x, Read):
        values = np.empty(stop - start, NUMPY[x.dtype])
        fill(contents.files, x, values.view(np.uint8).data, start * SIZES[x.dtype])
        return values
    import torch

    tensor = contents.flat(x, start, stop)
    bits = tensor.view(torch.uint16) if x.dtype == "BF16" else tensor
    return bits.numpy()


def _part(contents: Contents, x: Part, start: int, stop: int) -> Array:
    """Rows of a Part: of each of the leading matrices those that belong to it."""
    height, length = x.shape[-2:]
    parts = []
    while start < stop:
        matrix, first = divmod(start, height)
        last = min(height, first + stop - start)
        at = (matrix * x.count + x.index) * height
        parts.append(_flat(contents, x.x, (at + first) * length, (at + last) * length).reshape(-1, length))
        start += last - first
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _head_rows(contents: Contents, x: HeadRows, start: int, stop: int) -> Array:
    """Rows of a HeadRows: its part of each head that they are of is read whole."""
    size, length = x.x.shape[0] // x.heads, x.x.shape[1]
    height = x.shape[1]
    first, last = start // height, -(-stop // height)
    parts = []
    for head in range(first, last):
        at = head * size
        part = _flat(contents, x.x, (at + x.start) * length, (at + x.stop) * length).reshape(-1, length)
        parts.append(part.T if x.turned else part)
    return np.ascontiguousarray(np.concatenate(parts)[start - first * height : stop - first * height])


def _permuted(contents: Contents, x: Permute, start: int, stop: int) -> Array:
    """Rows of a Permute: the heads that cover start..stop are read whole, and their rows reordered.

    Row 2i + j of a head comes from row j * size / 2 + i, for j in 0, 1.
    """
    size = x.shape[0] // x.heads
    if len(x.shape) == 1:  # a bias: its rows are its elements
        whole = _flat(contents, x.x, 0, x.shape[0])
        return whole.reshape(x.heads, 2, size // 2).swapaxes(1, 2).reshape(1, -1)[start:stop]
    first, last = start // size, -(-stop // size)
    length = x.shape[-1]
    heads = _flat(contents, x.x, first * size * length, last * size * length)
    reordered = heads.reshape(last - first, 2, size // 2, length).swapaxes(1, 2).reshape(-1, length)
    return reordered[start - first * size : stop - first * size]


def _rope_factors(x: RopeFactors) -> Array:
    """Shape (1, head size / 2). Source: transformers' modeling_rope_utils, `llama3`; torch's float32 as there."""
    import torch

    frequencies = 1.0 / (x.theta ** (torch.arange(0, x.head_size, 2, dtype=torch.float32) / x.head_size))
    wavelengths = 2 * math.pi / frequencies
    smooth = (x.context / wavelengths - x.low) / (x.high - x.low)
    between = 1 / ((1 - smooth) / x.factor + smooth)
    stretched = torch.where(wavelengths > x.context / x.low, x.factor, between)
    return torch.where(wavelengths < x.context / x.high, 1.0, stretched).view(1, -1).numpy()
