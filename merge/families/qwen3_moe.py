"""Qwen3-MoE: Qwen3 models in, every layer's MLP replaced by a router and experts.

Layout on the Hub (https://huggingface.co/Qwen/Qwen3-30B-A3B): `mlp.gate` is the router, without bias;
`mlp.experts.E.gate_proj|up_proj|down_proj` are the experts. The router's softmax is over all experts; with `norm_topk_prob`
the weights of the chosen ones are scaled to sum to one, which llama.cpp always does for this architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import NO_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "qwen3_moe"
TITLE = "Qwen3-MoE"
ALIASES: tuple[str, ...] = ("Qwen3 MoE", "Qwen MoE")
ACCEPTS: tuple[str, ...] = ("qwen3",)
SHARED = NO_SHARED
NORMALISES = True
WINDOW = True
KEYS = MixtureKeys("qwen3", {"num_key_value_heads": 4, "norm_topk_prob": False}, "moe_intermediate_size")


def lacks(base: DenseModel) -> Iterator[str]:
    """Its sliding window is in all layers or in none."""
    if len(set(base.sliding_layers)) > 1:
        yield "a sliding window in some of its layers only"


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but not every scaling of the rotary embedding."""
    return no_gguf_rope(base, "linear", "yarn")


def keeps(tensor: str) -> bool:
    """Everything but the MLP: the norms of queries and keys, and the attention's biases, are Qwen3's own."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router and the experts' matrices."""
    at = f"model.layers.{block.layer}.mlp"
    yield f"{at}.gate.weight", block.router
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{at}.experts.{index}.{part}.weight", expert[part]


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    return base.shared_config("Qwen3MoeForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": base.attention_bias,
        "use_sliding_window": base.sliding_window is not None,
        "sliding_window": base.sliding_window,
        "moe_intermediate_size": base.intermediate_size,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
