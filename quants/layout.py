"""Which tensors a GGUF file has, each as an expression over the checkpoint's: names, stacked experts, permuted rows.

Everything follows from config.json and the names, dtypes and shapes of the tensors; no weight is read and torch is not
imported. A family is one entry in FAMILIES.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from merge.dtypes import WEIGHT_DTYPES
from merge.errors import SourceError
from merge.expr import Expr
from quants.filetypes import (
    FILE_TYPES,
    FileType,
    ModelShape,
    file_order,
    padded,
    quantised_bytes,
    tensor_types,
)

# What the metadata of a file takes beside its tensors' names: the vocabulary, mostly. Bytes per entry of it (text, type,
# score or merge), as measured on files of the Llama, Mistral and SmolLM2 tokenizers; only predictions use it.
VOCABULARY_BYTES = 36


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


GgufExpr = Expr | Permute | Stack | RopeFactors


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file: its name there, and what it is made of. Shapes have the row length last, as in torch."""

    name: str
    expr: GgufExpr


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a file in the order in which they are written, and what else the quantiser has to know."""

    architecture: str
    tensors: tuple[GgufTensor, ...]
    model: ModelShape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.expr.shape for tensor in self.tensors}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.expr.shape) for tensor in self.tensors)

    def types(self, file_type: FileType) -> dict[str, str]:
        """The type of each tensor in a file of `file_type`."""
        return tensor_types(file_type, self.shapes, self.model)


Tensors = Mapping[str, Expr]
Lay = Callable[[Mapping[str, Any], Tensors], Layout]


def gguf_layout(config: Mapping[str, Any], tensors: Tensors) -> Layout:
    """The layout of the GGUF file of a checkpoint.

    `config` is config.json; `tensors` maps the family's own Hub names to expressions. Raises SourceError for a model type
    that is not supported, for a tensor that has no place in the file, and for one that is missing.
    """
    model_type = str(config.get("model_type"))
    lay = FAMILIES.get(model_type)
    if lay is None:
        known = ", ".join(sorted(FAMILIES))
        raise SourceError(f"no GGUF can be made of a model of type {model_type!r}; supported are {known}")
    for name, x in tensors.items():
        if x.dtype not in WEIGHT_DTYPES:
            raise SourceError(f"tensor {name!r} has dtype {x.dtype}, which GGUF has no weights of; cast it first")
    return lay(config, tensors)


def predict_sizes(config: Mapping[str, Any], tensors: Tensors, types: Iterable[str]) -> dict[str, int]:
    """Predicted bytes of the file of each type.

    Tensor data and the tensor list are exact; the metadata (under 2 MB for 32,000 tokens) is estimated from the size of
    the vocabulary.
    """
    layout = gguf_layout(config, tensors)
    shapes = layout.shapes
    # Per tensor: length and text of the name, number of dimensions, dimensions, type, offset.
    listing = sum(8 + len(name) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    metadata = padded(listing + VOCABULARY_BYTES * int(config.get("vocab_size", 0)))
    return {name: metadata + quantised_bytes(FILE_TYPES[name], shapes, layout.model) for name in types}


_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
# Buffers that some old checkpoints store and that follow from the configuration.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


def llama_layout(config: Mapping[str, Any], tensors: Tensors) -> Layout:
    """Mixtral, and the dense Llama and Mistral: llama.cpp's architecture `llama`.

    Mixtral's experts (w1 gate, w2 down, w3 up) are stacked; query and key rows are permuted; with tied embeddings there
    is no output tensor unless the checkpoint stores one.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise SourceError(f"config.json has hidden_act {activation!r}; llama.cpp computes this architecture with silu")
    layers = _number(config, "num_hidden_layers")
    heads = _number(config, "num_attention_heads")
    experts = int(config.get("num_local_experts") or 0) if config["model_type"] == "mixtral" else 0
    kv_heads = _kv_heads(config, tensors, heads)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    found: dict[str, GgufExpr] = {}
    stacks: dict[tuple[int, str], dict[int, Expr]] = {}
    for name, x in tensors.items():
        if name.endswith(_BUFFERS):
            continue
        layer = _LAYER_NAME.match(name)
        if layer and int(layer[1]) >= layers:
            raise SourceError(f"tensor {name!r} lies beyond the {layers} layers that config.json gives")
        if expert := _EXPERT.fullmatch(name):
            stacks.setdefault((int(expert[1]), expert[3]), {})[int(expert[2])] = x
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise SourceError(f"tensor {name!r} has no place in a GGUF file of this architecture")
        permuted = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        found[new_name] = Permute(x, permuted) if permuted else x
    for (layer_index, weight), parts in stacks.items():
        if sorted(parts) != list(range(experts)):
            raise SourceError(
                f"layer {layer_index} has {weight} of experts {sorted(parts)}; config.json says {experts} experts"
            )
        stacked = Stack(tuple(parts[expert] for expert in range(experts)))
        if len({(x.shape, x.dtype) for x in stacked.xs}) > 1:
            raise SourceError(f"the experts of layer {layer_index} differ in the shape or dtype of {weight}")
        new_name = names.get_name(f"layers.{layer_index}.feed_forward.experts.{weight}.weight", (".weight",))
        assert new_name is not None
        found[new_name] = stacked
    if factors := _rope_factors(config):
        found["rope_freqs.weight"] = factors
    _require_all(found, layers, experts, tied=bool(config.get("tie_word_embeddings")))
    ordered = tuple(GgufTensor(name, found[name]) for name in sorted(found, key=file_order))
    return Layout("llama", ordered, ModelShape(layers, experts, heads, kv_heads))


