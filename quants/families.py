"""What differs between the model families in a GGUF file. A family is one entry in FAMILIES.

https://github.com/ggml-org/llama.cpp, conversion/ (one module per family) and src/models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A family, by transformers' `model_type`.

    `architecture` is llama.cpp's name. `experts_key` is the entry of config.json that counts the routed experts, None for
    a dense model. `permuted` says that query and key rows are reordered for llama.cpp's rotary embedding. `normalises` is
    whether llama.cpp scales the chosen experts' weights to sum to one: it is fixed there, while configs have
    `norm_topk_prob`. `attention` and `shared` are tensors that a layer has beside the usual ones.
    """

    architecture: str
    experts_key: str | None = None
    permuted: bool = False
    normalises: bool | None = None
    attention: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")

FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily("llama", permuted=True),
        "mistral": GgufFamily("llama", permuted=True),
        "mixtral": GgufFamily("llama", "num_local_experts", permuted=True),
        "qwen2_moe": GgufFamily("qwen2moe", "num_experts", normalises=False, shared=("ffn_gate_inp_shexp", *_SHARED)),
        "qwen3_moe": GgufFamily(
            "qwen3moe", "num_experts", normalises=True, attention=("attn_q_norm", "attn_k_norm")
        ),
        "deepseek": GgufFamily("deepseek", "n_routed_experts", permuted=True, normalises=False, shared=_SHARED),
        "granitemoe": GgufFamily("granitemoe", "num_local_experts", permuted=True),
        "granitemoeshared": GgufFamily("granitemoe", "num_local_experts", permuted=True, shared=_SHARED),
    }
)  # fmt: skip


def experts_of(config: Mapping[str, Any]) -> int:
    """The number of routed experts that config.json gives; 0 for a dense model."""
    if FAMILIES[config["model_type"]].experts_key is None:
        return 0
    # transformers' own classes rename the entry.
    keys = (FAMILIES[config["model_type"]].experts_key, "num_local_experts", "num_experts")
    return next((int(config[key]) for key in keys if key and config.get(key) is not None), 0)


def first_moe_layer(config: Mapping[str, Any]) -> int:
    """The first layer with experts: those before it are dense (DeepSeek)."""
    return int(config.get("first_k_dense_replace") or 0) if config["model_type"] == "deepseek" else 0


def routes_otherwise(config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp weighs the chosen experts otherwise than config.json says, so that its answers differ.

    GGUF has no entry for `norm_topk_prob`, and llama.cpp's choice is fixed per architecture. With all experts chosen the
    weights sum to one either way.
    """
    family = FAMILIES[config["model_type"]]
    if family.normalises is None or config.get("num_experts_per_tok") == experts_of(config):
        return False
    return bool(config.get("norm_topk_prob", False)) != family.normalises
