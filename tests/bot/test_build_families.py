"""A whole build, from the recipe to the card, of families with a shared expert and of those with other names for things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bot.cli import main
from evals.results import read_report
from tests.merge.test_families import small

WORDS = ("code", "stories", "numbers")
SHARED: dict[str, Any] = {"residual_scale": 0.1}


@pytest.mark.parametrize(
    ("model_type", "family", "mode", "shared"),
    [
        ("qwen2", "qwen2_moe", "hidden", SHARED | {"positive_prompts": ["everything at once"]}),
        ("llama", "deepseek", "hidden", SHARED),
        ("ernie4_5", "ernie4_5_moe", "discriminant", SHARED),
        ("olmo2", "flex_olmo", "discriminant", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen2", "qwen2_moe", "discriminant", SHARED | {"positive_prompts": ["everything at once"]}),
                ("llama", "deepseek", "random", SHARED),
                ("hunyuan_v1_dense", "hunyuan_v1_moe", "discriminant", SHARED),
                ("granite", "granitemoe", "hidden", None),
                ("youtu", "deepseek_v3", "hidden", SHARED),
            )
        ),
    ],
)
def test_a_family_is_built_from_the_recipe_to_the_card(
    model_type: str, family: str, mode: str, shared: dict[str, Any] | None, tmp_path: Path
) -> None:
    dense = [small(tmp_path / f"m{n}", model_type, seed=n) for n in range(3)]
    experts = [
        {"source_model": str(x), "positive_prompts": [w, f"more {w}"]} for x, w in zip(dense, WORDS, strict=True)
    ]
    recipe: dict[str, Any] = {"base_model": str(dense[0]), "gate_mode": mode, "experts": experts}
    recipe |= {"architecture": family, "dtype": "float32", "release": {"quants": ["F16"]}, "router": {"expand": False}}
    if shared is not None:
        recipe["shared_experts"] = [{"source_model": str(dense[1])} | shared]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    report = read_report(tmp_path / "out/report.json")
    assert (report.family, report.experts_per_token, report.shared_experts) == (family, 2, int(shared is not None))
    assert [quant.proof for quant in report.quants] == ([] if family == "flex_olmo" else ["ran"])
    card = (tmp_path / "out/model/README.md").read_text()
    assert report.family_title in card
    assert "3 experts in every layer" in card
