"""FlexOlmo: OLMo-2 models in, every layer's MLP replaced by a router and experts.

Layout on the Hub (https://huggingface.co/allenai/FlexOlmo-7x7B-1T): `mlp.gate` is the router, without bias;
`mlp.experts.E.gate_proj|up_proj|down_proj` are the experts. As in OLMo-2 the norms stand behind attention and MLP, so the
router reads the residual itself. The router's softmax is over all experts; with `norm_topk_prob` the weights of the chosen
ones are scaled to sum to one. (FlexOlmo's own release does without; its 7 experts were trained so.) llama.cpp has no such
architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import NO_ARCHITECTURE, NO_SHARED, Block, Mixture, MixtureKeys
from merge.families.model_types import MLP_PARTS

NAME = "flex_olmo"
TITLE = "FlexOlmo"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("olmo2",)
SHARED = NO_SHARED
NORMALISES = True
WINDOW = False
KEYS = MixtureKeys(
    "olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "norm_topk_prob": False}
)


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and a FlexOlmo model cannot have: nothing."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has no such architecture."""
    return NO_ARCHITECTURE


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
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
    return base.shared_config("FlexOlmoForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": base.attention_bias,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
