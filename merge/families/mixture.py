"""A mixture-of-experts model that is a source: what it is, from its config.json, and where its experts lie in its tensors.

A family says how such a model is written (`block_tensors`). Reading turns that around: the same function is given symbols for
the router and the experts, and where it puts them is where they are found. transformers 5 has all experts of a layer in one
tensor in its memory, and some programs write that, mergekit-moe among them; it is read as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge.expr import Concat, Expr, Read, Stack, elements, pieces
from merge.families.dense import ConfigError, DenseModel, dense_model
from merge.families.family import GATED_SHARED, NO_SHARED, Block, Family, Mlp
from merge.families.model_types import MLP_PARTS
from merge.tensors import TensorInfo

# The families' and transformers' own names of these numbers.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")
# More than any model has.
MAX_EXPERTS = 4096


@dataclass(frozen=True)
class MoeModel:
    """A mixture-of-experts model's shape. `dense` is the dense model that it is a mixture of; `shared_size` is the MLP size of
    its shared expert, 0 where it has none; `dense_layers` are the layers that have an ordinary MLP instead of experts."""

    family: Family
    dense: DenseModel
    experts: int
    per_token: int
    shared_size: int
    dense_layers: tuple[int, ...]

    def symbols(self, layer: int) -> Block:
        """The mixture of a layer before it is known where it lies: each Read is a name for what is to be found."""
        hidden = self.dense.hidden_size
        return Block(
            layer=layer,
            base=self.dense,
            dtype="F32",
            router=Read("router", "", "F32", (self.experts, hidden)),
            experts=tuple(self._symbols(f"{index}", self.dense.intermediate_size) for index in range(self.experts)),
            shared=self._symbols("shared", self.shared_size) if self.shared_size else None,
            shared_gate=Read("shared gate", "", "F32", (1, hidden)) if self.family.SHARED == GATED_SHARED else None,
            correction=Read("correction", "", "F32", (self.experts,)),
        )

    def _symbols(self, name: str, size: int) -> Mlp:
        hidden = self.dense.hidden_size
        shapes = {part: (hidden, size) if part == "down_proj" else (size, hidden) for part in MLP_PARTS}
        return {part: Read(name, part, "F32", shape) for part, shape in shapes.items()}


@dataclass(frozen=True)
class MoeLayer:
    """Where the mixture of one layer lies in a checkpoint: each matrix a tensor, or a part of one. `tensors` are all that it is
    made of, with the shapes that the config means."""

    router: Expr
    experts: tuple[Mlp, ...]
    shared: Mlp | None
    shared_gate: Expr | None
    correction: Expr | None
    tensors: Mapping[str, tuple[int, ...]]


def moe_model(config: Mapping[str, Any], family: Family) -> MoeModel:
    """Read a mixture's config.json. Raises ConfigError where a value is missing or cannot be."""
    keys = family.KEYS
    config = {**keys.defaults, **config}
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("head_dim") is None and type(hidden) is int and type(heads) is int and heads > 0:
        config["head_dim"] = hidden // heads  # the dense model of the same name may have a size of its own
    size = _count(config, (keys.expert_size,))
    dense = dense_model(config | {"model_type": keys.dense, "intermediate_size": size})
    experts, per_token = _count(config, EXPERTS), _count(config, PER_TOKEN)
    if not 0 < experts <= MAX_EXPERTS or not 0 < per_token <= experts:
        raise ConfigError(f"it has {experts} experts, {per_token} of them for a token, which cannot be")
    shared = 0
    if family.SHARED != NO_SHARED:
        shared = _count(config, (keys.shared_size,), 0) if keys.shared_size else 0
        shared += _count(config, (keys.shared_count,), 0) * size if keys.shared_count else 0
    return MoeModel(family, dense, experts, per_token, shared, _dense_layers(config, dense.layers))


def mixed_config(config: Mapping[str, Any], experts: int, per_token: int, torch_dtype: str) -> dict[str, Any]:
    """The config.json of a mixture with another number of experts: everything else is as it was."""
    kept = {
        key: value for key, value in config.items() if key not in ("dtype", "transformers_version", "_name_or_path")
    }
    for keys, count in ((EXPERTS, experts), (PER_TOKEN, per_token)):
        for key in keys:
            if config.get(key) is not None:
                kept[key] = [count] * len(config[key]) if isinstance(config[key], list) else count
    return kept | {"torch_dtype": torch_dtype}


