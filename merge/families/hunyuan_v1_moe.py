"""Hunyuan-MoE: dense Hunyuan models in; a router, experts, and one shared MLP of the same size.

Layout on the Hub (https://huggingface.co/tencent/Hunyuan-A13B-Instruct): `mlp.gate.wg` is the router, `mlp.experts.E.gate_proj|
up_proj|down_proj` are the experts, and `mlp.shared_mlp.*` is the shared expert, which every token gets in full. A recipe
without a shared expert gets one of zeros, which adds nothing but has the size of an expert: the architecture always has one.
The router's softmax is over all experts, and the weights of the chosen ones are scaled to sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import PLAIN_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "hunyuan_v1_moe"
TITLE = "Hunyuan-MoE"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("hunyuan_v1_dense",)
SHARED = PLAIN_SHARED
NORMALISES = True
WINDOW = False
KEYS = MixtureKeys("hunyuan_v1_dense", shared_size="intermediate_size")


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and such a model cannot have: nothing."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but no bias of the attention's output."""
    if "o_proj" in base.biased:
        return "llama.cpp's Hunyuan-MoE has no bias of the attention's output"
    return no_gguf_rope(base, "linear", "yarn")


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router, the experts' matrices, and the shared MLP."""
    at = f"model.layers.{block.layer}.mlp"
    yield f"{at}.gate.wg.weight", block.router
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{at}.experts.{index}.{part}.weight", expert[part]
    for part in MLP_PARTS:
        shared = block.shared[part] if block.shared else block.zeros(*block.base.mlp_shape(part))
        yield f"{at}.shared_mlp.{part}.weight", shared


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result. transformers reads one number where the Hub's own config has one for each layer;
    llama.cpp's converter reads those of `moe_intermediate_size` and `num_shared_expert`."""
    return base.shared_config("HunYuanMoEV1ForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": base.attention_bias,
        "num_experts": mixture.experts,
        "moe_topk": mixture.per_token,
        "moe_intermediate_size": [base.intermediate_size] * base.layers,
        "num_shared_expert": [1] * base.layers,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
    }
