"""What a dense model is, from its config.json: sizes, tensors, RoPE, windows. The input side of every family.

What the model types have in common stands here; what differs, in `model_types.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge.families.model_types import ATTENTION, MLP_PARTS, MODEL_TYPES, ModelType

# Far above any model that exists; a larger number in a config is a mistake or an attack.
MAX_LAYERS = 1000
MAX_SIZE = 2**24
# The kinds of attention that `layer_types` names: without and with a sliding window.
LAYER_TYPES = ("full_attention", "sliding_attention")


class ConfigError(ValueError):
    """A config.json that cannot be: the message says what about it."""


@dataclass(frozen=True)
class DenseModel:
    """A dense decoder's shape. `rope_scaling` is None for the plain RoPE, otherwise the parameters with their `rope_type`.
    `sliding_window` is None where no layer has one, and `sliding_layers` says for each layer whether it has. `biased` names
    the projections with a bias. `carried` are the model type's own numbers (Granite's multipliers), by config key, and `latent` those of an
    attention through latents."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_act: str
    norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    tied: bool
    biased: frozenset[str]
    initializer_range: float
    token_ids: Mapping[str, Any]
    carried: Mapping[str, Any] = field(default_factory=dict)
    latent: Mapping[str, Any] | None = None

    @property
    def rope(self) -> str:
        """The RoPE in words, to compare and to show."""
        scaling = self.rope_scaling
        return f"theta {self.rope_theta:g}" + (f", {scaling['rope_type']} scaling" if scaling else "")

    @property
    def heads_fill_hidden(self) -> bool:
        """Whether the size of a head is hidden_size / num_attention_heads."""
        return self.heads * self.head_dim == self.hidden_size

    @property
    def layer_types(self) -> list[str]:
        """For each layer, whether it has the sliding window, as config.json says it."""
        return [LAYER_TYPES[slides] for slides in self.sliding_layers]

    @property
    def attention_bias(self) -> bool:
        """Whether all four projections of the attention have a bias."""
        return self.biased.issuperset(ATTENTION)

    def shared_config(self, architecture: str, torch_dtype: str) -> dict[str, Any]:
        """The part of the result's config.json that says what the base's said. RoPE in the spelling that transformers 4 and
        5, vLLM and llama.cpp all read; the window belongs to the families that have one."""
        config = {
            "architectures": [architecture],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            MODEL_TYPES[self.model_type].eps_key: self.norm_eps,
            "use_cache": True,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "attention_dropout": 0.0,
            "output_router_logits": False,
            "torch_dtype": torch_dtype,
            **self.token_ids,
        }
        if self.rope_scaling:
            config["rope_scaling"] = dict(self.rope_scaling)
        return config

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the checkpoint with its shape, in the order of the layers."""
        kind = MODEL_TYPES[self.model_type]
        hidden, query, key = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
        }
        latent_norms: dict[str, int] = {}
        if self.latent is not None:
            attention, latent_norms = self._latent_attention(self.latent)
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for norm in kind.norms:
                yield f"{prefix}{norm}.weight", (hidden,)
            for name, shape in attention.items():
                yield f"{prefix}self_attn.{name}.weight", shape
                if name in self.biased:
                    yield f"{prefix}self_attn.{name}.bias", shape[:1]
            for name, size in latent_norms.items():
                yield f"{prefix}self_attn.{name}.weight", (size,)
            for name in kind.head_tensors:
                yield f"{prefix}self_attn.{name}", (self.heads,)
            for norm, size in zip(kind.head_norms, (query, key), strict=bool(kind.head_norms)):
                yield f"{prefix}self_attn.{norm}.weight", (size if kind.norms_all_heads else self.head_dim,)
            for part in MLP_PARTS:
                rows, columns = self.mlp_shape(part)
                yield mlp_tensor(layer, part), (rows, columns)
                if part in self.biased:
                    yield mlp_tensor(layer, part, "bias"), (rows,)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def _latent_attention(self, latent: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
        """The matrices of an attention through latents, and the norms of these."""
        hidden, query_rank, rank = self.hidden_size, latent["q_lora_rank"], latent["kv_lora_rank"]
        plain, turned, value = latent["qk_nope_head_dim"], latent["qk_rope_head_dim"], latent["v_head_dim"]
        query, norms = self.heads * (plain + turned), {"kv_a_layernorm": rank}
        matrices = {"q_proj": (query, hidden)}
        if query_rank is not None:
            matrices = {"q_a_proj": (query_rank, hidden), "q_b_proj": (query, query_rank)}
            norms["q_a_layernorm"] = query_rank
        matrices |= {
            "kv_a_proj_with_mqa": (rank + turned, hidden),
            "kv_b_proj": (self.heads * (plain + value), rank),
            "o_proj": (hidden, self.heads * value),
        }
        return matrices, norms

    def mlp_shape(self, part: str) -> tuple[int, int]:
        """Shape (rows, columns) of one MLP matrix."""
        if part == "down_proj":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def is_ignored(self, tensor: str) -> bool:
        """Whether transformers itself does not read `tensor`: old checkpoints store RoPE's frequencies, which follow from
        the config, and some store the output matrix although it is tied to the embedding."""
        return tensor.endswith(".rotary_emb.inv_freq") or (self.tied and tensor == "lm_head.weight")


def mlp_tensor(layer: int, part: str, kind: str = "weight") -> str:
    """The Hub's name of an MLP tensor of a dense model."""
    return f"model.layers.{layer}.mlp.{part}.{kind}"


