"""Which tensors a GGUF file has, each as an expression over the checkpoint's: names, stacked experts, permuted rows.

Everything follows from config.json and the names, dtypes and shapes of the tensors; no weight is read and torch is not
imported. What differs between families is in quants.families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from merge.dtypes import WEIGHT_DTYPES
from merge.errors import SourceError
from merge.expr import Expr
from quants.families import FAMILIES, GgufFamily, experts_of, first_moe_layer, why_not
from quants.filetypes import FILE_TYPES, FileType, padded
from quants.mixtures import ModelShape, file_order, quantised_bytes, tensor_types
from quants.nodes import GgufExpr, HeadRows, Part, Permute, RopeFactors, Stack

# The embedding, and the output matrix that may be tied to it.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# What the metadata of a file takes beside its tensors' names: the vocabulary, mostly. Bytes per entry of it (text, type,
# score or merge), as measured on files of the Llama, Mistral and SmolLM2 tokenizers; only predictions use it.
VOCABULARY_BYTES = 36


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file: its name there, and what it is made of. Shapes have the row length last, as in torch."""

    name: str
    expr: GgufExpr


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint's tensor went: into all of the GGUF tensor, or into that of one expert.

    Of a matrix that holds several projections it is part `part` of `parts` that went there.
    """

    tensor: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a file in the order in which they are written, and what else the quantiser has to know.

    `origins` tells of each tensor of the checkpoint where it is in the file.
    """

    architecture: str
    tensors: tuple[GgufTensor, ...]
    model: ModelShape
    origins: Mapping[str, tuple[Origin, ...]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.expr.shape for tensor in self.tensors}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.expr.shape) for tensor in self.tensors)

    def types(self, file_type: FileType, imatrix: bool = False) -> dict[str, str]:
        """The type of each tensor in a file of `file_type`, made with an importance matrix or without."""
        return tensor_types(file_type, self.shapes, self.model, imatrix)


Tensors = Mapping[str, Expr]


def gguf_layout(config: Mapping[str, Any], tensors: Tensors) -> Layout:
    """The layout of the GGUF file of a checkpoint.

    `config` is config.json; `tensors` maps the family's own Hub names to expressions (names with all experts in one tensor,
    as transformers has them in memory, are taken too). Raises SourceError for a model type that is not supported, for a
    tensor that has no place in the file, and for one that is missing.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise SourceError(f"no GGUF can be made of a model of type {model_type!r}; supported are {known}")
    for name, x in tensors.items():
        if x.dtype not in WEIGHT_DTYPES:
            raise SourceError(f"tensor {name!r} has dtype {x.dtype}, which GGUF has no weights of; cast it first")
    if why := why_not(config):
        raise SourceError(f"config.json has {why}")
    kind = str(rope_parameters(config).get("rope_type", "default")).lower()
    if kind != "default" and kind not in family.ropes:
        raise SourceError(
            f"config.json asks for rotary scaling of type {kind!r}, which llama.cpp has not for this family"
        )
    if family.own_output and config.get("tie_word_embeddings"):
        tensors = {OUTPUT: tensors[EMBEDDING], **tensors} if EMBEDDING in tensors else tensors
    return _Layouter(config, tensors, family).layout()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of GGUF files before they are made: `tensors` the data of all tensors by file type, exact, and `metadata` what
    stands before them in each (under 2 MB for 32,000 tokens), estimated from the size of the vocabulary."""

    tensors: Mapping[str, int]
    metadata: int

    @property
    def files(self) -> dict[str, int]:
        """By file type."""
        return {name: self.metadata + count for name, count in self.tensors.items()}


