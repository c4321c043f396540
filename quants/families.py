"""What differs between the model families in a GGUF file. A family is one entry in FAMILIES.

https://github.com/ggml-org/llama.cpp, conversion/ (one module per family) and src/models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from merge.errors import SourceError


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A family, by transformers' `model_type`.

    `architecture` is llama.cpp's name, and `like` that of one with the same names of tensors, where the gguf package does not
    know it. `experts_key` is the entry of config.json that counts the routed experts, None for a dense model, and
    `chosen_key` the one that says how many a token gets. `permuted` says that query and key rows are reordered for
    llama.cpp's rotary embedding, and `ropes` which scalings of it there are. `normalises` is whether llama.cpp scales the
    chosen experts' weights to sum to one where configs have `norm_topk_prob`: it is fixed there. `norms`, `attention`,
    `experts` and `shared` are tensors of a layer, the last where the entry `shared_key` counts any, or always. `latent` says
    that queries, keys and values are made through latents, and have other tensors for it. `own_output`
    says that llama.cpp needs an output matrix even where it is the embedding, and `own_heads` that heads may be of another
    size than their share of the hidden size. `needs` are entries of config.json for which transformers has a default that
    matters.
    """

    architecture: str
    experts_key: str | None = None
    chosen_key: str = "num_experts_per_tok"
    like: str | None = None
    permuted: bool = False
    ropes: tuple[str, ...] = ("linear", "yarn")
    normalises: bool | None = None
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    attention: tuple[str, ...] = ()
    latent: bool = False
    experts: tuple[str, ...] = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    shared: tuple[str, ...] = ()
    shared_key: str | None = None
    own_output: bool = False
    own_heads: bool = True
    needs: tuple[str, ...] = ()


_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_LLAMA3 = ("linear", "yarn", "llama3")
_GRANITE = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Needed by all families, beside their own.
NEEDS = ("max_position_embeddings", "intermediate_size", "num_key_value_heads", "tie_word_embeddings")

FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily("llama", permuted=True, ropes=_LLAMA3, needs=("head_dim",)),
        "mistral": GgufFamily("llama", permuted=True, ropes=_LLAMA3, needs=("head_dim",)),
        "mixtral": GgufFamily("llama", "num_local_experts", permuted=True, ropes=_LLAMA3),
        "qwen2_moe": GgufFamily(
            "qwen2moe", "num_experts", normalises=False, shared=("ffn_gate_inp_shexp", *_SHARED), own_output=True,
            own_heads=False, needs=("moe_intermediate_size", "shared_expert_intermediate_size"),
        ),
        "qwen3_moe": GgufFamily(
            "qwen3moe", "num_experts", normalises=True, attention=("attn_q_norm", "attn_k_norm"),
            needs=("moe_intermediate_size",),
        ),
        "deepseek": GgufFamily(
            "deepseek", "n_routed_experts", permuted=True, ropes=(), normalises=False, shared=_SHARED, own_heads=False,
        ),
        "deepseek_v3": GgufFamily(
            "deepseek2", "n_routed_experts", ropes=(), attention=("attn_q_a_norm", "attn_kv_a_norm"), latent=True,
            shared=_SHARED, needs=(
                *_LATENT, "moe_intermediate_size", "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group",
                "norm_topk_prob", "routed_scaling_factor",
            ),
        ),
        "granitemoe": GgufFamily(
            "granitemoe", "num_local_experts", permuted=True, ropes=_LLAMA3, own_heads=False, needs=_GRANITE,
        ),
        "granitemoeshared": GgufFamily(
            "granitemoe", "num_local_experts", permuted=True, ropes=_LLAMA3, shared=_SHARED, own_heads=False,
            needs=(*_GRANITE, "shared_intermediate_size"),
        ),
        "granitemoe_swa": GgufFamily(
            "granite_swa", "num_local_experts", like="granitemoe", permuted=True, ropes=_LLAMA3,
            attention=("attn_sinks",), experts=("ffn_gate_up_exps", "ffn_down_exps"), own_heads=False,
            needs=(*_GRANITE, "sliding_window", "layer_types", "layer_rope_theta"),
        ),
        "ernie4_5_moe": GgufFamily(
            "ernie4_5-moe", "moe_num_experts", "moe_k", shared=_SHARED, shared_key="moe_num_shared_experts",
            needs=("moe_intermediate_size", "moe_layer_start_index", "moe_layer_interval", "moe_num_shared_experts"),
        ),
        "hunyuan_v1_moe": GgufFamily(
            "hunyuan-moe", "num_experts", "moe_topk", attention=("attn_q_norm", "attn_k_norm"), shared=_SHARED,
        ),
        "cohere2_moe": GgufFamily(
            "cohere2moe", "num_experts", like="qwen2moe", ropes=(), norms=("attn_norm",), shared=_SHARED,
            shared_key="num_shared_experts",
            needs=("head_dim", "sliding_window", "layer_types", "logit_scale", "layer_norm_eps", "expert_selection_fn"),
        ),
    }
)  # fmt: skip


