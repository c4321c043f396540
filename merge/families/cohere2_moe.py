"""Cohere2-MoE: Cohere2 (Command R7B, Command A) models in; a router, experts, and perhaps one shared expert.

Names as transformers has them
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/cohere2_moe): `mlp.gate` is the router,
`mlp.experts.E.gate_proj|up_proj|down_proj` are the experts, `mlp.shared_experts.*` is the shared one, whose output is added in
full. The softmax is over the chosen experts alone, so their weights sum to one. As in Cohere2, attention and MLP read the same
norm, and only layers with a sliding window have RoPE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import PLAIN_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "cohere2_moe"
TITLE = "Cohere2-MoE"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("cohere2",)
SHARED = PLAIN_SHARED
NORMALISES = True
WINDOW = True
KEYS = MixtureKeys("cohere2", {"head_dim": 128}, shared_count="num_shared_experts")


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and such a model cannot have: nothing."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but it takes the mean of shared and chosen experts, and has no biases."""
    if mixture.has_shared:
        return "llama.cpp's Cohere2-MoE takes the mean of the shared expert and the others, where the merge adds them"
    return "llama.cpp's Cohere2-MoE has no attention biases" if base.biased else no_gguf_rope(base)


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router, the experts' matrices, and the shared expert where there is one."""
    at = f"model.layers.{block.layer}.mlp"
    yield f"{at}.gate.weight", block.router
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{at}.experts.{index}.{part}.weight", expert[part]
    if block.shared:
        for part in MLP_PARTS:
            yield f"{at}.shared_experts.{part}.weight", block.shared[part]


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result. Its norms are LayerNorms because `rms_norm_eps` is absent."""
    config = base.shared_config("Cohere2MoeForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        **base.carried,
        "attention_bias": base.attention_bias,
        "sliding_window": base.sliding_window,
        "layer_types": base.layer_types,
        "mlp_layer_types": ["sparse"] * base.layers,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "expert_selection_fn": "softmax",
        "num_shared_experts": int(mixture.has_shared),
        "shared_expert_combination_strategy": "sum",
        "router_aux_loss_coef": 0.001,
    }
    if base.rope_scaling:  # this class takes `rope_scaling` and does nothing with it
        config["rope_parameters"] = {"rope_theta": base.rope_theta, **base.rope_scaling}
    return config
