"""DeepSeek-MoE, the first version: Llama and Mistral models in; a router, experts, and perhaps one shared expert.

Layout on the Hub (https://huggingface.co/deepseek-ai/deepseek-moe-16b-base): `mlp.gate` is the router, `mlp.experts.E.
gate_proj|up_proj|down_proj` are the experts, `mlp.shared_experts.*` is the shared one, which every token gets in full.

transformers has no such class: the config names the code in DeepSeek's own repository, as mergekit's does. moerge never runs
it. Its `norm_topk_prob` is off because llama.cpp does not scale the weights of the chosen experts for this architecture, so
that both compute the same: only with all experts for every token do experts equal to the base give the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import PLAIN_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "deepseek"
TITLE = "DeepSeek-MoE"
ALIASES: tuple[str, ...] = ("DeepSeek MoE",)
ACCEPTS: tuple[str, ...] = ("llama", "mistral")
SHARED = PLAIN_SHARED
NORMALISES = False
WINDOW = False
KEYS = MixtureKeys("llama", {"first_k_dense_replace": 0}, "moe_intermediate_size", shared_count="n_shared_experts")

_CODE = "deepseek-ai/deepseek-moe-16b-base--"


def lacks(base: DenseModel) -> Iterator[str]:
    """DeepSeek's code knows two kinds of RoPE scaling, and computes the head size from the hidden size."""
    if base.rope_scaling and base.rope_scaling["rope_type"] not in ("linear", "dynamic"):
        yield f"RoPE scaling {base.rope_scaling['rope_type']!r}"
    if not base.heads_fill_hidden:
        yield f"{base.heads} heads of size {base.head_dim} with hidden size {base.hidden_size}"


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp runs such a model only with a shared expert, and without biases or a scaled rotary embedding."""
    if not mixture.has_shared:
        return "llama.cpp's DeepSeek needs a shared expert"
    return "llama.cpp's DeepSeek has no attention biases" if base.biased else no_gguf_rope(base)


def keeps(tensor: str) -> bool:
    """Everything but the MLP: the attention may have biases."""
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
    """config.json of the result."""
    config = base.shared_config("DeepseekForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": base.attention_bias,
        "moe_intermediate_size": base.intermediate_size,
        "n_routed_experts": mixture.experts,
        "n_shared_experts": 1 if mixture.has_shared else None,
        "num_experts_per_tok": mixture.per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_CODE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_CODE}modeling_deepseek.DeepseekForCausalLM",
        },
    }
    if base.rope_scaling:  # DeepSeek's code reads `type`, which newer readers call `rope_type`
        config["rope_scaling"] = {"type": base.rope_scaling["rope_type"], **base.rope_scaling}
    return config
