"""Mixtral: Llama and Mistral models in, every layer's MLP replaced by a router and experts.

Layout on the Hub (https://huggingface.co/mistralai/Mixtral-8x7B-v0.1): `block_sparse_moe.gate` is the router, without bias;
`block_sparse_moe.experts.E.w1|w2|w3` are gate, down and up projection. The router's softmax is over all experts, and the
weights of the chosen ones are scaled to sum to one, so experts equal to the base give the base.
"""

from __future__ import annotations

from typing import Any

from merge.families.dense import DenseModel

NAME = "mixtral"
TITLE = "Mixtral"
ACCEPTS: tuple[str, ...] = ("llama", "mistral")

_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def router_tensor(layer: int) -> str:
    """The Hub's name of a layer's router, shape (experts, hidden)."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def expert_tensor(layer: int, expert: int, part: str) -> str:
    """The Hub's name of an expert's matrix; `part` is the dense model's name of it (gate_proj, down_proj, up_proj)."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{_PARTS[part]}.weight"


def keeps(tensor: str) -> bool:
    """Whether a Mixtral model has a place for this tensor of the dense model, under the same name. It has for everything
    but the MLP and any bias."""
    return ".mlp." not in tensor and not tensor.endswith(".bias")


def output_config(base: DenseModel, experts: int, experts_per_token: int, torch_dtype: str) -> dict[str, Any]:
    """config.json of the result. RoPE in the spelling that transformers 4 and 5, vLLM and llama.cpp all read."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": base.vocab_size,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.layers,
        "num_attention_heads": base.heads,
        "num_key_value_heads": base.kv_heads,
        "head_dim": base.head_dim,
        "hidden_act": base.hidden_act,
        "max_position_embeddings": base.max_position_embeddings,
        "initializer_range": base.initializer_range,
        "rms_norm_eps": base.rms_norm_eps,
        "use_cache": True,
        "tie_word_embeddings": base.tied,
        "rope_theta": base.rope_theta,
        "sliding_window": base.sliding_window,
        "attention_dropout": 0.0,
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": torch_dtype,
        **base.token_ids,
    }
    if base.rope_scaling:
        config["rope_scaling"] = dict(base.rope_scaling)
    return config
