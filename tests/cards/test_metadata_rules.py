"""The Hub's documented rules for a card's metadata, each with where it is documented, held by both cards of every report.

The Hub's own check runs when a README.md is pushed: huggingface_hub sends it to /api/validate-yaml. Here the unmodified client
does so to the embedded Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from bot.hub.server import Server, running
from cards.hub_results import result_files
from cards.render import render_gguf_card, render_model_card
from evals.results import Report
from tests.cards.community import COMMUNITY, community_report
from tests.cards.reports import demo_report, measured_report, release_report

REPORTS = {"demo": demo_report, "release": release_report, "measured": measured_report} | {
    name: lambda name=name: community_report(name) for name in COMMUNITY
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]()  # type: ignore[no-any-return]


def metadata(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    value = yaml.safe_load(found[1])
    assert isinstance(value, dict)
    return value


def test_the_client_s_own_validation_takes_both_cards(
    report: Report, hub: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub.ModelCard.validate, which raises for errors and warns of warnings."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    for card in (render_model_card(report), render_gguf_card(report)):
        ModelCard(card).validate(repo_type="model")


def test_a_broken_card_is_refused_by_the_same_validation(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: no such licence\n---\n").validate(repo_type="model")


def test_the_base_models_are_a_list_with_their_relation(report: Report) -> None:
    """https://huggingface.co/docs/hub/model-cards#specifying-a-base-model: several models merged are a list, and the relation
    is `merge`; a quantised one is `quantized`."""
    model, gguf = metadata(render_model_card(report)), metadata(render_gguf_card(report))
    if "base_model" in model:
        assert model["base_model_relation"] == "merge"
        assert len(set(model["base_model"])) == len(model["base_model"])
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in model["base_model"])
    if report.repo:
        assert (gguf["base_model"], gguf["base_model_relation"]) == ([report.repo], "quantized")


def test_the_library_and_the_task_are_named(report: Report) -> None:
    """https://huggingface.co/docs/hub/model-cards#specifying-a-library and #specifying-a-task--pipelinetag-"""
    model = metadata(render_model_card(report))
    assert (model["library_name"], model["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"moe", "frankenmoe", "merge"} <= set(model["tags"])


def test_a_licence_that_is_not_listed_is_other_with_a_name(report: Report) -> None:
    """https://huggingface.co/docs/hub/model-cards#model-card-metadata: `license: other` needs license_name (small letters, no
    spaces) and license_link: LICENSE, LICENSE.md or a URL."""
    for card in (render_model_card(report), render_gguf_card(report)):
        data = metadata(card)
        if data.get("license") == "other":
            assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", data["license_name"])
            assert data["license_link"] in ("LICENSE", "LICENSE.md") or data["license_link"].startswith("https://")
        else:
            assert "license_name" not in data


def test_a_result_has_its_task_its_data_set_and_its_metric(report: Report) -> None:
    """https://github.com/huggingface/hub-docs/blob/main/modelcard.md: task.type, dataset.type, dataset.name, metrics.type and
    metrics.value are required; a source with a name has a URL (huggingface_hub.EvalResult)."""
    index = metadata(render_model_card(report)).get("model-index")
    assert (index is None) == (not report.scores)
    for result in index[0]["results"] if index else []:
        assert result["task"]["type"]
        assert result["dataset"]["type"]
        assert result["dataset"]["name"]
        assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])
        assert result.get("source", {"url": "x"})["url"]


def test_files_of_results_have_the_documented_keys(report: Report) -> None:
    """https://huggingface.co/docs/hub/eval-results: dataset.id, dataset.task_id and value are required; the data set must be a
    registered benchmark; a date is ISO 8601; a source has a URL."""
    for name, content in result_files(report).items():
        assert re.fullmatch(r"\.eval_results/[\w-]+\.yaml", name)
        rows = yaml.safe_load(content)
        for row, entry in zip(rows, parse_eval_result_entries(rows), strict=True):
            assert entry.dataset_id in ("openai/gsm8k", "TIGER-Lab/MMLU-Pro", "cais/hle", "Idavidrein/gpqa")
            assert isinstance(entry.value, float)
            assert set(row) <= {"dataset", "value", "date", "source", "notes"}
            assert entry.date is None or re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)


def test_files_of_results_lie_beside_the_card(tmp_path: Path) -> None:
    from cards.render import model_files, write_cards

    report = measured_report()
    write_cards(tmp_path, report)
    assert set(model_files(report)) - {"image.png"} == {
        path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*") if path.is_file()
    }
    assert ".eval_results/gsm8k.yaml" in model_files(report)
