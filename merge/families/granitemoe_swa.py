"""Granite-MoE with sliding windows and attention sinks: Granite-SWA models in.

transformers writes such models under its own, fused names: `block_sparse_moe.experts.gate_up_proj` has shape (experts, 2 *
intermediate, hidden), of each expert first the gate, then the up projection; `experts.down_proj` is (experts, hidden,
intermediate); `router.weight` is the router
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/granitemoe_swa). The softmax is over the chosen
experts alone, so their weights sum to one. The optional shared expert is left out (`shared_intermediate_size` 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Concat, Expr, Stack
from merge.families.dense import DenseModel
from merge.families.family import NO_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope

NAME = "granitemoe_swa"
TITLE = "Granite-MoE-SWA"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("granite_swa",)
SHARED = NO_SHARED
NORMALISES = True
WINDOW = True
KEYS = MixtureKeys(
    "granite_swa",
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": None, "tie_word_embeddings": False},
    joined="block_sparse_moe.experts",
)


def lacks(base: DenseModel) -> Iterator[str]:
    """Nothing: windows, sinks and a RoPE for each layer are Granite-SWA's own."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but only with heads that fill the hidden size, and one RoPE for all layers."""
    if not base.heads_fill_hidden:
        return "llama.cpp's Granite has no heads of another size than the hidden size's share"
    if len(set(base.carried.get("layer_rope_theta") or ()) - {None, 0}) > 1:
        return "llama.cpp's Granite has one RoPE base for all layers"
    return no_gguf_rope(base, "linear", "yarn", "llama3")


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router and the fused experts."""
    at = f"model.layers.{block.layer}.block_sparse_moe"
    yield f"{at}.router.weight", block.router
    both = tuple(Concat((expert["gate_proj"], expert["up_proj"])) for expert in block.experts)
    yield f"{at}.experts.gate_up_proj", Stack(both)
    yield f"{at}.experts.down_proj", Stack(tuple(expert["down_proj"] for expert in block.experts))


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    return base.shared_config("GraniteMoeSWAForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": base.attention_bias,
        "layer_rope_theta": [base.rope_theta] * base.layers,
        **base.carried,
        "sliding_window": base.sliding_window,
        "layer_types": base.layer_types,
        "shared_intermediate_size": 0,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "router_aux_loss_coef": 0.001,
    }