FAMILIES: Mapping[str, Lay] = MappingProxyType(
    {"mixtral": llama_layout, "llama": llama_layout, "mistral": llama_layout}
)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's parameters, from either of the places where configs of different ages keep them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key not in found and config.get(key) is not None:
            found[key] = config[key]
    if "rope_type" not in found and "type" in found:
        found["rope_type"] = found["type"]
    # transformers' own default, for the kinds of scaling that have the entry.
    if str(found.get("rope_type")).lower() in ("llama3", "yarn"):
        found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 8192))
    return found


def head_size(config: Mapping[str, Any]) -> int:
    """Rows of one attention head."""
    return int(config.get("head_dim") or 0) or _number(config, "hidden_size") // _number(config, "num_attention_heads")


def _kv_heads(config: Mapping[str, Any], tensors: Tensors, heads: int) -> int:
    """Key-value heads, checked against the tensors: families differ in what a missing entry means."""
    key = tensors.get("model.layers.0.self_attn.k_proj.weight")
    if key is None:
        raise SourceError("tensor 'model.layers.0.self_attn.k_proj.weight' is missing from the checkpoint")
    size = head_size(config)
    from_shape = key.shape[0] // size
    stated = config.get("num_key_value_heads") or from_shape
    if key.shape[0] % size or from_shape != stated or heads % from_shape:
        raise SourceError(
            f"config.json says {stated} key-value heads of {size} rows each, but k_proj has {key.shape[0]} rows"
        )
    return int(from_shape)


def _rope_factors(config: Mapping[str, Any]) -> RopeFactors | None:
    """The factors that a GGUF file has as a tensor; None for other kinds of rotary scaling, which it has as numbers."""
    rope = rope_parameters(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    return RopeFactors(
        head_size=head_size(config),
        theta=float(rope.get("rope_theta", 10000.0)),
        factor=float(rope.get("factor", 8.0)),
        low=float(rope.get("low_freq_factor", 1.0)),
        high=float(rope.get("high_freq_factor", 4.0)),
        context=float(rope["original_max_position_embeddings"]),
    )


def _require_all(found: Mapping[str, object], layers: int, experts: int, tied: bool) -> None:
    """Raises SourceError if a tensor that llama.cpp needs is missing."""
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"]
    parts += (
        ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
        if experts
        else ["ffn_gate", "ffn_up", "ffn_down"]
    )
    needed = [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    needed += ["token_embd.weight", "output_norm.weight"] + ([] if tied else ["output.weight"])
    missing = [name for name in needed if name not in found]
    if missing:
        raise SourceError(f"the checkpoint lacks what GGUF calls {missing[0]} ({len(missing)} tensors are missing)")


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise SourceError(f"config.json has no usable {key!r} ({value!r})")
    return value
