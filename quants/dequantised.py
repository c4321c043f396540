"""The weights of a GGUF file seen as the checkpoint's own tensors, so that transformers' code can run on them.

Experts are taken out of their stack, rows put back in transformers' order, blocks turned into numbers: what is measured
with them is what quantising did to the weights. (llama.cpp also rounds activations while it computes; that is not in it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge.evaluate import Evaluator
from merge.expr import Expr, Read
from quants.filetypes import tensor_bytes
from quants.kernels import decode
from quants.layout import EMBEDDING, OUTPUT, Layout, Origin
from quants.nodes import HeadRows, Permute
from quants.structure import raw, read_tensors

_SOURCE = "gguf"


def dequantised(
    paths: Sequence[Path], layout: Layout, tensors: Mapping[str, Expr]
) -> tuple[dict[str, Expr], Evaluator]:
    """The checkpoint's `tensors` as the files in `paths` have them: float32 expressions, and their evaluator."""
    shapes = {name: x.shape for name, x in tensors.items() if name in layout.origins}
    if OUTPUT in layout.origins:  # a file may have one of its own where the model's is the embedding
        shapes.setdefault(OUTPUT, shapes[EMBEDDING])
    weights = _Weights(paths, layout, shapes)
    expressions: dict[str, Expr] = {name: Read(_SOURCE, name, "F32", shape) for name, shape in shapes.items()}
    return expressions, Evaluator({_SOURCE: weights})  # type: ignore[dict-item]  # of Files only `flat` is used


class _Weights:
    """Reads slices of a checkpoint's tensors from a GGUF file: what merge.evaluate.Files is for a checkpoint."""

    def __init__(self, paths: Sequence[Path], layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._tensors = read_tensors(paths)
        self._layout = layout
        self._shapes = shapes
        self._heads = {tensor.name: tensor.expr.heads for tensor in layout.tensors if isinstance(tensor.expr, Permute)}
        self._of_heads = {tensor.name for tensor in layout.tensors if isinstance(tensor.expr, HeadRows)}

    def flat(self, tensor: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the checkpoint's `tensor`, float32."""
        origins = self._layout.origins[tensor]
        shape = self._shapes[tensor]
        if origins[0].parts == 1 and origins[0].tensor not in self._heads:
            return self._rows(origins[0], shape, start, stop)
        # Parts and permuted rows lie apart: the whole is put together.
        if origins[0].tensor in self._of_heads:  # keys (heads, latent, rows), values (heads, rows, latent)
            keys, values = (self._rows(origin, self._layout.shapes[origin.tensor]) for origin in origins)
            return torch.cat([keys.transpose(1, 2), values], dim=1).reshape(-1)[start:stop]
        parts = [self._rows(origin, self._part_shape(origin, shape)) for origin in origins]
        whole = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
        if heads := self._heads.get(origins[0].tensor):
            size = shape[0] // heads
            whole = whole.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(shape)
        return whole.reshape(-1)[start:stop]

    def _part_shape(self, origin: Origin, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if origin.parts == 1 else (*shape[:-2], shape[-2] // origin.parts, shape[-1])

    def _rows(self, origin: Origin, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of one part, flat; all of them in `shape` where no `stop` is given."""
        tensor: Any = self._tensors[origin.tensor]
        kind, length = tensor.tensor_type.name, shape[-1]
        row = tensor_bytes(kind, (length,))
        height = math.prod(shape[:-1])
        first, last = start // length, height if stop is None else -(-stop // length)
        at = (origin.expert or 0) * height
        values = decode(raw(tensor)[(at + first) * row : (at + last) * row], kind, length)
        if stop is None:
            return values.view(shape)
        return values.reshape(-1)[start - first * length : stop - first * length]
