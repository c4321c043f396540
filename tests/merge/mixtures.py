"""Small mixtures for tests: recipes of them, merges with given gates, and what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge.evaluate import Evaluator, open_files
from merge.families import FAMILIES
from merge.families.family import Family
from merge.plan import MergePlan
from merge.writer import write_checkpoint
from tests.dense import planned
from tests.merge.test_families import RUNNABLE, small

HIDDEN, LAYERS = 64, 2
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
RUN = pytest.mark.parametrize("family", RUNNABLE, ids=lambda family: family.NAME)


def recipe(base: Path, experts: list[dict[str, Any]], **keys: Any) -> str:
    """A recipe in float32 with these experts."""
    whole = {"base_model": str(base), "gate_mode": "random", "dtype": "float32", "experts_per_token": 2}
    return json.dumps(whole | keys | {"experts": experts})  # JSON is YAML


def write(text: str, folder: Path, name: str, gates: torch.Tensor) -> MergePlan:
    """Merge into `folder/name`; `gates` (rows, hidden) are the same in every layer."""
    plan = planned(text, folder)
    evaluator = Evaluator(open_files(plan.sources), dict.fromkeys(range(LAYERS), gates))
    write_checkpoint(plan, plan.sources[plan.base], evaluator, folder / name, gates_key="test")
    return plan


def rows(count: int) -> torch.Tensor:
    return torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1))[:count]


def dense_models(family: Family, folder: Path, count: int = 3) -> list[Path]:
    return [small(folder / f"dense{seed}", family.ACCEPTS[0], seed=seed) for seed in range(count)]


def mixture(family: Family, experts: list[Path], folder: Path, name: str = "mixture", **keys: Any) -> Path:
    """A mixture of dense models, the first of them its base."""
    text = recipe(experts[0], [{"source_model": str(x)} for x in experts], architecture=family.NAME, **keys)
    shared_gate = int(family.NAME == "qwen2_moe" and "shared_experts" in keys)
    write(text, folder, name, rows(len(experts) + shared_gate))
    return folder / name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
