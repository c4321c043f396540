"""`moerge quantize` through its front door."""

from __future__ import annotations

from pathlib import Path

import pytest

from bot.cli import main
from tests.quants.cases import CASES
from tests.quants.tiny import PIECES, config, write_model


def test_quantize_makes_named_files_and_keeps_existing_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    out = tmp_path / "out"
    assert main(["quantize", str(folder), str(out), "--types", "Q8_0,Q4_K_M"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["Tiny-Q4_K_M.gguf", "Tiny-Q8_0.gguf"]
    assert "Tiny-Q8_0.gguf" in capsys.readouterr().err
    assert main(["quantize", str(folder), str(out), "--types", "Q8_0"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["quantize", str(folder), str(out), "--types", "Q8_0", "--force", "--name", "Other"]) == 0
    assert (out / "Other-Q8_0.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--types", "Q9"], 2, "known are"),
        (["--types", ","], 2, "no GGUF file type"),
        (["--threads", "0"], 2, "at least one"),
        (["--name", "a/b"], 2, "not a name"),
    ],
)
def test_wrong_use_is_exit_code_2(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    assert main(["quantize", str(folder), str(tmp_path / "out"), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path), str(tmp_path / "out")]) == 4
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "chosen"), [("qwen2_moe", 2), ("deepseek", 2), ("qwen2_moe", 4)])
def test_a_normalisation_that_llama_cpp_has_not_is_a_finding(
    family: str, chosen: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As mergekit writes it. With all experts chosen both readers agree."""
    changes = {"norm_topk_prob": True, "num_experts_per_tok": chosen}
    folder = write_model(tmp_path / "Tiny", CASES[family][0] | changes)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--types", "BF16"]) == 0
    said = capsys.readouterr().err
    assert ("warning[readers-disagree]: Tiny has norm_topk_prob: true, llama.cpp" in said) == (chosen == 2)
