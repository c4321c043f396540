"""What an output tensor is made of: small expressions over source tensors and gates.

Each node knows its `dtype` (safetensors' name) and `shape` without a weight being read, so a plan can be printed, compared
and summed up from headers alone. `merge.evaluate` turns expressions into numbers; the GGUF writer wraps them in its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from merge.dtypes import SIZES


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor of a source checkpoint as it is, or the part of it that begins at element `start`: of a tensor that holds many
    experts, one of them. `source` is the checkpoint's key in the plan."""

    source: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """Rows of one layer's calibrated gates, from row `first` on: the router, shape (experts, hidden), or the gate of a
    shared expert, shape (1, hidden)."""

    layer: int
    dtype: str
    shape: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Zeros:
    """Nothing but zeros: what an architecture asks for and the sources do not have."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """`xs`, of one dtype, one after the other along the first dimension."""

    xs: tuple[Expr, ...]

    @property
    def dtype(self) -> str:
        return self.xs[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(x.shape[0] for x in self.xs), *self.xs[0].shape[1:])


@dataclass(frozen=True, slots=True)
class Stack:
    """`xs`, of one dtype and shape, as one: shape (number of xs, …)."""

    xs: tuple[Expr, ...]

    @property
    def dtype(self) -> str:
        return self.xs[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.xs), *self.xs[0].shape)


@dataclass(frozen=True, slots=True)
class Cast:
    """`x` rounded to another dtype."""

    x: Expr
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class Scale:
    """`factor * x`."""

    x: Expr
    factor: float

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class LowRank:
    """`x + scale * b @ a`: a matrix (rows, columns) with a LoRA adapter's delta, `b` (rows, r), `a` (r, columns)."""

    x: Expr
    b: Read
    a: Read
    scale: float

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class Noise:
    """`x` plus Gaussian noise of standard deviation `std`, drawn from `seed`: the same bits on every run."""

    x: Expr
    std: float
    seed: str

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


Expr = Read | Gate | Zeros | Concat | Stack | Cast | Scale | LowRank | Noise


def cast(x: Expr, dtype: str) -> Expr:
    """`x` in `dtype`: `x` itself where it has it already, so that a copy stays recognisable as one."""
    return x if x.dtype == dtype else Cast(x, dtype)


def elements(x: Expr) -> int:
    """Number of elements."""
    return math.prod(x.shape)


def nbytes(x: Expr) -> int:
    """Bytes of the tensor as stored."""
    return elements(x) * SIZES[x.dtype]


def pieces(x: Expr) -> Iterator[Expr]:
    """The expressions whose bytes, one after the other, are those of `x`."""
    if isinstance(x, Concat | Stack):
        for part in x.xs:
            yield from pieces(part)
    else:
        yield x


def reads(x: Expr) -> Iterator[Read]:
    """The source tensors that `x` is made of."""
    match x:
        case Read():
            yield x
        case Gate() | Zeros():
            return
        case LowRank():
            yield from reads(x.x)
            yield from (x.b, x.a)
        case Concat() | Stack():
            for part in x.xs:
                yield from reads(part)
        case _:
            yield from reads(x.x)


def gate_layers(x: Expr) -> Iterator[int]:
    """The layers whose gates `x` is made of."""
    match x:
        case Gate():
            yield x.layer
        case Read() | Zeros():
            return
        case Concat() | Stack():
            for part in x.xs:
                yield from gate_layers(part)
        case _:
            yield from gate_layers(x.x)
