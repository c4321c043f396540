"""Cards of the community's recipes, from the recipe and the configs of its sources alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from bot.evals import read_inputs
from bot.report import planned_report
from evals.results import Report
from merge.planner import build_plan
from merge.recipe import load_recipe
from merge.sources import Sources

ROOT = Path(__file__).parents[2]
# Where each was published; the recipes name no repository, since only their authors may write there.
COMMUNITY = {
    "BurningBruce-005": "ConvexAI/BurningBruce-005",
    "Beyonder-4x7B-v3": "mlabonne/Beyonder-4x7B-v3",
    "Raiden-16x3.43B": "Kquant03/Raiden-16x3.43B",
    "Xwin-Pygmalion-2x7B": None,
    "clown-car-4x7B": None,
    "smol_llama-8x220M": None,
}


@cache
def community_report(name: str) -> Report:
    """What a card could say of a recipe that was never built here."""
    loaded = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    opened, failed = Sources(loaded.folder, models=ROOT / "tests/data/models").open_all(loaded.recipe.references)
    assert not failed
    report = planned_report(loaded, build_plan(loaded, opened), gates_key="")
    return replace(report, repo=COMMUNITY[name], scores=read_inputs(loaded).scores, moerge_version="0.1.0")
