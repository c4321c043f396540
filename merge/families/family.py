"""What a family's module provides, and what it is given: the mixture of one layer before its tensors have names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from merge.expr import Expr, Zeros
from merge.families.dense import DenseModel

# The three matrices of an MLP, by the dense model's name of each: gate_proj, down_proj, up_proj.
Mlp: TypeAlias = Mapping[str, Expr]

# How a family's shared expert is weighed: there is none, or by a gate of its own, or not at all.
NO_SHARED, GATED_SHARED, PLAIN_SHARED = "none", "gated", "plain"
# A reason for there being no GGUF file.
NO_ARCHITECTURE = "llama.cpp has no such models"


@dataclass(frozen=True)
class Mixture:
    """What the recipe asks for: `experts` experts, `per_token` of them for a token, and perhaps a shared one."""

    experts: int
    per_token: int
    has_shared: bool
    torch_dtype: str


@dataclass(frozen=True)
class MixtureKeys:
    """How the config.json of a family's model tells what it is a mixture of.

    `dense`: the dense model_type that has its attention, norms and RoPE. `defaults`: what an absent key means where that is
    not what it means in the dense model. `expert_size`: the key of an expert's MLP size. The shared expert's size is that of
    `shared_size`, or else as many times an expert's as `shared_count` says. In transformers 5's memory, and in what some
    programs write, all experts of a layer are two tensors under `joined`; `in_memory` are pairs of what a part of another
    tensor's name is on the Hub and there.
    """

    dense: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    expert_size: str = "intermediate_size"
    shared_size: str | None = None
    shared_count: str | None = None
    joined: str = "mlp.experts"
    in_memory: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Block:
    """The mixture of one layer. `router` has shape (experts, hidden), `shared_gate` (1, hidden); `dtype` is the result's.
    `correction`, shape (experts,), is what some families add to the router's numbers for the choice of experts alone."""

    layer: int
    base: DenseModel
    dtype: str
    router: Expr
    experts: tuple[Mlp, ...]
    shared: Mlp | None = None
    shared_gate: Expr | None = None
    correction: Expr | None = None

    def zeros(self, *shape: int) -> Zeros:
        """Zeros of this shape in the result's dtype."""
        return Zeros(self.dtype, shape)


class Family(Protocol):
    """What a family's module provides.

    NAME is the result's model_type; ALIASES are further names that a recipe's `architecture` may begin, mergekit's among
    them. ACCEPTS are the dense model_types it takes. SHARED says whether it has a shared expert. NORMALISES: whether the
    weights of a token's experts sum to one, so that experts equal to the base give the base. WINDOW: whether it can have
    the base's sliding window. KEYS are for reading such a model: as the source of an expert, or to add experts to it.
    """

    NAME: str
    TITLE: str
    ALIASES: tuple[str, ...]
    ACCEPTS: tuple[str, ...]
    SHARED: str
    NORMALISES: bool
    WINDOW: bool
    KEYS: MixtureKeys

    def lacks(self, base: DenseModel) -> Iterator[str]:
        """What the base has and such a model cannot have, in words; tensors aside."""

    def why_no_gguf(self, base: DenseModel, mixture: Mixture) -> str | None:
        """Why no GGUF file can be made of such a model; None where one can."""

    def keeps(self, tensor: str) -> bool:
        """Whether such a model has a place for this tensor of the dense model, under the same name."""

    def block_tensors(self, block: Block) -> Iterator[tuple[str, Expr]]:
        """The tensors that a layer has instead of the dense model's MLP, under the Hub's names."""

    def output_config(self, base: DenseModel, mixture: Mixture) -> dict[str, Any]:
        """config.json of the result."""


def no_gguf_rope(base: DenseModel, *known: str) -> str | None:
    """Why the base's rotary embedding keeps a GGUF file from being made, where llama.cpp knows the scalings `known`."""
    kind = base.rope_scaling["rope_type"] if base.rope_scaling else "default"
    return None if kind in ("default", *known) else f"llama.cpp has no rotary scaling of type {kind!r} for such models"
