"""The dense models that a merge reads, by model_type: what an absent key of config.json means, and which tensors a layer has.

Names and defaults are those of transformers' own configuration and modelling classes
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/MODEL_TYPE). The classes do not all have the
same defaults, so each type lists its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    head's size, or of all heads together where `norms_all_heads`. `head_tensors` have one number for each head. `biases`: by
    config key, the projections that have a bias where it is true; `always_biased` have one in any case.

    `slides(layer, period)` says whether a layer has the sliding window where the config has no `layer_types` (None: no layer
    ever has); the period is the config's `period_key`, or else `period`. `carried`: numbers of the config that the forward
    pass uses beside the usual ones; `carried_by_layer`: lists of them, one for each layer. `latent`: queries, keys and values
    are made through latents of fewer numbers (DeepSeek's multi-head latent attention).
    """

    defaults: Mapping[str, Any]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    norms_all_heads: bool = False
    head_tensors: tuple[str, ...] = ()
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"attention_bias": ATTENTION, "mlp_bias": MLP_PARTS}
    )
    always_biased: tuple[str, ...] = ()
    slides: Callable[[int, int], bool] | None = None
    period_key: str = ""
    period: int = 0
    least_period: int = 0
    reads_layer_types: bool = True
    carried: tuple[str, ...] = ()
    carried_by_layer: tuple[str, ...] = ()
    eps_key: str = "rms_norm_eps"
    latent: bool = False


_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "initializer_range": 0.02, "head_dim": None,
    "num_key_value_heads": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_LLAMA = _COMMON | {"mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = _COMMON | {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip
_UPPER_LAYERS: dict[str, Any] = {
    "slides": lambda layer, first: layer >= first, "period_key": "max_window_layers", "period": 28,
}  # fmt: skip
_GRANITE = _LLAMA | {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip
_CWM_ROPE = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")

MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(_LLAMA),
    "mistral": ModelType(
        _COMMON
        | {"max_position_embeddings": 4096 * 32, "sliding_window": 4096, "num_key_value_heads": 8}
        | {"bos_token_id": 1, "eos_token_id": 2},
        biases={},
        slides=lambda layer, _: True,
        reads_layer_types=False,
    ),
    "qwen2": ModelType(_QWEN, biases={}, always_biased=("q_proj", "k_proj", "v_proj"), **_UPPER_LAYERS),
    "qwen3": ModelType(
        _QWEN | {"head_dim": 128},
        head_norms=("q_norm", "k_norm"),
        biases={"attention_bias": ATTENTION},
        **_UPPER_LAYERS,
    ),
    "granite": ModelType(_GRANITE, carried=_MULTIPLIERS),
    "granite_swa": ModelType(
        _GRANITE
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_key_value_heads": 4, "sliding_window": 128}
        | {"bos_token_id": 100257, "eos_token_id": 100257, "tie_word_embeddings": True},
        head_tensors=("sinks",),
        slides=lambda layer, _: layer % 4 != 0,
        carried=_MULTIPLIERS,
        carried_by_layer=("layer_rope_theta",),
    ),
    "olmo2": ModelType(
        _COMMON | {"rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=("q_norm", "k_norm"),
        norms_all_heads=True,
        biases={"attention_bias": ATTENTION},
    ),
    "ministral": ModelType(
        _COMMON
        | {"max_position_embeddings": 4096 * 32, "sliding_window": 4096, "num_key_value_heads": 8}
        | {"bos_token_id": 1, "eos_token_id": 2},
        biases={},
        slides=lambda layer, _: True,
    ),
    "cwm": ModelType(
        _COMMON
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6, "num_key_value_heads": 8}
        | {"head_dim": 128, "mlp_bias": False, "sliding_window": 8192}
        | {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "rope_scaling": _CWM_ROPE},
        biases={"mlp_bias": MLP_PARTS},
        slides=lambda layer, _: layer % 4 != 0,
    ),
    "seed_oss": ModelType(
        _COMMON
        | {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "mlp_bias": False}
        | {"attention_bias": True, "attention_out_bias": False}
        | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        biases={
            "attention_bias": ("q_proj", "k_proj", "v_proj"),
            "attention_out_bias": ("o_proj",),
            "mlp_bias": MLP_PARTS,
        },
    ),
    "ernie4_5": ModelType(
        _COMMON
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0, "num_key_value_heads": 2}
        | {"head_dim": 128, "tie_word_embeddings": True, "use_bias": False}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        biases={"use_bias": (*ATTENTION, *MLP_PARTS)},
    ),
    "youtu": ModelType(
        _COMMON
        | {"max_position_embeddings": 131072, "num_key_value_heads": 16, "tie_word_embeddings": True}
        | {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
        | {"head_dim": 64, "rope_interleave": True, "initializer_range": 0.01976423537605237}
        | {"bos_token_id": 128000, "eos_token_id": 128001},
        biases={"attention_bias": ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")},
        latent=True,
    ),
    "hunyuan_v1_dense": ModelType(
        _COMMON | {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "eod_token_id": 3},
        head_norms=("query_layernorm", "key_layernorm"),
        biases={"attention_bias": ATTENTION},
    ),
    "cohere2": ModelType(
        {key: value for key, value in _COMMON.items() if key != "rms_norm_eps"}
        | {"layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True, "logit_scale": 0.0625}
        | {"sliding_window": 4096, "bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0},
        norms=("input_layernorm",),
        biases={"attention_bias": ATTENTION},
        slides=lambda layer, period: (layer + 1) % period != 0,
        period_key="sliding_window_pattern",
        period=4,
        least_period=1,
        carried=("logit_scale",),
        eps_key="layer_norm_eps",
    ),
}
