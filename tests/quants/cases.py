"""Models to compare with llama.cpp's converter and quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge.expr import Expr, Read
from quants.filetypes import FILE_TYPES
from quants.imatrix import Imatrix, save_imatrix
from quants.layout import gguf_layout
from quants.mixtures import stays_f32
from tests.quants.tiny import PIECES, config, shapes, weight

_QUANTS = tuple(name for name, kind in FILE_TYPES.items() if kind.is_quantised and not kind.needs_imatrix)
_NEED = tuple(name for name, kind in FILE_TYPES.items() if kind.needs_imatrix)
# All quantised types, those that can be made with an importance matrix and without in both ways.
_ALL = (*_QUANTS, *(f"{name}+imatrix" for name in (*_QUANTS, *_NEED)))
# The types whose bytes the first case compares, by id.
_USUAL = {7, 14, 15, 16, 17, 18}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_MOE: dict[str, Any] = {"vocab_size": PIECES, "num_hidden_layers": 2, "num_experts_per_tok": 2}
_QWEN = _MOE | {"num_experts": 4, "moe_intermediate_size": 256, "mlp_only_layers": [], "decoder_sparse_step": 1}
_QWEN3 = _QWEN | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 64,
    "norm_topk_prob": True,
}
_QWEN2 = _QWEN | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": False,
}
_DEEPSEEK = _MOE | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}
_DEEPSEEK_V3 = _DEEPSEEK | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "rope_interleave": True,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
_HUNYUAN = _MOE | {
    "model_type": "hunyuan_v1_moe",
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "head_dim": 32,
    "num_experts": 4,
    # As on the Hub, and as the converter asks for, one number for each layer.
    "moe_topk": [2, 2],
    "moe_intermediate_size": [512, 512],
    "num_shared_expert": [1, 1],
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
}
del _HUNYUAN["num_experts_per_tok"]
_GRANITE = _MOE | {
    "model_type": "granitemoe",
    "architectures": ["GraniteMoeForCausalLM"],
    "num_local_experts": 4,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 6.0,
}
_GRANITE_SHARED = _GRANITE | {
    "model_type": "granitemoeshared",
    "architectures": ["GraniteMoeSharedForCausalLM"],
    "shared_intermediate_size": 256,
}
_GRANITE_SWA = _GRANITE | {
    "model_type": "granitemoe_swa",
    "architectures": ["GraniteMoeSWAForCausalLM"],
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"],
    "layer_rope_theta": [10000.0, 10000.0],
    "shared_intermediate_size": 0,
}
_ERNIE = _MOE | {
    "model_type": "ernie4_5_moe",
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": 384,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 256,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1,
    "moe_layer_end_index": 1,
    "use_bias": False,
}
del _ERNIE["num_experts_per_tok"]
_COHERE = _MOE | {
    "model_type": "cohere2_moe",
    "architectures": ["Cohere2MoeForCausalLM"],
    "num_experts": 4,
    "head_dim": 32,
    "layer_norm_eps": 1e-5,
    "rms_norm_eps": None,
    "logit_scale": 0.0625,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    "num_shared_experts": 0,
    "expert_selection_fn": "softmax",
    "norm_topk_prob": True,
}
_SMALL = {"num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": PIECES}
_LAYERS = {"num_hidden_layers": 9, "intermediate_size": 256, "vocab_size": PIECES}
_DENSE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": PIECES}
# OpenLLaMA-3B's ratios: rows that divide by 32 but not by 256.
_OPEN_LLAMA = {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 10, "num_key_value_heads": 10}
# Models to compare with llama.cpp's converter and quantiser: configuration, tokenizer, and types of files to compare.
# Of the models in TYPES_ONLY, which need many layers, the tensors' types are compared and not their bytes.
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "mixtral": (
        config(vocab_size=PIECES),
        "byte_fallback",
        ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S"),
    ),
    "sentencepiece": (config(**_SMALL | {"vocab_size": 384}), "sentencepiece", ("BF16", "Q4_K_M")),
    "float16": (config(**_SMALL, dtype="float16"), "byte_fallback", ("F16", "BF16")),
    "float32": (config(**_SMALL, dtype="float32"), "byte_fallback", ("F32", "F16", "BF16")),
    "tied": (config(**_SMALL, tie_word_embeddings=True), "byte_fallback", ("BF16", "Q8_0", "Q4_K_M")),
    "open_llama": (config(**_SMALL, **_OPEN_LLAMA), "byte_fallback", ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")),
    "tied_open_llama": (
        config(**_SMALL, **_OPEN_LLAMA, tie_word_embeddings=True), "byte_fallback", ("Q8_0", "Q4_K_M"),
    ),
    "odd_rows": (config(**_SMALL, **_OPEN_LLAMA | {"intermediate_size": 432}), "byte_fallback", ("Q8_0", "Q4_K_M")),
    "head_dim": (config(**_SMALL, head_dim=64), "byte_fallback", ("BF16", "Q4_K_M")),
    "llama3_rope": (config(**_SMALL, rope_parameters=_LLAMA3), "byte_fallback", ("BF16",)),
    "yarn": (config(**_SMALL, rope_parameters=_YARN), "byte_fallback", ("BF16",)),
    "linear_rope": (config(**_SMALL, rope_scaling={"type": "linear", "factor": 2.0}), "byte_fallback", ("BF16",)),
    "dense": (config(**_DENSE, num_hidden_layers=1), "byte_fallback", ("BF16", "Q4_K_M")),
    "blocks": (config(**_SMALL), "byte_fallback", tuple(name for name in _QUANTS if FILE_TYPES[name].id not in _USUAL)),
    "imatrix": (
        config(**_SMALL), "byte_fallback",
        tuple(f"{name}+imatrix" for name in ("Q4_0", "Q5_0", "Q4_K_M", "IQ4_XS", "IQ3_M", *_NEED)),
    ),
    "qwen3_moe": (config(**_QWEN3), "byte_level", ("BF16", "Q4_K_M")),
    "qwen2_moe": (config(**_QWEN2), "byte_level", ("BF16", "Q4_K_M")),
    "deepseek": (config(**_DEEPSEEK), "byte_level", ("BF16", "Q4_K_M")),
    "granitemoe": (config(**_GRANITE), "byte_level", ("BF16", "Q4_K_M")),
    "granitemoeshared": (config(**_GRANITE_SHARED), "byte_level", ("BF16", "Q4_K_M")),
    "granitemoe_swa": (config(**_GRANITE_SWA), "byte_level", ("BF16", "Q4_K_M")),
    "ernie4_5_moe": (config(**_ERNIE), "sentencepiece", ("BF16", "Q4_K_M")),
    "hunyuan_v1_moe": (config(**_HUNYUAN), "byte_level", ("BF16", "Q4_K_M")),
    "deepseek_v3": (config(**_DEEPSEEK_V3), "byte_level", ("BF16", "Q4_K_M", "IQ2_M+imatrix")),
    "cohere2_moe": (config(**_COHERE), "byte_level", ("BF16", "Q4_K_M")),
    **{
        f"experts_{count}": (
            config(**_LAYERS, num_local_experts=count, num_experts_per_tok=min(2, count)), "byte_fallback", _ALL,
        )
        for count in (1, 2, 3, 8, 16)
    },
    "layers_grouped": (
        config(**_LAYERS, num_local_experts=2, num_attention_heads=8, num_key_value_heads=8), "byte_fallback", _ALL,
    ),
    "layers_open_llama": (config(**_OPEN_LLAMA | {"num_hidden_layers": 9}, vocab_size=PIECES), "byte_fallback", _ALL),
    "layers_tied": (config(**_LAYERS, tie_word_embeddings=True), "byte_fallback", _ALL),
    "layers_qwen2_moe": (config(**_QWEN2 | {"num_hidden_layers": 16}), "byte_level", _ALL),
    "layers_deepseek_v3": (config(**_DEEPSEEK_V3 | {"num_hidden_layers": 16, "vocab_size": PIECES}), "byte_level", _ALL),
    "layers_80": (config(**_DENSE, num_hidden_layers=80, intermediate_size=256), "byte_fallback", _ALL),
}  # fmt: skip
TYPES_ONLY = {name for name in CASES if name.startswith(("experts_", "layers_"))}
# A model that is split, and at how many bytes.
SPLIT, SPLIT_BYTES = config(vocab_size=PIECES), 3_000_000
# The name that llama.cpp is told the byte-level tokenizer has: it knows no hand-made one.
PRE_TOKENIZER = "qwen2"


def write_imatrix(path: Path, model_config: Mapping[str, Any]) -> Imatrix:
    """An importance matrix that is the same everywhere, of all matrices of a model's layers; one expert has no counts."""
    tensors: dict[str, Expr] = {name: Read("tiny", name, "BF16", shape) for name, shape in shapes(model_config).items()}
    sums, counts = {}, {}
    for tensor in gguf_layout(model_config, tensors).tensors:
        shape = tensor.expr.shape
        if tensor.name.startswith("blk.") and not stays_f32(tensor.name, shape):
            experts = shape[0] if len(shape) == 3 else 1
            sums[tensor.name] = weight(tensor.name, (experts, shape[-1]), torch.float32).numpy() ** 2 * 64
            counts[tensor.name] = np.full(experts, 64, np.float32)
    if "blk.0.ffn_down_exps.weight" in counts:
        counts["blk.0.ffn_down_exps.weight"][-1] = 0
    found = Imatrix(sums, counts, 2, 32, ("text.txt",))
    save_imatrix(found, path)
    return found
