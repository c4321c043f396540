"""Ernie-4.5-MoE: dense Ernie 4.5 models in; a router, experts, and perhaps one shared expert.

Layout on the Hub (https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT): `mlp.gate` is the router, `mlp.experts.E.gate_proj|
up_proj|down_proj` are the experts, `mlp.shared_experts.*` is the shared one, which every token gets in full, and
`mlp.moe_statics.e_score_correction_bias`, shape (1, experts), shifts the choice of experts but not their weights: zeros here.
The router's softmax is over all experts, and the weights of the chosen ones are scaled to sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr, Stack
from merge.families.dense import DenseModel
from merge.families.family import PLAIN_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "ernie4_5_moe"
TITLE = "Ernie-4.5-MoE"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("ernie4_5",)
SHARED = PLAIN_SHARED
NORMALISES = True
WINDOW = False
KEYS = MixtureKeys(
    "ernie4_5",
    {"num_key_value_heads": 4, "moe_layer_start_index": 1},
    "moe_intermediate_size",
    shared_count="moe_num_shared_experts",
    in_memory=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
)


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and such a model cannot have: nothing; the experts' missing biases are tensors."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but not every scaling of the rotary embedding."""
    return no_gguf_rope(base, "linear", "yarn")


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router with its shift of zeros, the experts' matrices, and the shared expert where there is one."""
    at = f"model.layers.{block.layer}.mlp"
    yield f"{at}.gate.weight", block.router
    yield f"{at}.moe_statics.e_score_correction_bias", Stack((block.correction or block.zeros(len(block.experts)),))
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{at}.experts.{index}.{part}.weight", expert[part]
    if block.shared:
        for part in MLP_PARTS:
            yield f"{at}.shared_experts.{part}.weight", block.shared[part]


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    return base.shared_config("Ernie4_5_MoeForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "use_bias": bool(base.biased),
        "moe_intermediate_size": base.intermediate_size,
        "moe_num_experts": mixture.experts,
        "moe_k": mixture.per_token,
        "moe_num_shared_experts": int(mixture.has_shared),
        "moe_layer_start_index": 0,
        "moe_layer_end_index": base.layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "router_aux_loss_coef": 0.001,
    }
