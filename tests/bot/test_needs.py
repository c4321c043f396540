"""The memory that a preview says a build needs."""

from __future__ import annotations

import json
from pathlib import Path

from bot.needs import BYTES_PER_TOKEN, CHARACTERS, memory_bytes
from merge.gates.prompts import MAX_TOKENS
from tests.dense import planned, save_dense


def test_a_calibration_needs_memory_for_its_tokens_up_to_as_many_as_are_used(tmp_path: Path) -> None:
    base = str(save_dense(tmp_path / "base"))

    def memory(mode: str, characters: int) -> tuple[int, int]:
        experts = [
            {"source_model": base, "positive_prompts": [letter * characters], "negative_prompts": ["x"]}
            for letter in ("a", "b")
        ]
        # JSON is YAML.
        recipe = {"base_model": base, "gate_mode": mode, "experts": experts, "release": {"quants": []}}
        plan = planned(json.dumps(recipe), tmp_path)
        return memory_bytes(plan), plan.config["hidden_size"]

    (few, hidden), (many, _) = memory("discriminant", 4000), memory("discriminant", 8000)
    assert many - few == 2 * 4000 // CHARACTERS * BYTES_PER_TOKEN * hidden
    most = memory("discriminant", MAX_TOKENS * CHARACTERS)
    assert most == memory("discriminant", 2 * MAX_TOKENS * CHARACTERS) > (many, hidden)
    assert memory("hidden", 4000) == memory("hidden", 8000)