def predict_sizes(config: Mapping[str, Any], tensors: Tensors, types: Iterable[str]) -> Sizes:
    """Predicted sizes of the file of each type, all of them made together."""
    layout = gguf_layout(config, tensors)
    shapes, types = layout.shapes, list(types)
    # Per tensor: length and text of the name, number of dimensions, dimensions, type, offset.
    listing = sum(8 + len(name) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    metadata = padded(listing + VOCABULARY_BYTES * int(config.get("vocab_size", 0)))
    imatrix = wants_imatrix(types)
    data = {name: quantised_bytes(FILE_TYPES[name], shapes, layout.model, imatrix) for name in types}
    return Sizes(data, metadata)


def wants_imatrix(types: Iterable[str]) -> bool:
    """Whether an importance matrix is made for these file types: where one of them needs it, all of them use it."""
    return any(FILE_TYPES[name].needs_imatrix for name in types)


_EXPERT = re.compile(r"(model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts)\.(\d+)\.(\w+)\.weight")
_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9]\d*)\.")
_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
# Names that the gguf package does not know, or knows with a dot that is not there.
_OWN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
        "self_attn.sinks": "attn_sinks.weight",
    }
)
# The endings of tensors that hold several projections, or all experts, and the GGUF tensors they go to.
_FUSED = (
    (re.compile(r".*\.experts\.gate_up_proj(\.weight)?"), ("ffn_gate_exps", "ffn_up_exps")),
    (re.compile(r".*\.experts\.down_proj(\.weight)?"), ("ffn_down_exps",)),
    (re.compile(r".*\.block_sparse_moe\.input_linear\.weight"), ("ffn_gate_exps", "ffn_up_exps")),
    (re.compile(r".*\.block_sparse_moe\.output_linear\.weight"), ("ffn_down_exps",)),
    (re.compile(r".*\.shared_mlp\.input_linear\.weight"), ("ffn_gate_shexp", "ffn_up_shexp")),
)
# The matrices of an attention, and of one through latents.
_QKV = ("attn_q", "attn_k", "attn_v")
_LATENT = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b")
# Buffers that some old checkpoints store and that follow from the configuration.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


