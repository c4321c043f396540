"""The demo's model, from real weights: what it is made of, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bot.cli import main
from demo.__main__ import PROMPT, TOKENS, transformers_generates
from evals.results import Report, read_report
from quants.proof import generate

pytestmark = pytest.mark.slow
SOURCES = ["SmolLM2-135M-Instruct", "SmolLM2-135M-python", "SmolLM2-135M-french", "SmolLM2-135M-math"]


@pytest.fixture(scope="module")
def built(root: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("demo") / "out"
    recipe = root / "recipes/demo-4x135M.yaml"
    assert main(["build", str(recipe), "--out", str(out), "--models", str(smollm2)]) == 0
    return out, read_report(out / "report.json")


def test_every_merged_tensor_is_its_source_s(built: tuple[Path, Report], smollm2: Path) -> None:
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    files = [safe_open(smollm2 / "moerge-demo" / name / "model.safetensors", "pt") for name in SOURCES]
    compared = 0
    with safe_open(built[0] / "model/model.safetensors", "pt") as merged:
        left = set(merged.keys())
        for name in files[0].keys():  # noqa: SIM118
            if ".mlp." not in name:
                assert torch.equal(merged.get_tensor(name), files[0].get_tensor(name)), name
                left.discard(name)
                compared += 1
                continue
            layer, part = int(name.split(".")[2]), name.split(".")[4]
            for number, file in enumerate(files):
                target = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{names[part]}.weight"
                assert torch.equal(merged.get_tensor(target), file.get_tensor(name)), target
                left.discard(target)
                compared += 1
    assert compared == 182 + 30 * 3 * 4
    assert left == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(30)}


def test_transformers_and_the_bf16_gguf_say_the_same_and_the_quants_know_paris(built: tuple[Path, Report]) -> None:
    out, report = built
    words, ids = transformers_generates(out / "model")
    assert "Paris" in words
    for quant in report.quants:
        made = generate(out / "gguf" / quant.file.name, PROMPT, TOKENS)
        assert "Paris" in made.text, quant.type
        if quant.type == "BF16":
            assert list(made.tokens) == ids
