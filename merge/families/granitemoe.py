"""Granite-MoE: Granite 3 models in; also Llama, Mistral, Qwen2 and Seed-OSS ones, whose attention may have biases here.

Layout on the Hub (https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-base): fused. `block_sparse_moe.input_linear` has
shape (experts, 2 * intermediate, hidden), of each expert first the gate, then the up projection; `output_linear` is (experts,
hidden, intermediate); `router.layer` is the router. The softmax is over the chosen experts alone, so their weights sum to one,
in llama.cpp as well.

Granite multiplies embeddings, attention, residuals and logits by numbers of its config, which are carried over. For the others
they are what those models compute: 1, and 1 / sqrt(head size) in the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Concat, Expr, Stack
from merge.families.dense import DenseModel
from merge.families.family import NO_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import ATTENTION

NAME = "granitemoe"
TITLE = "Granite-MoE"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("granite", "llama", "mistral", "qwen2", "seed_oss")
SHARED = NO_SHARED
NORMALISES = True
WINDOW = False
KEYS = MixtureKeys("granite", joined="block_sparse_moe.experts", in_memory=((".router.layer.", ".router."),))


def lacks(base: DenseModel) -> Iterator[str]:
    """Nothing but a sliding window, which is said apart."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but only with heads that fill the hidden size."""
    if not base.heads_fill_hidden:
        return "llama.cpp's Granite has no heads of another size than the hidden size's share"
    return no_gguf_rope(base, "linear", "yarn", "llama3")


def keeps(tensor: str) -> bool:
    """Everything but the MLP: the attention may have biases."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router and the fused experts. Where one of the attention's projections has a bias, all four have: the missing ones
    are zeros."""
    base, layer = block.base, f"model.layers.{block.layer}"
    for name, rows in zip(ATTENTION, (base.heads, base.kv_heads, base.kv_heads, 0), strict=True):
        if base.biased and name not in base.biased:
            yield f"{layer}.self_attn.{name}.bias", block.zeros(rows * base.head_dim or base.hidden_size)
    moe = f"{layer}.block_sparse_moe"
    yield f"{moe}.router.layer.weight", block.router
    both = tuple(Concat((expert["gate_proj"], expert["up_proj"])) for expert in block.experts)
    yield f"{moe}.input_linear.weight", Stack(both)
    yield f"{moe}.output_linear.weight", Stack(tuple(expert["down_proj"] for expert in block.experts))


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    plain = {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": base.head_dim**-0.5,
    }
    return base.shared_config("GraniteMoeForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": bool(base.biased),
        **plain,
        **base.carried,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "router_aux_loss_coef": 0.001,
    }
