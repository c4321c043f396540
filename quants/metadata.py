"""The metadata of a GGUF file: what it is (general.*), and the model's numbers (llama.*), as llama.cpp's converter has them.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merge.errors import SourceError
from quants.families import FAMILIES, experts_of
from quants.filetypes import FileType
from quants.imatrix import Imatrix
from quants.layout import Layout, head_size, rope_parameters
from quants.tokenizer import Vocabulary

# A model card's front matter larger than this, or with YAML aliases (which can explode when read), is refused.
MAX_FRONT_MATTER = 1 << 20


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A source model as the metadata lists it."""

    name: str
    organization: str | None = None
    version: str | None = None
    repo_url: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a file says of the model besides its numbers. None and empty entries are left out.

    `sampling` holds the recommended sampling parameters by the last part of their key (`temp`, `top_p`, `top_k` …);
    `size_label` follows from the tensors unless given.
    """

    name: str
    author: str | None = None
    version: str | None = None
    organization: str | None = None
    finetune: str | None = None
    basename: str | None = None
    description: str | None = None
    quantized_by: str | None = None
    size_label: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    repo_url: str | None = None
    source_repo_url: str | None = None
    base_models: tuple[BaseModel, ...] = ()
    datasets: tuple[BaseModel, ...] = ()
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def folder_info(folder: Path, name: str | None = None, parameters: int = 0) -> ModelInfo:
    """What a model's folder says of itself: its card, config.json, generation_config.json, and the folder's name.

    `parameters` helps to tell a size in a name from a version. Raises SourceError where the card's front matter is not to
    be trusted.
    """
    import gguf

    _check_front_matter(folder / "README.md")
    try:
        found = gguf.Metadata.load(None, folder, name, parameters)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder}: its card or configuration cannot be understood ({error!r})") from error
    return ModelInfo(
        name=found.name or folder.name,
        author=_text(found.author),
        version=_text(found.version),
        organization=_text(found.organization),
        finetune=_text(found.finetune),
        basename=_text(found.basename),
        description=_text(found.description),
        quantized_by=_text(found.quantized_by),
        size_label=_text(found.size_label),
        license=",".join(found.license) if isinstance(found.license, list) else _text(found.license),
        license_name=_text(found.license_name),
        license_link=_text(found.license_link),
        repo_url=_text(found.repo_url),
        source_repo_url=_text(found.source_repo_url),
        base_models=_sources(found.base_models),
        datasets=_sources(found.datasets),
        tags=tuple(map(str, found.tags or ())),
        languages=tuple(map(str, found.languages or ())),
        sampling={
            key.removeprefix("sampling_"): value
            for key, value in vars(found).items()
            if key.startswith("sampling_") and value is not None
        },
    )


def gguf_metadata(
    config: Mapping[str, Any],
    layout: Layout,
    vocabulary: Vocabulary,
    info: ModelInfo,
    file_type: FileType,
    imatrix: tuple[str, Imatrix] | None = None,
) -> dict[str, Any]:
    """All keys of a file: a mapping to gguf's GGUFValue, in the order in which they are written.

    `imatrix` is the importance matrix of a quantised file, with the name of its own file.
    """
    import gguf

    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    _add_info(writer, info, layout)
    _add_numbers(writer, _with_defaults(config))
    vocabulary.add_to(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type.id)
    if imatrix and file_type.is_quantised:
        file, matrix = imatrix
        writer.add_string("quantize.imatrix.file", file)
        if matrix.datasets:
            writer.add_string("quantize.imatrix.dataset", matrix.datasets[0])
        writer.add_uint32("quantize.imatrix.entries_count", len(matrix.sums))
        writer.add_uint32("quantize.imatrix.chunks_count", matrix.chunks)
    keys: dict[str, Any] = writer.kv_data[0]
    return keys


def size_label(layout: Layout) -> str:
    """The size as people write it: `7.2B`, or for a mixture the number of experts and the size of one: `8x7B`."""
    import gguf

    shared = expert = 0
    experts = layout.model.experts
    for name, shape in layout.shapes.items():
        if "_exps." in name:
            expert += math.prod(shape) // experts
        else:
            shared += math.prod(shape)
    label: str = gguf.size_label(shared + expert * max(1, experts), shared, expert, experts)
    return label


def _add_info(writer: Any, info: ModelInfo, layout: Layout) -> None:
    """general.*: sampling, names, licence, sources, tags."""
    for key, value in info.sampling.items():
        getattr(writer, f"add_sampling_{key}")(value)
    writer.add_name(info.name)
    for key in ("author", "version", "organization", "finetune", "basename", "description", "quantized_by"):
        if (value := getattr(info, key)) is not None:
            getattr(writer, f"add_{key}")(value)
    writer.add_size_label(info.size_label or size_label(layout))
    for key in ("license", "license_name", "license_link", "repo_url", "source_repo_url"):
        if (value := getattr(info, key)) is not None:
            getattr(writer, f"add_{key}")(value)
    for kind, sources in (("base_model", info.base_models), ("dataset", info.datasets)):
        if sources:
            getattr(writer, f"add_{kind}_count")(len(sources))
        for index, source in enumerate(sources):
            for key in ("name", "version", "organization", "repo_url"):
                if (value := getattr(source, key)) is not None:
                    getattr(writer, f"add_{kind}_{key}")(index, value)
    writer.add_tags(info.tags)
    writer.add_languages(info.languages)


def _add_numbers(writer: Any, config: Mapping[str, Any]) -> None:
    """<architecture>.*: the sizes and constants of the model. `config` has its defaults filled in."""
    numbers: tuple[tuple[str, Callable[[Any], None]], ...] = (
        ("num_hidden_layers", writer.add_block_count),
        ("max_position_embeddings", writer.add_context_length),
        ("hidden_size", writer.add_embedding_length),
        ("intermediate_size", writer.add_feed_forward_length),
        ("num_attention_heads", writer.add_head_count),
        ("num_key_value_heads", writer.add_head_count_kv),
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("num_experts_per_tok", writer.add_expert_used_count),
    )
    for key, add in numbers:
        if (value := config.get(key)) is not None:
            add(value)
    _add_rope(writer, rope_parameters(config))
    if experts := experts_of(config):
        writer.add_expert_count(experts)
    # llama.cpp's Granite has no head size of its own.
    if (size := config.get("head_dim")) is not None and not config["model_type"].startswith("granite"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    _OWN_NUMBERS[FAMILIES[config["model_type"]].architecture](writer, config)


def _llama_numbers(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    granite = config["model_type"].startswith("granite")
    writer.add_rope_dimension_count(
        config["hidden_size"] // config["num_attention_heads"] if granite else head_size(config)
    )


def _granite_numbers(writer: Any, config: Mapping[str, Any]) -> None:
    _llama_numbers(writer, config)
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("shared_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if value := config.get(key):
            add(value)


def _qwen_numbers(writer: Any, config: Mapping[str, Any]) -> None:
    for key, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if (value := config.get(key)) is not None:
            add(value)


def _deepseek_numbers(writer: Any, config: Mapping[str, Any]) -> None:
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


_OWN_NUMBERS: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = MappingProxyType(
    {
        "llama": _llama_numbers,
        "granitemoe": _granite_numbers,
        "qwen2moe": _qwen_numbers,
        "qwen3moe": _qwen_numbers,
        "deepseek": _deepseek_numbers,
    }
)


def _add_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    """llama.rope.*: base frequency and scaling. Raises SourceError for a scaling that llama.cpp cannot be told of."""
    import gguf

    kind = str(rope.get("rope_type", "default")).lower()
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        pass
    elif kind not in ("linear", "yarn"):
        raise SourceError(f"config.json asks for rotary scaling of type {kind!r}, which a GGUF file cannot say")
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
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
    """config.json with what it leaves out as transformers' own configuration class has it."""
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:  # DeepSeek's first architecture has no class there
        return dict(config)
    try:
        filled: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers raises whatever the values provoke
        raise SourceError(f"config.json is not one that transformers takes: {error}") from error
    return filled


def _check_front_matter(card: Path) -> None:
    import yaml

    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return
    front = text[4:].split("\n---", 1)[0]
    try:
        safe = len(front) <= MAX_FRONT_MATTER and not any(
            isinstance(token, yaml.AliasToken) for token in yaml.scan(front)
        )
    except yaml.YAMLError:
        safe = False
    if not safe:
        raise SourceError(f"{card}: its front matter is not plain YAML; mend it, or name the model with --name")


def _sources(found: list[dict[str, Any]] | None) -> tuple[BaseModel, ...]:
    return tuple(
        BaseModel(
            name=str(source.get("name") or source.get("repo_url")),
            organization=_text(source.get("organization")),
            version=_text(source.get("version")),
            repo_url=_text(source.get("repo_url")),
        )
        for source in found or ()
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
