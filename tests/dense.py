"""Small dense models, saved by transformers itself, and recipes over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.plan import MergePlan
from merge.planner import build_plan
from merge.recipe import LoadedRecipe, parse_recipe
from merge.sources import Sources
from tests.quants import tiny

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save_dense(
    folder: Path, seed: int = 0, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """A dense model with random weights and a tokenizer, in `folder`."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms of ones and biases of zeros would hide a mistake
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    model.save_pretrained(folder)
    tiny.byte_fallback(folder)
    return folder


def recipe_text(base: Path | str, experts: list[Path | str], **keys: Any) -> str:
    """A recipe over these models, with random gates unless `keys` say otherwise."""
    value = {"base_model": str(base), "gate_mode": "random", "experts": [{"source_model": str(e)} for e in experts]}
    return yaml.safe_dump(value | keys, sort_keys=False)


def loaded_recipe(text: str, folder: Path) -> LoadedRecipe:
    return parse_recipe(text.encode(), folder / "recipe.yaml")


def planned(text: str, folder: Path) -> MergePlan:
    """The plan of a recipe over local models."""
    loaded = loaded_recipe(text, folder)
    opened, failed = Sources(folder).open_all(loaded.recipe.references)
    if failed:
        raise next(iter(failed.values()))
    return build_plan(loaded, opened)
