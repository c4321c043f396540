"""Files equal those of llama.cpp's own converter and quantiser, recorded by benchmarks/gguf_reference.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from benchmarks.gguf_reference import REFERENCE, describe, describe_part
from bot.quants import open_model
from merge.evaluate import checkpoint_expressions
from merge.expr import Expr, Read
from quants import tokenizer as tokenizers
from quants.build import embedding_rows, quantize
from quants.filetypes import FILE_TYPES
from quants.imatrix import load_imatrix
from quants.layout import gguf_layout
from quants.metadata import ModelInfo, folder_info, gguf_metadata
from quants.mixtures import quantised_bytes
from quants.tokenizer import read_vocabulary
from quants.writer import Target, write_ggufs
from tests.quants.cases import CASES, PRE_TOKENIZER, SPLIT, SPLIT_BYTES, TYPES_ONLY, write_imatrix
from tests.quants.tiny import shapes, write_model

# The one key in which we differ: the converter gives every token the same score, which loses the order of the merges.
SCORES = "tokenizer.ggml.scores"
# What docs/gguf.md explains.
DIFFER = {"ernie4_5_moe": ("ernie4_5-moe.expert_shared_feed_forward_length",)}


@functools.cache
def _recorded() -> str:
    return REFERENCE.read_text()


def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_recorded())
    return found


@pytest.mark.parametrize("case", sorted(CASES.keys() - TYPES_ONLY))
def test_keys_and_tensors_equal_those_of_llama_cpp(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer, types = CASES[case]
    folder = write_model(tmp_path / "tiny", config, tokenizer)
    if tokenizer == "byte_level":
        monkeypatch.setattr(tokenizers, "pre_tokenizer", lambda ids, where: PRE_TOKENIZER)
    tensors, config, evaluator = checkpoint_expressions(folder)
    layout = gguf_layout(config, tensors)
    vocabulary = read_vocabulary(folder, embedding_rows(layout), layout.architecture)
    info = folder_info(folder, parameters=layout.parameters)
    for suffix in ("", "+imatrix"):
        named = {name.removesuffix(suffix): name for name in types if name.partition("+")[2] == suffix[1:]}
        imatrix = None
        if suffix and named:
            write_imatrix(tmp_path / "imatrix.gguf", config)
            imatrix = "imatrix.gguf", load_imatrix(tmp_path / "imatrix.gguf")
        targets = [
            Target(
                tmp_path / f"{name}.gguf",
                FILE_TYPES[name],
                gguf_metadata(config, layout, vocabulary, info, FILE_TYPES[name], imatrix),
            )
            for name in named
        ]
        write_ggufs(layout, evaluator, targets, importance=imatrix[1].importance() if imatrix else None)
        for target in targets:
            ours, theirs = describe(target.path), reference()[case][named[target.file_type.name]]
            sizes = layout.shapes, layout.model, imatrix is not None
            assert data_bytes(target.path) == quantised_bytes(target.file_type, *sizes), target.file_type.name
            assert _flat(ours["tensors"]) == _flat(theirs["tensors"]), target.file_type.name
            for key in DIFFER.get(case, ()):
                ours["keys"].pop(key, None), theirs["keys"].pop(key, None)
            if tokenizer == "byte_fallback":
                del ours["keys"][SCORES], theirs["keys"][SCORES]
            assert json.loads(json.dumps(ours["keys"])) == theirs["keys"], target.file_type.name


def data_bytes(path: Path) -> int:
    """Bytes of a file behind its header and metadata: what a preview predicts exactly."""
    return path.stat().st_size - int(GGUFReader(path).data_offset)


def test_a_split_file_is_divided_as_llama_gguf_split_divides_it(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path / "Tiny", SPLIT))
    (made,) = quantize(
        model.config, model.tensors, model.contents, model.folder, tmp_path, "Tiny", ["BF16"], ModelInfo("Tiny"),
        prove=False, max_bytes=SPLIT_BYTES,
    )  # fmt: skip
    ours = [describe_part(part.path) for part in made.parts]
    assert json.loads(json.dumps(ours)) == reference()["split"]["parts"]


def _flat(tensors: dict[str, str]) -> dict[str, str]:
    """The quantiser leaves out a first dimension of one (a stack of one expert, a gate's row); the bytes are the same."""
    return {name: kind.replace(" 1x", " ") for name, kind in tensors.items()}


@pytest.mark.parametrize("case", sorted(TYPES_ONLY))
def test_tensor_types_of_deep_models_equal_those_of_llama_quantize(case: str) -> None:
    config, _, types = CASES[case]
    tensors: dict[str, Expr] = {name: Read("tiny", name, "BF16", shape) for name, shape in shapes(config).items()}
    layout = gguf_layout(config, tensors)
    for name in types:
        file_type, _, imatrix = name.partition("+")
        theirs = reference()[case][name]
        others = {tensor: kind for kind, names in theirs["others"].items() for tensor in names}
        for tensor, kind in layout.types(FILE_TYPES[file_type], bool(imatrix)).items():
            if kind != "F32":
                assert kind == others.get(tensor, theirs["most"]), f"{name}: {tensor}"
