"""What a dense Llama-shaped model is, from its config.json: sizes, tensors, RoPE. The input side of every family.

Names and defaults are those of transformers' own configuration classes
(https://github.com/huggingface/transformers/tree/main/src/transformers/models): a key that config.json leaves out means the
class's default, and the classes do not all have the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# By model_type: what an absent key means. `None` for head_dim: hidden_size / num_attention_heads.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    },
    "mistral": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096 * 32, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "sliding_window": 4096,
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    },
}  # fmt: skip
# Far above any model that exists; a larger number in a config is a mistake or an attack.
MAX_LAYERS = 1000
MAX_SIZE = 2**24

# The three matrices of a gated MLP, in the order the families list them.
MLP_PARTS = ("gate_proj", "down_proj", "up_proj")


class ConfigError(ValueError):
    """A config.json that cannot be: the message says what about it."""


@dataclass(frozen=True)
class DenseModel:
    """A dense decoder's shape. `rope_scaling` is None for the plain RoPE, otherwise the parameters with their
    `rope_type`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    sliding_window: int | None
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    token_ids: Mapping[str, Any]

    @property
    def rope(self) -> str:
        """The RoPE in words, to compare and to show."""
        scaling = self.rope_scaling
        return f"theta {self.rope_theta:g}" + (f", {scaling['rope_type']} scaling" if scaling else "")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the checkpoint with its shape, in the order of the layers."""
        hidden, query, key = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            for name, rows, columns in (
                ("q_proj", query, hidden),
                ("k_proj", key, hidden),
                ("v_proj", key, hidden),
                ("o_proj", hidden, query),
            ):
                yield f"{prefix}self_attn.{name}.weight", (rows, columns)
                if self.attention_bias:
                    yield f"{prefix}self_attn.{name}.bias", (rows,)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            for part in MLP_PARTS:
                rows, columns = self.mlp_shape(part)
                yield mlp_tensor(layer, part), (rows, columns)
                if self.mlp_bias:
                    yield mlp_tensor(layer, part, "bias"), (rows,)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)

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
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise ConfigError(f"model_type {model_type!r} is not a dense model we know")
    defaults = DEFAULTS[model_type]

    def get(key: str) -> Any:
        value = config.get(key)
        return defaults.get(key) if value is None and key != "sliding_window" else value

    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if config.get("num_key_value_heads") is None and model_type == "mistral":
        kv_heads = 8
    if config.get("head_dim") is None:
        if hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    else:
        head_dim = _size(config, "head_dim")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    layers = _size(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {layers}, more than any model has")
    window = config["sliding_window"] if "sliding_window" in config else defaults["sliding_window"]
    if window is not None and (type(window) is not int or window <= 0):
        raise ConfigError(f"sliding_window is {window!r}")
    theta, scaling = _rope(config, defaults["rope_theta"])
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
        rms_norm_eps=_positive(get("rms_norm_eps"), "rms_norm_eps"),
        max_position_embeddings=int(_positive(get("max_position_embeddings"), "max_position_embeddings")),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        tied=_flag(get("tie_word_embeddings"), "tie_word_embeddings"),
        attention_bias=_flag(get("attention_bias"), "attention_bias"),
        mlp_bias=_flag(get("mlp_bias"), "mlp_bias"),
        initializer_range=_positive(get("initializer_range"), "initializer_range"),
        token_ids={key: _token_id(config.get(key, defaults[key]), key) for key in defaults if key.endswith("token_id")},
    )


def _rope(config: Mapping[str, Any], default_theta: float) -> tuple[float, Mapping[str, Any] | None]:
    """RoPE from either spelling: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""
    both = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(both, dict):
        raise ConfigError("rope_scaling is not a mapping")
    scaling = {key: value for key, value in both.items() if key not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", both.get("type", "default"))
    theta = both.get("rope_theta", config.get("rope_theta"))
    theta = _positive(default_theta if theta is None else theta, "rope_theta")
    factor = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {factor} is not one of a Llama model")
    scaling.pop("partial_rotary_factor", None)
    if not isinstance(scaling["rope_type"], str):
        raise ConfigError("rope_scaling has no type")
    return theta, None if scaling["rope_type"] == "default" else scaling


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise ConfigError(f"{key} is missing")
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise ConfigError(f"{key} is {str(value)[:40]}, which cannot be a size")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**53 or math.isnan(value):
        raise ConfigError(f"{key} is {str(value)[:40]}, which is not a positive number")
    return value


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
