"""The metadata of a GGUF file: what it is (general.*); the model's numbers are in quants.numbers, its vocabulary in
quants.tokenizer.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from quants.filetypes import FileType
from quants.imatrix import Imatrix
from quants.layout import Layout
from quants.numbers import add_numbers
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
    add_numbers(writer, config)
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
