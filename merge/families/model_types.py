"""The dense models that a merge reads, by model_type: what an absent key of config.json means, and which tensors a layer has.

Names and defaults are those of transformers' own configuration and modelling classes
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/MODEL_TYPE). The classes do not all have the
same defaults, so each type lists its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The three matrices of a gated MLP, in the order the families list them.
MLP_PARTS = ("gate_proj", "down_proj", "up_proj")


@dataclass(frozen=True)
class ModelType:
    """One dense model_type.

    `defaults`: what an absent key means; `head_dim` None is hidden_size / num_attention_heads, `num_key_value_heads` None is
    num_attention_heads. `norms`: a layer's norms of the hidden size. `head_norms`: the norms of queries and keys, of one
    head's size, or of all heads together where `norms_all_heads`. `biases`: by config key, the projections that have a bias
    where it is true; `always_biased` have one in any case. `windows`: which layers have a sliding window (see `_windows` in
    dense.py). `carried`: numbers that the forward pass uses beside the usual ones.
    """

    defaults: Mapping[str, Any]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    norms_all_heads: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"attention_bias": ATTENTION, "mlp_bias": MLP_PARTS}
    )
    always_biased: tuple[str, ...] = ()
    windows: str = "none"
    carried: tuple[str, ...] = ()
    eps_key: str = "rms_norm_eps"


_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "initializer_range": 0.02, "head_dim": None,
    "num_key_value_heads": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_LLAMA = _COMMON | {"mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = _COMMON | {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip

MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(_LLAMA),
    "mistral": ModelType(
        _COMMON
        | {"max_position_embeddings": 4096 * 32, "sliding_window": 4096, "num_key_value_heads": 8}
        | {"bos_token_id": 1, "eos_token_id": 2},
        biases={},
        windows="all layers",
    ),
    "qwen2": ModelType(_QWEN, biases={}, always_biased=("q_proj", "k_proj", "v_proj"), windows="upper layers"),
    "qwen3": ModelType(
        _QWEN | {"head_dim": 128},
        head_norms=("q_norm", "k_norm"),
        biases={"attention_bias": ATTENTION},
        windows="upper layers",
    ),
    "granite": ModelType(
        _LLAMA
        | {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0},
        carried=("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
    ),
    "olmo2": ModelType(
        _COMMON | {"rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=("q_norm", "k_norm"),
        norms_all_heads=True,
        biases={"attention_bias": ATTENTION},
    ),
}
