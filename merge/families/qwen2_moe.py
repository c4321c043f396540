"""Qwen2-MoE: Qwen2 and Qwen2.5 models in, and others with at most their biases; a router, experts, and one shared expert with a gate.

Layout on the Hub (https://huggingface.co/Qwen/Qwen1.5-MoE-A2.7B): `mlp.gate` is the router, `mlp.experts.E.gate_proj|
up_proj|down_proj` are the experts, `mlp.shared_expert.*` is the shared expert and `mlp.shared_expert_gate` its gate: every
token gets sigmoid(gate) of the shared expert's output. A recipe without a shared expert gets one of zeros, which adds
nothing; it is small, because its size is a setting of its own. Its gate is then the first expert's row of the router: llama.cpp
computes sigmoid(x) as silu(x) / x, which for a gate of zeros is not a number.

The router's softmax is over all experts. transformers would scale the weights of the chosen ones to sum to one where
`norm_topk_prob` says so, but llama.cpp does not for this architecture, so the config says no and both compute the same. Only
with all experts for every token do experts equal to the base give the base.

Queries, keys and values have biases, which Llama and its like have not: they get zeros, as older readers know no other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr, Gate
from merge.families.dense import DenseModel
from merge.families.family import GATED_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "qwen2_moe"
TITLE = "Qwen2-MoE"
ALIASES: tuple[str, ...] = ("Qwen MoE",)
ACCEPTS: tuple[str, ...] = ("qwen2", "llama", "mistral", "ministral", "cwm", "seed_oss")
SHARED = GATED_SHARED
NORMALISES = False
WINDOW = True
KEYS = MixtureKeys(
    "qwen2", {"num_key_value_heads": 16}, "moe_intermediate_size", shared_size="shared_expert_intermediate_size"
)

# Rows of a shared expert of zeros: a multiple of every quantised type's block.
ZERO_SIZE = 256
_BIASED = ("q_proj", "k_proj", "v_proj")


def lacks(base: DenseModel) -> Iterator[str]:
    """Nothing: each layer says for itself whether it has the sliding window."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but only with heads that fill the hidden size."""
    if not base.heads_fill_hidden:
        return "llama.cpp's Qwen2-MoE has no heads of another size than the hidden size's share"
    return no_gguf_rope(base, "linear", "yarn")


def keeps(tensor: str) -> bool:
    """Everything but the MLP and a bias of the attention's output."""
    return ".mlp." not in tensor and not tensor.endswith("o_proj.bias")


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router, the experts' matrices, the shared expert and its gate; the biases that the base has not."""
    base, layer = block.base, f"model.layers.{block.layer}"
    for name, heads in zip(_BIASED, (base.heads, base.kv_heads, base.kv_heads), strict=True):
        if name not in base.biased:
            yield f"{layer}.self_attn.{name}.bias", block.zeros(heads * base.head_dim)
    yield f"{layer}.mlp.gate.weight", block.router
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{layer}.mlp.experts.{index}.{part}.weight", expert[part]
    for part in MLP_PARTS:
        shape = (base.hidden_size, ZERO_SIZE) if part == "down_proj" else (ZERO_SIZE, base.hidden_size)
        shared = block.shared[part] if block.shared else block.zeros(*shape)
        yield f"{layer}.mlp.shared_expert.{part}.weight", shared
    first = Gate(block.layer, block.dtype, (1, base.hidden_size))
    yield f"{layer}.mlp.shared_expert_gate.weight", block.shared_gate or first


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    config = base.shared_config("Qwen2MoeForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "qkv_bias": True,
        "use_sliding_window": base.sliding_window is not None,
        "sliding_window": base.sliding_window,
        "moe_intermediate_size": base.intermediate_size,
        "shared_expert_intermediate_size": base.intermediate_size if mixture.has_shared else ZERO_SIZE,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
    if base.sliding_window is not None:
        config["layer_types"] = base.layer_types
    return config
