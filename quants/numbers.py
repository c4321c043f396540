"""<architecture>.*: the sizes and constants of a model, as its GGUF file's metadata have them.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from merge.errors import SourceError
from quants.families import FAMILIES, NEEDS, experts_of, first_moe_layer, of_all_layers, per_token_of
from quants.layout import head_size, rope_parameters


def add_numbers(writer: Any, given: Mapping[str, Any]) -> None:
    """Adds the keys of the model whose config.json is `given` to a gguf.GGUFWriter. Raises SourceError."""
    config = _with_defaults(given)
    latent = FAMILIES[config["model_type"]].latent
    if latent:
        config["num_key_value_heads"] = 1  # the latent, which all heads share
    numbers: tuple[tuple[str, Callable[[Any], None]], ...] = (
        ("num_hidden_layers", writer.add_block_count),
        ("max_position_embeddings", writer.add_context_length),
        ("hidden_size", writer.add_embedding_length),
        ("intermediate_size", writer.add_feed_forward_length),
        ("num_attention_heads", writer.add_head_count),
        ("num_key_value_heads", writer.add_head_count_kv),
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
    )
    for key, add in numbers:
        # Cohere2's is the size of an expert, and stands there.
        if (value := config.get(key)) is not None and (key, config["model_type"]) != (
            "intermediate_size",
            "cohere2_moe",
        ):
            add(value)
    family = FAMILIES[config["model_type"]]
    _add_rope(writer, rope_parameters(config))
    if experts := experts_of(config):
        writer.add_expert_count(experts)
        if (per_token := per_token_of(config)) is not None:
            writer.add_expert_used_count(per_token)
    # llama.cpp's Granite has no head size of its own.
    if (size := config.get("head_dim")) is not None and not (latent or config["model_type"].startswith("granite")):
        writer.add_key_length(size)
        writer.add_value_length(size)
    _OWN[family.architecture](writer, config)


def _llama(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    granite = config["model_type"].startswith("granite")
    writer.add_rope_dimension_count(
        config["hidden_size"] // config["num_attention_heads"] if granite else head_size(config)
    )


def _granite(writer: Any, config: Mapping[str, Any]) -> None:
    _llama(writer, config)
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("shared_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if value := config.get(key):
            add(value)


def _granite_swa(writer: Any, config: Mapping[str, Any]) -> None:
    _granite(writer, config)
    _add_windows(writer, config)
    thetas = config.get("layer_rope_theta") or ()
    if not all(thetas):  # layers without one have no rotary embedding
        writer.add_array(f"{writer.arch}.attention.rope_pattern", [bool(theta) for theta in thetas])


def _cohere2(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    writer.add_logit_scale(config["logit_scale"])
    _add_windows(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(0)
    # The softmax over the chosen experts is that over all of them, scaled to sum to one.
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    if shared := config.get("num_shared_experts"):
        writer.add_expert_shared_count(shared)
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"] * shared)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _add_windows(writer: Any, config: Mapping[str, Any]) -> None:
    """The sliding window, and which layers have it."""
    writer.add_sliding_window(config["sliding_window"])
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", slides)


def _qwen(writer: Any, config: Mapping[str, Any]) -> None:
    for key, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if (value := config.get(key)) is not None:
            add(value)


def _ernie(writer: Any, config: Mapping[str, Any]) -> None:
    size, shared = config["moe_intermediate_size"], config["moe_num_shared_experts"]
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_leading_dense_block_count(first_moe_layer(config))
    writer.add_expert_feed_forward_length(size)
    writer.add_expert_shared_count(shared)
    if shared:
        writer.add_expert_shared_feed_forward_length(size * shared)


def _hunyuan(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
    size = "moe_intermediate_size" if config.get("moe_intermediate_size") is not None else "intermediate_size"
    writer.add_expert_feed_forward_length(of_all_layers(config, size))
    writer.add_expert_shared_count(of_all_layers({"num_shared_expert": 1} | dict(config), "num_shared_expert"))


def _deepseek(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_shared_count(config["n_shared_experts"])
    if config.get("scoring_func") is not None:
        if config["scoring_func"] != "softmax":
            raise SourceError(f"config.json scores experts by {config['scoring_func']!r}; llama.cpp knows softmax here")
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    for key, add in (("n_group", writer.add_expert_group_count), ("topk_group", writer.add_expert_group_used_count)):
        if (value := config.get(key)) is not None:
            add(value)


def _deepseek2(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    for value, add in (
        (config["vocab_size"], writer.add_vocab_size),
        (config["first_k_dense_replace"], writer.add_leading_dense_block_count),
        (config["q_lora_rank"], writer.add_q_lora_rank),
        (rank, writer.add_kv_lora_rank),
        # llama.cpp keeps latents, which the heads' keys and values are made of.
        (rank + turned, writer.add_key_length),
        (rank, writer.add_value_length),
        (config["qk_nope_head_dim"] + turned, writer.add_key_length_mla),
        (config["v_head_dim"], writer.add_value_length_mla),
        (turned, writer.add_rope_dimension_count),
        (config["moe_intermediate_size"], writer.add_expert_feed_forward_length),
        (config["n_shared_experts"], writer.add_expert_shared_count),
        (config["routed_scaling_factor"], writer.add_expert_weights_scale),
        (config["n_group"], writer.add_expert_group_count),
        (config["topk_group"], writer.add_expert_group_used_count),
        (gguf.ExpertGatingFuncType.SIGMOID, writer.add_expert_gating_func),
    ):
        add(value)
    if config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)


# By llama.cpp's name of the architecture.
_OWN: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = MappingProxyType(
    {
        "llama": _llama,
        "granitemoe": _granite,
        "granite_swa": _granite_swa,
        "qwen2moe": _qwen,
        "qwen3moe": _qwen,
        "deepseek": _deepseek,
        "deepseek2": _deepseek2,
        "ernie4_5-moe": _ernie,
        "hunyuan-moe": _hunyuan,
        "cohere2moe": _cohere2,
    }
)


def _add_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    """llama.rope.*: base frequency and scaling; llama3's factors are a tensor."""
    import gguf

    kind = str(rope.get("rope_type", "default")).lower()
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        if not isinstance(rope.get("factor"), int | float):
            raise SourceError(f"config.json asks for rotary scaling of type {kind!r} without a factor")
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        attention = rope.get("attention_factor", rope.get("attn_factor"))
        for value, add in (
            (rope.get("extrapolation_factor"), writer.add_rope_scaling_yarn_ext_factor),
            (attention, writer.add_rope_scaling_yarn_attn_factor),
            (rope.get("beta_fast"), writer.add_rope_scaling_yarn_beta_fast),
            (rope.get("beta_slow"), writer.add_rope_scaling_yarn_beta_slow),
        ):
            if value is not None:
                add(value)
    if (theta := rope.get("rope_theta")) is not None:
        writer.add_rope_freq_base(theta)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves out as transformers' own configuration class has it. transformers, two seconds of
    importing, comes in only where something is left out."""
    family, eps = FAMILIES[config["model_type"]], {"rms_norm_eps", "layer_norm_eps"}
    complete = all(config.get(key) is not None for key in (*NEEDS, *family.needs)) and bool(eps & config.keys())
    if family.experts_key is not None and per_token_of(config) is None:
        complete = False
    if complete and "rope_theta" in rope_parameters(config):
        return dict(config)
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:  # DeepSeek's first architecture has no class there
        return dict(config)
    try:
        filled: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers raises whatever the values provoke
        raise SourceError(f"config.json is not one that transformers takes: {error}") from error
    return filled