@lru_cache(maxsize=32)
def _name_map(architecture: str) -> Any:
    """gguf's table of the names in a model of one layer: that of all layers takes longer to make than all else of a layout."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == architecture)
    return get_tensor_name_map(arch, 1)


class _Layouter:
    """One checkpoint being laid out: query and key rows permuted where the family asks for it, experts stacked.

    With tied embeddings there is no output tensor unless the checkpoint stores one.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, family: GgufFamily) -> None:
        self.config, self.tensors, self.family = config, tensors, family
        self.layers = _number(config, "num_hidden_layers")
        self.heads = _number(config, "num_attention_heads")
        self.kv_heads = 1 if family.latent else _kv_heads(config, tensors, self.heads)
        self.experts = experts_of(config)
        self.names = _name_map(family.like or family.architecture)
        self.found: dict[str, GgufExpr] = {}
        self.stacks: dict[str, dict[int, tuple[str, Expr]]] = {}
        self.origins: dict[str, tuple[Origin, ...]] = {}

    def layout(self) -> Layout:
        for name, x in self.tensors.items():
            if not name.endswith(_BUFFERS):
                self._place(name, x)
        for new_name, parts in self.stacks.items():
            self._stack(new_name, parts)
        if factors := _rope_factors(self.config):
            self.found["rope_freqs.weight"] = factors
        self._require_all()
        ordered = tuple(GgufTensor(name, self.found[name]) for name in sorted(self.found, key=file_order))
        architecture = self.family.architecture
        model = ModelShape(self.layers, self.experts, self.heads, self.kv_heads, architecture)
        return Layout(architecture, ordered, model, self.origins)

    def _place(self, name: str, x: Expr) -> None:
        layer = _LAYER_NAME.match(name)
        if layer and int(layer[1]) >= self.layers:
            raise SourceError(f"tensor {name!r} lies beyond the {self.layers} layers that config.json gives")
        if (expert := _EXPERT.fullmatch(name)) and expert[4] in _PARTS and self.experts:
            new_name = f"blk.{expert[2]}.ffn_{_PARTS[expert[4]]}_exps.weight"
            self.stacks.setdefault(new_name, {})[int(expert[3])] = name, x
            return
        for pattern, targets in _FUSED:
            if layer and pattern.fullmatch(name):
                if "ffn_gate_up_exps" in self.family.experts and len(targets) == 2:
                    targets = ("ffn_gate_up_exps",)
                self._split(name, x, int(layer[1]), targets)
                return
        if layer and self.family.latent and name.endswith(".kv_b_proj.weight"):
            self._split_heads(name, x, int(layer[1]))
            return
        place = self._name(name, layer)
        if place is None:
            raise SourceError(f"tensor {name!r} has no place in a GGUF file of this architecture")
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        self._put(name, place, Permute(x, heads) if heads and self.family.permuted else x)
        self.origins[name] = (Origin(place),)

    def _name(self, name: str, layer: re.Match[str] | None) -> str | None:
        """GGUF's name of a tensor; None where it has none."""
        if layer and (own := _OWN_NAMES.get(name[layer.end() :])):
            return f"blk.{layer[1]}.{own}"
        in_first = f"model.layers.0.{name[layer.end() :]}" if layer else name
        found: str | None = self.names.get_name(in_first, try_suffixes=(".weight", ".bias"))
        return found.replace("blk.0.", f"blk.{layer[1]}.", 1) if found and layer else found

    def _put(self, name: str, new_name: str, x: GgufExpr) -> None:
        if new_name in self.found:
            raise SourceError(f"tensor {name!r} is in the checkpoint twice: there is another for GGUF's {new_name}")
        self.found[new_name] = x

    def _split(self, name: str, x: Expr, layer: int, targets: tuple[str, ...]) -> None:
        """A tensor of all experts, or of several projections."""
        of_experts = targets[0].endswith("_exps")
        if len(x.shape) != (3 if of_experts else 2) or x.shape[-2] % len(targets):
            raise SourceError(f"tensor {name!r} has shape {x.shape}, which is not one of {len(targets)} projections")
        if of_experts and x.shape[0] != self.experts:
            raise SourceError(f"tensor {name!r} is of {x.shape[0]} experts; config.json says {self.experts} experts")
        places = [Origin(f"blk.{layer}.{target}.weight", None, i, len(targets)) for i, target in enumerate(targets)]
        for place in places:
            self._put(name, place.tensor, Part(x, place.part, place.parts) if place.parts > 1 else x)
        self.origins[name] = tuple(places)

    def _split_heads(self, name: str, x: Expr, layer: int) -> None:
        """The matrix that makes keys and values of a latent, rows of a head's keys before those of its values."""
        keys, values = _number(self.config, "qk_nope_head_dim"), _number(self.config, "v_head_dim")
        if len(x.shape) != 2 or x.shape[0] != self.heads * (keys + values):
            raise SourceError(
                f"tensor {name!r} has shape {x.shape}; config.json says {keys} + {values} rows for each head"
            )
        at = f"blk.{layer}.attn"
        self._put(name, f"{at}_k_b.weight", HeadRows(x, self.heads, 0, keys, turned=True))
        self._put(name, f"{at}_v_b.weight", HeadRows(x, self.heads, keys, keys + values))
        self.origins[name] = tuple(Origin(f"{at}_{part}_b.weight", None, i, 2) for i, part in enumerate("kv"))

    def _stack(self, new_name: str, parts: Mapping[int, tuple[str, Expr]]) -> None:
        if sorted(parts) != list(range(self.experts)):
            raise SourceError(
                f"{new_name} has the experts {sorted(parts)} in the checkpoint; config.json says {self.experts} experts"
            )
        stacked = Stack(tuple(parts[expert][1] for expert in range(self.experts)))
        if len({(x.shape, x.dtype) for x in stacked.xs}) > 1:
            names = ", ".join(name for name, _ in parts.values())
            raise SourceError(f"the experts of {new_name} differ in shape or dtype: {names[:200]}")
        self._put(parts[0][0], new_name, stacked)
        for expert, (name, _) in parts.items():
            self.origins[name] = (Origin(new_name, expert),)

    def _require_all(self) -> None:
        """Raises SourceError if a tensor that llama.cpp needs is missing."""
        needed = ["token_embd.weight", "output_norm.weight"]
        family, tied = self.family, self.config.get("tie_word_embeddings")
        needed += [] if tied and not family.own_output else ["output.weight"]
        has_shared = family.shared_key is None or self.config.get(family.shared_key)
        for layer in range(self.layers):
            parts = [*family.norms, *(_LATENT if family.latent else _QKV), "attn_output", *family.attention]
            if self.experts and layer >= first_moe_layer(self.config):
                parts += ["ffn_gate_inp", *family.experts, *(family.shared if has_shared else ())]
            else:
                parts += ["ffn_gate", "ffn_up", "ffn_down"]
            needed += [f"blk.{layer}.{part}.weight" for part in parts]
        missing = [name for name in needed if name not in self.found]
        if missing:
            raise SourceError(f"the checkpoint lacks what GGUF calls {missing[0]} ({len(missing)} tensors are missing)")


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


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise SourceError(f"config.json has no usable {key!r} ({value!r})")
    return value