def experts_of(config: Mapping[str, Any]) -> int:
    """The number of routed experts that config.json gives; 0 for a dense model."""
    family = FAMILIES[config["model_type"]]
    if family.experts_key is None:
        return 0
    # transformers' own classes rename the entry.
    keys = (family.experts_key, "num_local_experts", "num_experts")
    return next((of_all_layers(config, key) for key in keys if config.get(key) is not None), 0)


def per_token_of(config: Mapping[str, Any]) -> int | None:
    """How many experts a token is given."""
    key = FAMILIES[config["model_type"]].chosen_key
    key = key if config.get(key) is not None else "num_experts_per_tok"
    return of_all_layers(config, key) if config.get(key) is not None else None


def of_all_layers(config: Mapping[str, Any], key: str) -> int:
    """A number of config.json that may be given for each layer. Raises SourceError where it differs from layer to layer."""
    value = config[key]
    numbers = set(value) if isinstance(value, list) else {value}
    number = numbers.pop() if len(numbers) == 1 else None
    if type(number) is not int:
        raise SourceError(f"config.json has {key} {value!r}; llama.cpp has one number for all layers")
    return number


def first_moe_layer(config: Mapping[str, Any]) -> int:
    """The first layer with experts: those before it are dense (DeepSeek, Ernie)."""
    keys = {"deepseek": "first_k_dense_replace", "deepseek_v3": "first_k_dense_replace"}
    keys |= {"ernie4_5_moe": "moe_layer_start_index"}
    return int(config.get(keys.get(config["model_type"], ""), 0) or 0)


def routes_otherwise(config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp weighs the chosen experts otherwise than config.json says, so that its answers differ.

    GGUF has no entry for `norm_topk_prob`, and llama.cpp's choice is fixed per architecture. With all experts chosen the
    weights sum to one either way.
    """
    family = FAMILIES[config["model_type"]]
    if family.normalises is None or per_token_of(config) == experts_of(config):
        return False
    return bool(config.get("norm_topk_prob", False)) != family.normalises


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp cannot compute the model of this config.json as transformers does; None where it can."""
    family = FAMILIES[config["model_type"]]
    if (activation := config.get("hidden_act", "silu")) != "silu":
        return f"hidden_act {activation!r}; llama.cpp computes this architecture with silu"
    head_dim, heads = config.get("head_dim"), int(config["num_attention_heads"])
    if not family.own_heads and head_dim is not None and head_dim * heads != config["hidden_size"]:
        return f"head_dim {head_dim} with {heads} heads; llama.cpp has heads of hidden_size / heads here"
    if config["model_type"] == "ernie4_5_moe":
        last = config.get("moe_layer_end_index")
        if config.get("moe_layer_interval", 1) != 1 or last not in (None, -1, config["num_hidden_layers"] - 1):
            return "dense layers between or behind those with experts, of which no GGUF is made here"
    if config["model_type"] == "cohere2_moe":
        if config.get("num_shared_experts") and config.get("shared_expert_combination_strategy") != "average":
            return "a shared expert that is added to the others; llama.cpp takes the mean of both"
        if config.get("expert_selection_fn", "softmax") == "sigmoid":
            return "expert_selection_fn 'sigmoid', of which no GGUF is made here"
        if "dense" in (config.get("mlp_layer_types") or ()):
            return "dense layers among those with experts, of which no GGUF is made here"
    if family.latent:
        return _why_not_latent(config)
    if config["model_type"] == "granitemoe_swa" and len(set(config.get("layer_rope_theta") or ()) - {None, 0}) > 1:
        return "layer_rope_theta of several values; llama.cpp has one for all layers"
    return None


def _why_not_latent(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp cannot compute DeepSeek-V3 as transformers does. It knows by the number of layers, and of tokens, which of
    DeepSeek's models make their queries without a latent."""
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    if "q_lora_rank" in config and config["q_lora_rank"] is None:
        return "q_lora_rank null, of which no GGUF is made here"
    if layers in (26, 27) or (layers, vocabulary) == (48, 128256):
        return f"{layers} layers; llama.cpp takes such a model for one whose queries have no latent"
    if not config.get("rope_interleave", True):
        return "rope_interleave false; llama.cpp turns neighbouring pairs of numbers here"
    if config.get("scoring_func", "sigmoid") != "sigmoid":
        return f"scoring_func {config['scoring_func']!r}; the experts of this architecture are weighed by a sigmoid"
    return None
