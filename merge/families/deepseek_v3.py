"""DeepSeek-V3: Youtu models in, whose attention over latents it has; a router, experts, and one shared expert.

Layout on the Hub (https://huggingface.co/deepseek-ai/DeepSeek-V3): `mlp.gate` is the router with `e_score_correction_bias`, shape
(experts,), which shifts the choice of experts but not their weights: zeros here. `mlp.experts.E.gate_proj|up_proj|down_proj` are
the experts, `mlp.shared_experts.*` is the shared one, which every token gets in full. A recipe without a shared expert gets one
of zeros, which adds nothing but has the size of an expert: the architecture always has one. An expert's weight is the sigmoid of
its number, and those of the chosen ones are scaled to sum to one. There is one group of experts, of which two at least are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge.expr import Expr
from merge.families.dense import DenseModel
from merge.families.family import PLAIN_SHARED, Block, Mixture, MixtureKeys, no_gguf_rope
from merge.families.model_types import MLP_PARTS

NAME = "deepseek_v3"
TITLE = "DeepSeek-V3"
ALIASES: tuple[str, ...] = ()
ACCEPTS: tuple[str, ...] = ("youtu",)
SHARED = PLAIN_SHARED
NORMALISES = True
WINDOW = False
KEYS = MixtureKeys(
    "youtu",
    {
        "num_key_value_heads": 128, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8,
    },
    "moe_intermediate_size",
    shared_count="n_shared_experts",
)  # fmt: skip


def lacks(base: DenseModel) -> Iterator[str]:
    """What the base has and such a model cannot have: nothing."""
    yield from ()


def why_no_gguf(base: DenseModel, mixture: Mixture) -> str | None:
    """llama.cpp has the architecture, but no attention biases, and knows the models that make their queries without a latent
    by their number of layers (and of tokens)."""
    assert base.latent is not None
    if base.biased:
        return "llama.cpp's DeepSeek-V3 has no attention biases"
    if not base.latent["rope_interleave"]:
        return "llama.cpp's DeepSeek-V3 turns neighbouring pairs of numbers, and the base's rope_interleave is false"
    if base.latent["q_lora_rank"] is None:
        return "no GGUF file is made of models whose queries have no latent"
    if base.layers in (26, 27) or (base.layers, base.vocab_size) == (48, 128256):
        return f"llama.cpp takes a DeepSeek-V3 of {base.layers} layers for one whose queries have no latent"
    return no_gguf_rope(base)


def keeps(tensor: str) -> bool:
    """Everything but the MLP."""
    return ".mlp." not in tensor


def block_tensors(block: Block) -> Iterator[tuple[str, Expr]]:
    """The router with its shift of zeros, the experts' matrices, and the shared expert."""
    at = f"model.layers.{block.layer}.mlp"
    yield f"{at}.gate.weight", block.router
    yield f"{at}.gate.e_score_correction_bias", block.correction or block.zeros(len(block.experts))
    for index, expert in enumerate(block.experts):
        for part in MLP_PARTS:
            yield f"{at}.experts.{index}.{part}.weight", expert[part]
    for part in MLP_PARTS:
        shared = block.shared[part] if block.shared else block.zeros(*block.base.mlp_shape(part))
        yield f"{at}.shared_experts.{part}.weight", shared


def output_config(base: DenseModel, mixture: Mixture) -> dict[str, Any]:
    """config.json of the result."""
    assert base.latent is not None
    return base.shared_config("DeepseekV3ForCausalLM", mixture.torch_dtype) | {
        "model_type": NAME,
        "attention_bias": "o_proj" in base.biased,
        **base.latent,
        "moe_intermediate_size": base.intermediate_size,
        "n_routed_experts": mixture.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": mixture.per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }
