"""The cards of the community's models, rebuilt from their recipes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from bot.hub.card import problems
from cards.hub_results import result_files
from cards.render import render_model_card
from merge.recipe import load_recipe
from tests.cards.community import COMMUNITY, ROOT, community_report
from tests.cards.page import body, page
from tests.cards.reports import GOLDEN

DATA = Path(__file__).parent / "data"
BRUCE = "BurningBruce-005"


def test_the_model_index_of_burning_bruce_is_the_original_s_result_by_result() -> None:
    original = ModelCard.load(DATA / "BurningBruce-005.metadata.md").data
    ours = ModelCard(render_model_card(community_report(BRUCE))).data
    assert original.eval_results is not None
    assert ours.eval_results is not None
    assert len(ours.eval_results) == len(original.eval_results) == 6
    for own, theirs in zip(ours.eval_results, original.eval_results, strict=True):
        assert own == theirs
    assert (ours.model_name, ours.license, ours.language) == (original.model_name, original.license, original.language)
    assert set(original.tags or ()) <= set(ours.tags or ())


def test_the_table_of_burning_bruce_has_its_six_figures_and_their_average() -> None:
    text = body(render_model_card(community_report(BRUCE)))
    evaluation = text.split("\n## Evaluation\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .*? \| ([\d.]+|\*\*[\d.]+\*\*) \|$", evaluation, re.MULTILINE)
    assert [(name, value.strip("*")) for name, value in rows] == [
        ("AI2 Reasoning Challenge (25-Shot)", "72.01"),
        ("HellaSwag (10-Shot)", "88.31"),
        ("MMLU (5-Shot)", "64.76"),
        ("TruthfulQA (0-shot)", "67.27"),
        ("Winogrande (5-shot)", "83.35"),
        ("GSM8k (5-shot)", "71.49"),
        ("**Average** (Open LLM Leaderboard v1)", "74.53"),
    ]
    assert "This build did not measure it" in evaluation


def test_a_registered_benchmark_has_its_own_file_and_others_have_none() -> None:
    files = result_files(community_report(BRUCE))
    assert list(files) == [".eval_results/gsm8k.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 71.49)
    assert entry.source_name == "Open LLM Leaderboard"
    assert entry.notes == "5-shot, reported, not measured by the model's build"


def test_of_a_benchmark_s_configurations_only_the_registered_one_has_a_file() -> None:
    report = community_report(BRUCE)
    score = replace(report.scores[0], dataset="Idavidrein/gpqa", config="gpqa_diamond", value=30.3)
    files = result_files(replace(report, scores=(score, replace(score, config="gpqa_main", value=29.0))))
    [entry] = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gpqa.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("Idavidrein/gpqa", "diamond", 30.3)


def test_a_part_of_a_registered_benchmark_is_not_the_benchmark() -> None:
    report = community_report(BRUCE)
    whole = replace(report.scores[0], dataset="TIGER-Lab/MMLU-Pro", config=None, task="mmlu_pro")
    assert set(result_files(replace(report, scores=(whole,)))) == {".eval_results/mmlu-pro.yaml"}
    assert not result_files(replace(report, scores=(replace(whole, task="mmlu_pro_math"),)))


def test_a_set_measured_over_midnight_has_its_average() -> None:
    report = community_report(BRUCE)
    days = ["2026-11-21"] * 3 + ["2026-11-22"] * 3
    measured = tuple(
        replace(score, origin="measured", date=day) for score, day in zip(report.scores, days, strict=True)
    )
    card = render_model_card(replace(report, scores=measured))
    assert "**74.53**" in card
    assert "Measured by this build from 2026-11-21 to 2026-11-22" in card
    apart = tuple(replace(score, origin="imported") for score in measured)
    assert "**74.53**" not in render_model_card(replace(report, scores=apart))


@pytest.mark.parametrize("name", COMMUNITY)
def test_a_community_s_card_lists_the_models_of_its_recipe_and_is_as_it_was(name: str) -> None:
    report = community_report(name)
    card = render_model_card(report)
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml").recipe
    models = list(dict.fromkeys([recipe.base_model, *(expert.source_model for expert in recipe.experts)]))
    assert ModelCard(card).data.base_model == models
    table = body(card).split("\n## Experts\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \d+ \| .*?\[([\w./-]+)\]\(https://huggingface\.co/", table, re.MULTILINE)
    assert rows == [expert.source_model for expert in recipe.experts]
    assert not problems(card)[0]
    assert page(body(card)).words
    assert card == (GOLDEN / f"{name}.model.md").read_text(encoding="utf-8"), (
        "python -m tests.cards.reports, if it is meant"
    )