def locate(moe: MoeModel, layer: int, key: str, infos: Mapping[str, TensorInfo]) -> MoeLayer:
    """Where a layer's mixture lies in the checkpoint of source `key` with these tensors; what is in none of them stands under
    the Hub's name of it."""
    symbols = moe.symbols(layer)
    places: dict[tuple[str, str], tuple[str, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    on_hub = dict(moe.family.block_tensors(symbols))
    in_memory = {name: x for name, x in _in_memory(moe, symbols) if name in infos and name not in on_hub}
    for name, x in (on_hub | in_memory).items():
        start = 0
        for piece in pieces(x):
            if isinstance(piece, Read):
                places[piece.source, piece.tensor] = name, start
            start += elements(piece)
        shapes[name] = x.shape

    def read(symbol: Expr | None) -> Expr | None:
        if not isinstance(symbol, Read) or (symbol.source, symbol.tensor) not in places:
            return None
        name, start = places[symbol.source, symbol.tensor]
        return Read(key, name, infos[name].dtype if name in infos else "F32", symbol.shape, start)

    def mlp(symbol: Mlp) -> Mlp:
        return {part: x for part, x in ((part, read(symbol[part])) for part in MLP_PARTS) if x is not None}

    router = read(symbols.router)
    assert router is not None
    used = {name for name, _ in places.values()}
    return MoeLayer(
        router=router,
        experts=tuple(mlp(expert) for expert in symbols.experts),
        shared=mlp(symbols.shared) if symbols.shared else None,
        shared_gate=read(symbols.shared_gate),
        correction=read(symbols.correction),
        tensors={name: shapes[name] for name in used},
    )


def _in_memory(moe: MoeModel, symbols: Block) -> Iterator[tuple[str, Expr]]:
    """The tensors of a layer under the names of transformers 5's memory: the experts joined, the others renamed."""
    for name, x in moe.family.block_tensors(symbols):
        for part, other in moe.family.KEYS.in_memory:
            name = name.replace(part, other)
        yield name, x
    experts = f"model.layers.{symbols.layer}.{moe.family.KEYS.joined}"
    both = tuple(Concat((expert["gate_proj"], expert["up_proj"])) for expert in symbols.experts)
    yield f"{experts}.gate_up_proj", Stack(both)
    yield f"{experts}.down_proj", Stack(tuple(expert["down_proj"] for expert in symbols.experts))


def _dense_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers without experts. Each family has its own keys for them, which no other has."""
    types, listed = config.get("mlp_layer_types"), config.get("mlp_only_layers") or []
    first = _count(config, ("first_k_dense_replace",), 0)
    step = _count(config, ("decoder_sparse_step",), 1)
    every = _count(config, ("moe_layer_freq",), 1)
    start, interval = _count(config, ("moe_layer_start_index",), 0), _count(config, ("moe_layer_interval",), 1)
    end = config.get("moe_layer_end_index")
    end = layers - 1 if end in (None, -1) else _count(config, ("moe_layer_end_index",))
    if not isinstance(listed, list) or not (types is None or (isinstance(types, list) and len(types) == layers)):
        raise ConfigError("mlp_only_layers or mlp_layer_types is not a list of layers")
    if not step or not every or not interval:
        raise ConfigError("every how many layers there are experts is 0")

    def has_experts(layer: int) -> bool:
        by_number = layer >= first and layer % every == 0 and (layer + 1) % step == 0 and layer not in listed
        return (
            by_number
            and start <= layer <= end
            and (layer + 1) % interval == 0
            and (types is None or types[layer] == "sparse")
        )

    return tuple(layer for layer in range(layers) if not has_experts(layer))


def _count(config: Mapping[str, Any], keys: tuple[str, ...], default: int | None = None) -> int:
    """A number of config.json under the first of `keys` that is there; a list has it once for each layer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None:
            if type(value) is not int or not 0 <= value <= 2**24:
                raise ConfigError(f"{key} is {str(value)[:40]}, which is not a number of them")
            return value
    if default is None:
        raise ConfigError(f"{keys[0]} is missing")
    return default
