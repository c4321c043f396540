"""A file that llama.cpp cannot run is an error with a reason, never a crash of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from merge.errors import ProofError
from merge.evaluate import checkpoint_expressions
from quants.build import quantize
from quants.metadata import ModelInfo
from quants.proof import generate
from tests.quants.tiny import PIECES, config, write_model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("proof") / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    tensors, found, evaluator = checkpoint_expressions(folder)
    (file,) = quantize(
        found, tensors, evaluator, folder, folder, "Tiny", ["F32"], ModelInfo("Tiny"), prove=False
    )  # fmt: skip
    return file.path


def test_a_truncated_file_does_not_pass(gguf_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_file.read_bytes()[:-100_000])
    with pytest.raises(ProofError, match=r"short\.gguf: llama\.cpp does not run it \(.*not within the file bounds"):
        generate(short)


def test_what_is_no_gguf_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(ProofError, match="does not run it"):
        generate(tmp_path / "none.gguf")
    with pytest.raises(ProofError, match="does not run it"):
        generate(tmp_path / "missing.gguf")


def test_weights_that_are_not_numbers_do_not_pass(gguf_file: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    (tensor,) = (tensor for tensor in GGUFReader(gguf_file).tensors if tensor.name == "output_norm.weight")
    raw = bytearray(gguf_file.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = np.full(256, np.nan, np.float32).tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(ProofError, match=r"nan\.gguf"):
        generate(tmp_path / "nan.gguf")


def test_time_runs_out(gguf_file: Path) -> None:
    with pytest.raises(ProofError, match="within 0 seconds"):
        generate(gguf_file, timeout=0.01)


def test_greedy_generation_repeats_itself(gguf_file: Path) -> None:
    first, second = (generate(gguf_file, "many small experts", 8) for _ in range(2))
    assert first.tokens == second.tokens
    assert len(first.tokens) == 8