def dense_model(config: Mapping[str, Any]) -> DenseModel:
    """Read a dense model's config.json. Raises ConfigError where a value is missing or cannot be."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type {model_type!r} is not a dense model we know")
    kind = MODEL_TYPES[model_type]

    def get(key: str) -> Any:
        value = config.get(key)
        return kind.defaults.get(key) if value is None else value

    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    # An absent key means the class's default, but `null` means one for each query head.
    kv_heads = config.get("num_key_value_heads", kind.defaults["num_key_value_heads"])
    kv_heads = heads if kv_heads is None else _size({"num_key_value_heads": kv_heads}, "num_key_value_heads")
    if (head_dim := get("head_dim")) is None:
        if hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    latent = _latent(config, kind.defaults) if kind.latent else None
    head_dim = latent["qk_rope_head_dim"] if latent else _size({"head_dim": head_dim}, "head_dim")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    layers = _size(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {layers}, more than any model has")
    window, sliding_layers = _windows(config, kind, layers)
    theta, scaling = _rope(config, kind.defaults)
    biases = {name for key, names in kind.biases.items() if _flag(get(key), key) for name in names}
    return DenseModel(
        model_type=model_type,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=_text(get("hidden_act"), "hidden_act"),
        norm_eps=_positive(get(kind.eps_key), kind.eps_key),
        max_position_embeddings=int(_positive(get("max_position_embeddings"), "max_position_embeddings")),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=sliding_layers,
        tied=_flag(get("tie_word_embeddings"), "tie_word_embeddings"),
        biased=frozenset(biases | set(kind.always_biased)),
        initializer_range=_positive(get("initializer_range"), "initializer_range"),
        token_ids={
            key: _token_id(config.get(key, default), key)
            for key, default in kind.defaults.items()
            if key.endswith("token_id")
        },
        carried={key: _positive(get(key), key) for key in kind.carried}
        | {key: _per_layer(config[key], key, layers) for key in kind.carried_by_layer if config.get(key) is not None},
        latent=latent,
    )


def _latent(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of an attention through latents. Queries may do without one: `q_lora_rank` is null then."""
    whole = {**defaults, **config}
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
    rank = None if whole["q_lora_rank"] is None else _size(whole, "q_lora_rank")
    return {
        "q_lora_rank": rank,
        **{key: _size(whole, key) for key in sizes},
        "rope_interleave": _flag(whole["rope_interleave"], "rope_interleave"),
    }


def _windows(config: Mapping[str, Any], kind: ModelType, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window, and which layers have it."""
    nowhere = None, (False,) * layers
    if kind.slides is None:  # such a model ignores the keys
        return nowhere
    in_use = _flag(config.get("use_sliding_window") or False, "use_sliding_window")
    if "use_sliding_window" in kind.defaults and not in_use:
        return nowhere
    window = config.get("sliding_window", kind.defaults["sliding_window"])
    if window is None:
        return nowhere
    if type(window) is not int or window <= 0:
        raise ConfigError(f"sliding_window is {window!r}")
    types = config.get("layer_types") if kind.reads_layer_types else None
    if types is None:
        period = config.get(kind.period_key, kind.period)
        if type(period) is not int or not kind.least_period <= period <= MAX_SIZE:
            raise ConfigError(f"{kind.period_key} is {period!r}")
        sliding = tuple(kind.slides(layer, period) for layer in range(layers))
    elif not isinstance(types, list) or len(types) != layers or any(name not in LAYER_TYPES for name in types):
        raise ConfigError(f"layer_types is not a list of {' and '.join(LAYER_TYPES)} for {layers} layers")
    else:
        sliding = tuple(name == LAYER_TYPES[1] for name in types)
    return (window, sliding) if any(sliding) else nowhere


def _rope(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """RoPE from either spelling: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""
    both = config.get("rope_parameters") or config.get("rope_scaling") or defaults.get("rope_scaling") or {}
    if not isinstance(both, dict):
        raise ConfigError("rope_scaling is not a mapping")
    if any(isinstance(value, dict) for value in both.values()):
        raise ConfigError("rope_parameters differ from layer to layer")
    scaling = {key: value for key, value in both.items() if key not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", both.get("type", "default"))
    theta = both.get("rope_theta", config.get("rope_theta"))
    theta = _positive(defaults["rope_theta"] if theta is None else theta, "rope_theta")
    factor = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {factor} is not one of a Llama model")
    scaling.pop("partial_rotary_factor", None)
    if not isinstance(scaling["rope_type"], str):
        raise ConfigError("rope_scaling has no type")
    if scaling["rope_type"] == "default":
        return theta, None
    # Some configs have it beside the RoPE's parameters, where transformers gives it precedence.
    if config.get("original_max_position_embeddings") is not None:
        scaling["original_max_position_embeddings"] = _size(config, "original_max_position_embeddings")
    return theta, scaling


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise ConfigError(f"{key} is missing")
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise ConfigError(f"{key} is {str(value)[:40]}, which cannot be a size")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**53:
        raise ConfigError(f"{key} is {str(value)[:40]}, which is not a positive number")
    return value


def _per_layer(value: Any, key: str, layers: int) -> list[float]:
    if not isinstance(value, list) or len(value) != layers:
        raise ConfigError(f"{key} is not a list of {layers} numbers, one for each layer")
    return [number if number == 0 else _positive(number, key) for number in value]


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {str(value)[:40]}, not true or false")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise ConfigError(f"{key} is {str(value)[:40]!r}, which is not a name")
    return value


def _token_id(value: Any, key: str) -> Any:
    values = value if isinstance(value, list) else [value]
    if not all(item is None or (type(item) is int and 0 <= item <= MAX_SIZE) for item in values):
        raise ConfigError(f"{key} is {str(value)[:40]}, which is not a token")
    return value
