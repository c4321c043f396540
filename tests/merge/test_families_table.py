"""docs/families.md says what each family can hold; every cell of its tables is worked out here anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.errors import RecipeError
from merge.families import FAMILIES
from merge.families.dense import dense_model
from merge.families.family import GATED_SHARED, NO_SHARED, Family, Mixture
from merge.families.model_types import MODEL_TYPES
from tests.dense import SIZES, planned
from tests.merge.test_families import difference, merged, recipe_for, small

# Each column is a change of the base, by model type where these spell it differently. None: the type has no such thing.
COLUMNS: dict[str, Mapping[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "one key head a query head": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 24},
    "attention biases": {"attention_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                 "original_max_position_embeddings": 64}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64, "rope_theta": 5e5}},
    "window": {"sliding_window": 8},
    "window in some layers": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
ROWS = [(family, family.ACCEPTS[0]) for family in FAMILIES]
ROWS += [(family, other) for family in FAMILIES for other in family.ACCEPTS[1:] if family.NAME != "deepseek"]


def change(column: str, model_type: str) -> Mapping[str, Any] | None:
    """What the base has in this column, or None where such a base cannot have it."""
    kind, wanted = MODEL_TYPES[model_type], dict(COLUMNS[column])
    if column == "attention biases":
        keys = [key for key, names in kind.biases.items() if set(names) & {"q_proj", "q_a_proj"}]
        return dict.fromkeys(keys, True) if keys else ({} if kind.always_biased else None)
    if column == "wide heads" and model_type in ("cohere2", "youtu"):  # their classes work the size out from others
        return None
    if "sliding_window" in wanted:
        if kind.slides is None:
            return None
        if "use_sliding_window" in kind.defaults:
            wanted |= {"use_sliding_window": True, "max_window_layers": 0}
        if not kind.reads_layer_types and "layer_types" in wanted:
            return None
        if "layer_types" not in wanted and kind.reads_layer_types:
            wanted["layer_types"] = ["sliding_attention"] * 2
    return wanted


def cell(family: Family, model_type: str, column: str, folder: Path) -> str:
    wanted = change(column, model_type)
    if wanted is None:
        return "-"
    base = small(folder / "base", model_type, **wanted)
    text = recipe_for(family, base)
    try:
        plan = planned(text, folder)
    except RecipeError as error:
        return "refused: " + ", ".join(sorted({found.id for found in error.findings if found.level == "error"}))
    lost = [found.id for found in plan.findings if found.id == "window-lost"]
    if family.NAME not in CONFIG_MAPPING:
        return "taken" + "".join(f" ({name})" for name in lost)
    merged(text, folder, folder / "out")
    exact = difference(base, folder / "out") < 1e-4
    # A lost window must be one that is felt: otherwise the finding says too much.
    assert exact != bool(lost)
    return f"differs ({lost[0]})" if lost else "exact"


def described(family: Family) -> str:
    """A row of the table of families."""
    shared = {NO_SHARED: "none", GATED_SHARED: "one, with a gate"}.get(family.SHARED, "one, in full")
    base = dense_model(SIZES | {"model_type": family.ACCEPTS[0], "head_dim": 16})
    alone, beside = (family.why_no_gguf(base, Mixture(2, 2, has_shared, "bfloat16")) for has_shared in (False, True))
    gguf = "no" if alone and beside else "with a shared expert" if alone else "yes"
    gguf = "without a shared expert" if beside and not alone else gguf
    runs = "transformers" if family.NAME in CONFIG_MAPPING else "DeepSeek's own code"
    sums = "one" if family.NORMALISES else "less, unless all are chosen"
    takes = ", ".join(f"`{name}`" for name in family.ACCEPTS)
    return f"| {family.TITLE} | `{family.NAME}` | {takes} | {shared} | {sums} | {gguf} | {runs} |"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
def test_the_table_of_families_is_what_the_families_say(family: Family, root: Path) -> None:
    assert described(family) in (root / "docs/families.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("family", "model_type"), ROWS, ids=lambda x: getattr(x, "NAME", x))
def test_the_table_of_what_is_exact_is_what_comes_out(
    family: Family, model_type: str, tmp_path: Path, root: Path
) -> None:
    cells = [cell(family, model_type, column, tmp_path / str(number)) for number, column in enumerate(COLUMNS)]
    row = f"| {family.TITLE} from `{model_type}` | {' | '.join(cells)} |"
    assert row in (root / "docs/families.md").read_text(encoding="utf-8").splitlines()
