"""Weights that are not numbers are found, and the build that finds them ends with their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bot.cli import main
from evals.weights import BrokenTensor, broken_tensors
from merge.evaluate import checkpoint_expressions
from tests.dense import recipe_text, save_dense

NAME = "model.layers.1.mlp.down_proj.weight"


def spoil(model: Path, values: dict[int, float], name: str = NAME) -> None:
    """Put `values` at these places of a tensor."""
    tensors = load_file(model / "model.safetensors")
    for place, value in values.items():
        tensors[name].view(-1)[place] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_infinity_are_found_wherever_they_are_and_the_largest_numbers_are_not(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model, largest = save_dense(tmp_path / "model", dtype=dtype), torch.finfo(dtype).max
    spoil(model, {0: largest, 1: -largest, 2: torch.finfo(dtype).tiny, 3: -0.0})
    tensors, _, evaluator = checkpoint_expressions(model)
    assert broken_tensors(tensors, evaluator) == ()
    spoil(model, {0: float("nan"), 100: float("inf"), 6143: -float("inf")})
    tensors, _, evaluator = checkpoint_expressions(model)
    assert broken_tensors(tensors, evaluator) == (BrokenTensor(NAME, 3, 6144),)


def test_a_build_of_broken_weights_ends_with_the_tensor_and_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [save_dense(tmp_path / f"m{n}", seed=n) for n in range(2)]
    spoil(models[1], {7: float("nan")})
    (tmp_path / "r.yaml").write_text(recipe_text(models[0], models, release={"quants": ["Q8_0"]}))
    for _ in range(2):  # it is not remembered as passed
        assert main(["build", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 4
        said = capsys.readouterr().err
        assert "NaN or infinite" in said
        assert "model.layers.1.block_sparse_moe.experts.1.w2.weight (1 of 6144" in said
        assert f"{NAME} of {models[1]}" in said
    assert not (tmp_path / "out/report.json").exists()
    assert not (tmp_path / "out/gguf").exists()
