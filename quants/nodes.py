"""What a GGUF tensor is made of, beyond what a plan's expressions say: stacked experts, parts, heads, permuted rows.

Plain values like merge.expr's; quants.rows turns them into numbers. Shapes have the row length last, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge.expr import Expr


@dataclass(frozen=True, slots=True)
class Permute:
    """The rows of a query or key projection in the order that llama.cpp's rotary embedding takes.

    transformers rotates the first half of a head's rows with the second, llama.cpp neighbours: within each of the `heads`,
    rows 0, 1, 2 … of the two halves interleave. Shape (heads * head size, …).
    """

    x: Expr
    heads: int

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class Stack:
    """Equal-shaped tensors (one per expert) as one: shape (experts, …)."""

    xs: tuple[Expr, ...]

    @property
    def dtype(self) -> str:
        return self.xs[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.xs), *self.xs[0].shape)


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count` of a matrix whose rows hold several projections, gate before up.

    Of x (…, count * rows, columns) rows index * rows to (index + 1) * rows: shape (…, rows, columns).
    """

    x: Expr
    index: int
    count: int

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, height, width = self.x.shape
        return (*leading, height // self.count, width)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Of each of the `heads` of a matrix the rows start..stop: shape (heads, stop - start, columns), or `turned` (heads, columns,
    stop - start).

    DeepSeek's attention through latents has keys and values in one matrix (heads * (key + value), latent), llama.cpp in two,
    that of the keys turned, for it multiplies it into the queries.
    """

    x: Expr
    heads: int
    start: int
    stop: int
    turned: bool = False

    @property
    def dtype(self) -> str:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        height, width = self.stop - self.start, self.x.shape[-1]
        return (self.heads, width, height) if self.turned else (self.heads, height, width)


@dataclass(frozen=True, slots=True)
class RopeFactors:
    """Llama 3.1's rotary scaling as one divisor per frequency: float32, shape (head size / 2).

    Wavelengths over `context / low` are stretched by `factor`, those under `context / high` not, those between in part.
    """

    head_size: int
    theta: float
    factor: float
    low: float
    high: float
    context: float

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.head_size // 2,)


GgufExpr = Expr | Permute | Stack | Part | HeadRows | RopeFactors
