"""From expressions to numbers, slice by slice, so that memory stays flat whatever a tensor's size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from merge.checkpoint import open_folder
from merge.dtypes import SIZES, TORCH_TYPE
from merge.errors import SourceError
from merge.expr import Cast, Concat, Expr, Gate, LowRank, Noise, Read, Scale, Stack, Zeros, elements
from merge.source_files import Files as Files
from merge.source_files import open_files as open_files

TORCH_DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_TYPE.items()}
# Noise is drawn in blocks of this many elements, each from its own seed: a slice gives the same bits as the whole.
NOISE_BLOCK = 1 << 20
# Slices of about this many bytes: large enough to amortise the calls, small enough to stay in the processor's cache.
SLICE_BYTES = 4 << 20
# A low-rank product is made in blocks of this many rows, whatever the slice: how a matrix product rounds may depend on its
# size, and a slice must give the same bits as the whole.
PRODUCT_ROWS = 32


class Evaluator:
    """Evaluates expressions over local checkpoints and calibrated gates.

    `files` maps a plan's source keys to the bytes; `gates` maps a layer to its gates: (experts, hidden), and behind them a
    row for a shared expert that has a gate.
    """

    def __init__(
        self,
        files: Mapping[str, Files],
        gates: Mapping[int, torch.Tensor] | Mapping[int, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self.files = files
        # Not copied: gates that are made layer by layer are there when they are asked for.
        self.gates = {} if gates is None else gates

    def tensor(self, x: Expr) -> torch.Tensor:
        """The whole of `x`, in its dtype and shape."""
        return self.flat(x, 0, elements(x)).view(x.shape)

    def rows(self, x: Expr, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of `x` along its first dimension."""
        row = math.prod(x.shape[1:])
        return self.flat(x, start * row, stop * row).view(stop - start, *x.shape[1:])

    def slices(self, x: Expr, max_bytes: int = SLICE_BYTES) -> Iterator[torch.Tensor]:
        """`x` as flat slices, in order, each of at most about `max_bytes`."""
        step = max(1, max_bytes // SIZES[x.dtype])
        for start in range(0, elements(x), step):
            yield self.flat(x, start, min(start + step, elements(x)))

    def stored(self, x: Expr) -> Iterator[memoryview]:
        """The bytes of `x` as a checkpoint has them, slice by slice."""
        slices = self.slices(x)
        while True:
            with _one_thread():
                part = next(slices, None)
            if part is None:
                return
            yield memoryview(part.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]

    def flat(self, x: Expr, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `x` in row-major order, in its dtype."""
        match x:
            case Read():
                return self.files[x.source].flat(x.tensor, x.start + start, x.start + stop)
            case Gate():
                rows = torch.as_tensor(self.gates[x.layer])[x.first : x.first + x.shape[0]]
                return rows.reshape(-1)[start:stop].to(TORCH_DTYPES[x.dtype])
            case Zeros():
                return torch.zeros(stop - start, dtype=TORCH_DTYPES[x.dtype])
            case Concat() | Stack():
                return self._joined(x.xs, start, stop)
            case Cast():
                return self._exact(x.x, start, stop).to(TORCH_DTYPES[x.dtype])
            case Scale() | LowRank() | Noise():
                return self._exact(x, start, stop).to(TORCH_DTYPES[x.dtype])

    def _joined(self, xs: Sequence[Expr], start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `xs` laid one after the other."""
        parts = []
        for x in xs:
            count = elements(x)
            if start < count and stop > 0:
                parts.append(self.flat(x, max(start, 0), min(stop, count)))
            start, stop = start - count, stop - count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _exact(self, x: Expr, start: int, stop: int) -> torch.Tensor:
        """Like `flat`, but in float32 where arithmetic is involved, so that a chain of nodes rounds only once."""
        match x:
            case Scale():
                return self._exact(x.x, start, stop).float() * x.factor
            case LowRank():
                return self._exact(x.x, start, stop).float() + x.scale * self._product(x, start, stop)
            case Noise():
                return self._exact(x.x, start, stop).float() + x.std * _noise(x.seed, start, stop)
            case _:
                return self.flat(x, start, stop)

    def _product(self, x: LowRank, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `b @ a`, float32."""
        rows, columns = x.shape
        rank = x.a.shape[0]
        a = self.flat(x.a, 0, rank * columns).view(rank, columns).float()
        first = start // columns // PRODUCT_ROWS * PRODUCT_ROWS
        blocks = []
        for row in range(first, -(-stop // columns), PRODUCT_ROWS):
            until = min(row + PRODUCT_ROWS, rows)
            b = self.flat(x.b, row * rank, until * rank).view(until - row, rank).float()
            blocks.append((b @ a).reshape(-1))
        return torch.cat(blocks)[start - first * columns : stop - first * columns]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core rounds several times what a disk takes, where threads that wait for one another on a busy machine do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _noise(seed: str, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of the standard normal sequence of `seed`, float32."""
    first, last = start // NOISE_BLOCK, (max(stop, start + 1) - 1) // NOISE_BLOCK
    blocks = [_noise_block(seed, block) for block in range(first, last + 1)]
    return torch.cat(blocks)[start - first * NOISE_BLOCK : stop - first * NOISE_BLOCK]


def _noise_block(seed: str, block: int) -> torch.Tensor:
    number = int.from_bytes(hashlib.sha256(f"{seed}:{block}".encode()).digest()[:8], "big") >> 1
    return torch.randn(NOISE_BLOCK, generator=torch.Generator().manual_seed(number))


def checkpoint_expressions(folder: Path) -> tuple[dict[str, Expr], dict[str, Any], Evaluator]:
    """A checkpoint on disk seen as a plan: its tensors as bare reads, its config, and their evaluator."""
    checkpoint = open_folder(folder)
    if checkpoint.tensors is None:
        raise SourceError(f"{folder}: no safetensors weights in it")
    tensors: dict[str, Expr] = {
        name: Read(checkpoint.key, name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()
    }
    return tensors, dict(checkpoint.config), Evaluator(open_files({checkpoint.key: checkpoint}))
