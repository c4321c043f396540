"""Mixtral: Llama and Mistral models in, every layer's MLP replaced by a router and experts.

Layout on the Hub (https://huggingface.co/mistralai/Mixtral-8x7B-v0.1): `block_sparse_moe.gate` is the router, without bias;
`block_sparse_moe.experts.E.w1|w2|w3` are gate, down and up projection. The router's softmax is over all experts, and the
weights of the chosen ones are scaled to sum to one, so experts equal to the base give the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import NO_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope

NAME = "mixtral"
TITLE = "Mixtral"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("llama", "mistral")
SHARED = NO_SHARED
NORMALISES = True
WINDOW = True
KEYS = MixtureKeys(
    "mistral",
    {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    in_memory=((".block_sparse_moe.", ".mlp."),),
)

_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and a Mixtral model cannot have: nothing; of a sliding window it has the same."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but not every scaling of the rotary embedding."""
    return no_gguf_rope(base, "linear", "yarn", "llama3")


def keeps(tensor: str) -> bool:
    """Everything but the MLP and any bias."""
    return ".mlp." not in tensor and not tensor.endswith(".bias")


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router and the experts' matrices."""
    at = f"model.layers.{block.layer}.block_sparse_moe"
    yield f"{at}.gate.weight", block.router
    for index, expert in enumerate(block.experts):
        for part, name in _PARTS.items():
            yield f"{at}.experts.{index}.{name}.weight", expert[part]


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    return base.shared_config("MixtralForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "sliding_window": base.sliding_window,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "router_aux_loss_coef": 0.001,
    }
