"""Files equal those of llama.cpp's own converter and quantiser, recorded by benchmarks/gguf_reference.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_reference import REFERENCE, describe
from merge.evaluate import checkpoint_expressions
from merge.expr import Expr, Read
from quants.build import embedding_rows
from quants.filetypes import FILE_TYPES
from quants.layout import gguf_layout
from quants.metadata import folder_info, gguf_metadata
from quants.tokenizer import read_vocabulary
from quants.writer import Target, write_ggufs
from tests.quants.tiny import CASES, TYPES_ONLY, shapes, write_model

# The one key in which we differ: the converter gives every token the same score, which loses the order of the merges.
SCORES = "tokenizer.ggml.scores"


@functools.cache
def _recorded() -> str:
    return REFERENCE.read_text()


def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_recorded())
    return found


@pytest.mark.parametrize("case", sorted(CASES.keys() - TYPES_ONLY))
def test_keys_and_tensors_equal_those_of_llama_cpp(case: str, tmp_path: Path) -> None:
    config, tokenizer, types = CASES[case]
    folder = write_model(tmp_path / "tiny", config, tokenizer)
    tensors, config, evaluator = checkpoint_expressions(folder)
    layout = gguf_layout(config, tensors)
    vocabulary = read_vocabulary(folder, embedding_rows(layout))
    info = folder_info(folder, parameters=layout.parameters)
    targets = [
        Target(
            tmp_path / f"{name}.gguf",
            FILE_TYPES[name],
            gguf_metadata(config, layout, vocabulary, info, FILE_TYPES[name]),
        )
        for name in types
    ]
    write_ggufs(layout, evaluator, targets)
    for target in targets:
        ours, theirs = describe(target.path), reference()[case][target.file_type.name]
        assert ours["tensors"] == theirs["tensors"], target.file_type.name
        if tokenizer == "byte_fallback":
            del ours["keys"][SCORES], theirs["keys"][SCORES]
        assert json.loads(json.dumps(ours["keys"])) == theirs["keys"], target.file_type.name


@pytest.mark.parametrize("case", sorted(TYPES_ONLY))
def test_tensor_types_of_deep_models_equal_those_of_llama_quantize(case: str) -> None:
    config, _, types = CASES[case]
    tensors: dict[str, Expr] = {name: Read("tiny", name, "BF16", shape) for name, shape in shapes(config).items()}
    layout = gguf_layout(config, tensors)
    for name in types:
        chosen = layout.types(FILE_TYPES[name])
        ours = {tensor: f"{chosen[tensor]} {'x'.join(map(str, shape))}" for tensor, shape in layout.shapes.items()}
        theirs = reference()[case][name]["tensors"]
        # The quantiser leaves out the first dimension of a stack of one expert; the bytes are the same.
        assert {tensor: kind.replace(" 1x", " ") for tensor, kind in ours.items()} == theirs, name
