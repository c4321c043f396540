"""The two shapes of real merges that quantisers stumble over, scaled down at their exact ratios: every type loads and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bot.quants import open_model
from quants.build import quantize
from quants.filetypes import FILE_TYPES
from quants.metadata import ModelInfo
from tests.quants.cases import write_imatrix
from tests.quants.tiny import PIECES, config, write_model

# OpenLLaMA-3B with 16 experts (Raiden-16x3.43B), a tenth of its hidden size 3200, MLP 8640 and 32 heads of 100: they divide by 32,
# not by 256. Llama-2-7B with 2 (Xwin-Pygmalion), a sixteenth of 4096 and 11008 and 32 heads of 128, as many of keys as of queries.
SHAPES: dict[str, dict[str, Any]] = {
    "OpenLLaMA-3B, 16 experts": {"hidden_size": 320, "intermediate_size": 864, "num_local_experts": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-2-7B, 2 experts": {"hidden_size": 256, "intermediate_size": 688, "num_local_experts": 2}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
}
EVERY_DAY = ("Q8_0", "Q4_K_M")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "types", [EVERY_DAY, pytest.param(tuple(FILE_TYPES), marks=pytest.mark.slow)], ids=["usual types", "all types"]
)
def test_every_type_of_it_loads_and_generates(types: tuple[str, ...], shape: str, tmp_path: Path) -> None:
    found = config(**SHAPES[shape], num_hidden_layers=1, vocab_size=PIECES)
    model = open_model(write_model(tmp_path / "Tiny", found))
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", found) if len(types) > len(EVERY_DAY) else None
    files = quantize(
        model.config, model.tensors, model.contents, model.folder, tmp_path / "out", "Tiny", types, ModelInfo("Tiny"),
        imatrix=imatrix,
    )  # fmt: skip
    assert {file.file_type: file.failure for file in files} == dict.fromkeys(types)
    assert all(file.proof and file.proof.generation.tokens for file in files)
