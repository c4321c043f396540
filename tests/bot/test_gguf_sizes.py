"""The preview's size of each quant is that of the tensor data written, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from bot.cli import main
from tests.dense import recipe_text
from tests.merge.test_families import small

USUAL = ["F16", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS"]
# Rows that divide into every block, and rows that divide into none of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
ODD = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("model_type", "changes", "types"),
    [
        ("llama", WIDE, ["BF16", "Q4_K_M", "Q2_K_S"]),
        ("qwen2", ODD | {"tie_word_embeddings": True}, ["BF16", "Q4_K_M"]),
        ("youtu", ODD, ["BF16", "Q4_K_M"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", WIDE, [*USUAL, "IQ2_M"]),
                ("qwen2", WIDE | {"tie_word_embeddings": True}, [*USUAL, "IQ1_S"]),
                ("qwen3", WIDE, USUAL),
                ("granite", ODD, USUAL),
                ("granite_swa", WIDE, USUAL),
                ("ernie4_5", ODD, USUAL),
                ("hunyuan_v1_dense", ODD, USUAL),
                ("cohere2", WIDE, USUAL),
            )
        ),
    ],
)
def test_the_preview_tells_each_quant_s_tensor_bytes_exactly(
    model_type: str, changes: dict[str, Any], types: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text.txt").write_text("the capital of france is paris and many small experts read text " * 20)
    monkeypatch.setattr("quants.imatrix.CALIBRATION", tmp_path / "text.txt")
    models = [small(tmp_path / f"m{number}", model_type, number, **changes) for number in range(3)]
    (tmp_path / "tiny.yaml").write_text(recipe_text(models[0], models, release={"quants": types}))
    assert main(["preview", "--json", str(tmp_path / "tiny.yaml")]) == 0
    (preview,) = json.loads(capsys.readouterr().out)
    assert main(["quantize", str(tmp_path / "tiny.yaml"), str(tmp_path / "out")]) == 0
    written = {}
    for kind in types:
        path = tmp_path / "out" / f"tiny-{kind}.gguf"
        written[kind] = path.stat().st_size - int(GGUFReader(path).data_offset)
        assert abs(path.stat().st_size - preview["gguf_bytes"][kind]) < 16_384
    assert preview["gguf_tensor_bytes"] == written
