"""Every family: experts equal to the base give the base's logits, under the names that the Hub has for such models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.evaluate import Evaluator, open_files
from merge.families import FAMILIES
from merge.families.family import Family
from merge.plan import MergePlan
from merge.writer import write_checkpoint
from tests.dense import planned, recipe_text, save_dense

SMALL = {"num_hidden_layers": 2, "vocab_size": 512}
# What a tiny model of a type needs beside the common sizes.
NEEDS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "ministral": {"head_dim": 16, "sliding_window": 8},
    "cwm": {"head_dim": 16, "sliding_window": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 20,
        "initializer_range": 0.05,
    },
    "cohere2": {"logit_scale": 0.5, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "granite_swa": {"sliding_window": 8, "attention_multiplier": 0.3, "layer_rope_theta": [1e4, 0]},
}
# Families that transformers has a class for.
RUNNABLE = [family for family in FAMILIES if family.NAME in CONFIG_MAPPING]
PAIRS = [(family, model_type) for family in RUNNABLE for model_type in family.ACCEPTS]


def small(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny dense model in float32."""
    options = SMALL | NEEDS.get(model_type, {}) | changes
    return save_dense(folder, seed=seed, model_type=model_type, dtype=torch.float32, **options)


def recipe_for(family: Family, base: Path, **keys: Any) -> str:
    """Experts equal to the base; all of them for every token where the family's weights sum to one only then."""
    per_token = 2 if family.NORMALISES else 3
    return recipe_text(base, [base] * 3, dtype="float32", architecture=family.NAME, experts_per_token=per_token, **keys)


def merged(text: str, folder: Path, out: Path) -> MergePlan:
    plan = planned(text, folder)
    generator = torch.Generator().manual_seed(1)
    gates = {
        layer: torch.randn(plan.kept_experts + len(plan.gated), plan.config["hidden_size"], generator=generator)
        for layer in range(plan.config["num_hidden_layers"])
    }
    evaluator = Evaluator(open_files(plan.sources), gates)
    write_checkpoint(plan, plan.sources[plan.base], evaluator, out, gates_key="test")
    return plan


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def difference(base: Path, out: Path) -> float:
    """The largest difference between the logits of two models; those of the first are not all alike."""
    dense = logits(base)
    assert dense.std() > 0.02
    return float((dense - logits(out)).abs().max())


@pytest.mark.parametrize(("family", "model_type"), PAIRS, ids=lambda x: getattr(x, "NAME", x))
def test_experts_equal_to_the_base_give_the_base(family: Family, model_type: str, tmp_path: Path) -> None:
    base = small(tmp_path / "base", model_type)
    merged(recipe_for(family, base), tmp_path, tmp_path / "out")
    assert difference(base, tmp_path / "out") < 1e-4


@pytest.mark.parametrize(("family", "model_type"), PAIRS, ids=lambda x: getattr(x, "NAME", x))
def test_the_names_on_disk_are_those_that_transformers_writes_for_the_hub(
    family: Family, model_type: str, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", model_type)
    plan = merged(recipe_for(family, base), tmp_path, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    theirs = {name: tuple(x.shape) for name, x in load_file(tmp_path / "theirs/model.safetensors").items()}
    assert {tensor.name: tensor.expr.shape for tensor in plan.tensors} == theirs
    stored = [*model.parameters(), *(x for name, x in model.named_buffers() if name in model.state_dict())]
    assert plan.parameters.total == sum(x.numel() for x in stored)


@pytest.mark.parametrize(("family", "model_type"), PAIRS, ids=lambda x: getattr(x, "NAME", x))
def test_two_experts_of_equal_weight_are_one_mlp_of_both_side_by_side(
    family: Family, model_type: str, tmp_path: Path
) -> None:
    """A router of zeros gives each expert half: a dense MLP of both, its down projection halved, computes the same."""
    base, other = small(tmp_path / "base", model_type), small(tmp_path / "other", model_type, seed=1)
    plan = planned(recipe_text(base, [base, other], dtype="float32", architecture=family.NAME), tmp_path)
    gates = {layer: torch.zeros(len(plan.gated), plan.config["hidden_size"]) for layer in range(2)}
    evaluator = Evaluator(open_files(plan.sources), gates)
    write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="test")
    wide = small(tmp_path / "wide", model_type, intermediate_size=2 * 96)
    weights, theirs = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    for name, x in weights.items():
        if "down_proj" in name:
            weights[name] = torch.cat([x, theirs[name]], dim=1) / 2
        elif ".mlp." in name:
            weights[name] = torch.cat([x, theirs[name]])
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    assert difference(wide, tmp_path / "out") < 1e-4
    assert difference(base, tmp_path / "out") > 1e-3
