"""Rows of a GGUF tensor's expression as numbers, a few at a time."""

from __future__ import annotations

import math

import torch

from merge.evaluate import Evaluator
from quants.nodes import GgufExpr, Part, Permute, RopeFactors, Stack


def row_count(x: GgufExpr) -> int:
    """Rows of `x` with all leading dimensions taken together; a vector is one row."""
    return math.prod(x.shape[:-1])


def rows(evaluator: Evaluator, x: GgufExpr, start: int, stop: int) -> torch.Tensor:
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
                parts.append(rows(evaluator, x.xs[expert], first, last))
                start += last - first
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        case Part():
            return _part(evaluator, x, start, stop)
        case Permute():
            return _permuted(evaluator, x, start, stop)
        case _:
            length = x.shape[-1]
            return evaluator.flat(x, start * length, stop * length).view(stop - start, length)


def _part(evaluator: Evaluator, x: Part, start: int, stop: int) -> torch.Tensor:
    """Rows of a Part: of each of the leading matrices those that belong to it."""
    height, length = x.shape[-2:]
    parts = []
    while start < stop:
        matrix, first = divmod(start, height)
        last = min(height, first + stop - start)
        at = (matrix * x.count + x.index) * height
        parts.append(evaluator.flat(x.x, (at + first) * length, (at + last) * length).view(-1, length))
        start += last - first
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _permuted(evaluator: Evaluator, x: Permute, start: int, stop: int) -> torch.Tensor:
    """Rows of a Permute: the heads that cover start..stop are read whole, and their rows reordered.

    Row 2i + j of a head comes from row j * size / 2 + i, for j in 0, 1.
    """
    size = x.shape[0] // x.heads
    if len(x.shape) == 1:  # a bias: its rows are its elements
        whole = evaluator.flat(x.x, 0, x.shape[0])
        return whole.view(x.heads, 2, size // 2).transpose(1, 2).reshape(1, -1)[start:stop]
    first, last = start // size, -(-stop // size)
    length = x.shape[-1]
    heads = evaluator.flat(x.x, first * size * length, last * size * length)
    reordered = heads.view(last - first, 2, size // 2, length).transpose(1, 2).reshape(-1, length)
    return reordered[start - first * size : stop - first * size]


def _rope_factors(x: RopeFactors) -> torch.Tensor:
    """Shape (1, head size / 2). Source: transformers' modeling_rope_utils, `llama3`; float32 as there."""
    frequencies = 1.0 / (x.theta ** (torch.arange(0, x.head_size, 2, dtype=torch.float32) / x.head_size))
    wavelengths = 2 * math.pi / frequencies
    smooth = (x.context / wavelengths - x.low) / (x.high - x.low)
    between = 1 / ((1 - smooth) / x.factor + smooth)
    stretched = torch.where(wavelengths > x.context / x.low, x.factor, between)
    return torch.where(wavelengths < x.context / x.high, 1.0, stretched).view(1, -1)
