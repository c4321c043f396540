"""What a recipe wants measured is measured on the model that was built, once, and stands in its report and its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from bot.cli import main
from evals.results import Report, read_report
from tests.dense import recipe_text, save_dense
from tests.questions import percent_right

DATA = Path(__file__).parents[1] / "data" / "evals"
REPORTED = {
    "source": {"name": "Some Leaderboard", "url": "https://example.org/board"},
    "date": "2024-01-25",
    "results": [
        {
            "dataset": "HellaSwag (10-Shot)",
            "type": "hellaswag",
            "num_few_shot": 10,
            "metric": "acc_norm",
            "value": 88.31,
        }
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over two small models with everything that `evals` can ask for, and its build in out/."""
    folder = tmp_path_factory.mktemp("evals")
    models = [save_dense(folder / f"m{n}", seed=n, max_position_embeddings=512) for n in range(2)]
    (folder / "a.txt").write_text("the capital of france is paris. " * 8)
    (folder / "b.txt").write_text("def main(): return 1\n" * 8)
    shutil.copy(DATA / "capitals.jsonl", folder)
    evals = {
        "texts": {"prose": "a.txt", "code": "b.txt"},
        "samples": ["the capital of", "def main"],
        "tasks": [{"name": "capitals", "data": "capitals.jsonl", "shots": 2, "title": "Capitals and other facts"}],
        "results": REPORTED,
    }
    release = {"repo": "me/Tiny-2x1M", "quants": [], "license": "apache-2.0"}
    text = recipe_text(models[0], list(models), experts_per_token=1, evals=evals, release=release)
    (folder / "recipe.yaml").write_text(text)
    assert main(["build", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return read_report(folder / "out/report.json")


def test_every_model_is_measured_on_every_text(report: Report) -> None:
    found = report.perplexities
    assert found is not None
    assert found.texts == ("prose", "code")
    assert [model.role for model in found.models] == ["mixture", "base", "expert"]
    assert all(loss is not None and loss.tokens > 20 for model in found.models for loss in model.losses)
    assert len({model.losses for model in found.models}) == 3


def test_the_harness_s_score_is_the_one_that_the_logits_give(report: Report, folder: Path) -> None:
    """Eight questions after two examples: the choice with the largest likelihood a character is the model's answer."""
    [score] = [score for score in report.scores if score.origin == "measured"]
    assert (score.title, score.task, score.shots, score.samples) == ("Capitals and other facts", "capitals", 2, 8)
    assert score.harness == "lm-evaluation-harness 0.4.13"
    assert score.value == pytest.approx(percent_right(folder / "out/model", folder / "capitals.jsonl", 2))


def test_model_index_holds_measured_and_reported_figures_with_their_sources(report: Report, folder: Path) -> None:
    card = ModelCard.load(folder / "out/model/README.md")
    index = {result.dataset_name: result for result in card.data.eval_results or []}
    [measured] = [score for score in report.scores if score.origin == "measured"]
    own = index["Capitals and other facts"]
    assert own.metric_value == pytest.approx(measured.value, abs=0.005)
    assert own.source_name == "lm-evaluation-harness 0.4.13"
    told = index["HellaSwag (10-Shot)"]
    assert (told.metric_value, told.source_name, told.source_url) == (
        88.31,
        "Some Leaderboard",
        "https://example.org/board",
    )
    assert told.dataset_args == {"num_few_shot": 10}
    text = card.text
    assert f"| Capitals and other facts | normalized accuracy | {measured.value:.2f}" in text
    assert "Reported by [Some Leaderboard](https://example.org/board)" in text
    assert "2024-01-25" in text


def test_samples_are_in_the_card(report: Report, folder: Path) -> None:
    assert [sample.prompt for sample in report.samples] == ["the capital of", "def main"]
    assert all(sample.greedy and sample.sampled for sample in report.samples)


def test_nothing_is_measured_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "out/report.json").read_bytes()
    assert main(["build", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--device", "cpu"]) == 0
    assert "lm-eval" not in capsys.readouterr().err
    assert (folder / "out/report.json").read_bytes() == before


def limited() -> dict[str, object]:
    return {
        "results": {"arc_easy": {"acc,none": 0.5}},
        "n-samples": {"arc_easy": {"original": 100, "effective": 10}},
        "lm_eval_version": "0.4.13",
    }


def test_a_build_stopped_between_two_tasks_goes_on_at_the_second(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evals.harness import Harness, HarnessTask

    out, recipe = tmp_path / "out", folder / "two-tasks.yaml"
    shutil.copytree(folder / "out", out)
    value = yaml.safe_load((folder / "recipe.yaml").read_text())
    value["evals"]["tasks"] = [
        {"name": name, "data": "capitals.jsonl", "shots": shots} for name, shots in (("a", 1), ("b", 3))
    ]
    recipe.write_text(json.dumps(value))
    run = Harness.run

    def stopped(self: Harness, task: HarnessTask) -> object:
        if task.name == "b":
            raise KeyboardInterrupt
        return run(self, task)

    monkeypatch.setattr(Harness, "run", stopped)
    assert main(["build", str(recipe), "--out", str(out), "--device", "cpu"]) == 130  # as a shell says of an interrupt
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["build", str(recipe), "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "(2 of 2)" in said
    assert "(1 of 2)" not in said
    measured = [score for score in read_report(out / "report.json").scores if score.origin == "measured"]
    assert [(score.task, score.shots) for score in measured] == [("a", 1), ("b", 3)]


@pytest.mark.parametrize(
    ("evals", "said"),
    [
        (
            {"results": "limited.json"},
            "limited.json cannot be used for evals.results: arc_easy was run on 10 of 100 examples",
        ),
        ({"results": "missing.json"}, "No such file or directory"),
        ({"results": "/etc/passwd"}, "it lies outside the recipe's folder"),
        ({"results": "broken.yaml"}, "cannot be used for evals.results: source: Field required"),
        ({"results": {"source": {"name": "x", "url": "javascript:x"}, "results": []}}, "must be a web address"),
        ({"texts": ["../outside.txt"]}, "it lies outside the recipe's folder"),
        ({"texts": ["empty.txt"]}, "it is empty"),
        ({"tasks": [{"name": "x", "data": "empty.txt"}]}, "no questions in it"),
        ({"tasks": [{"name": "x", "data": "capitals.jsonl", "shots": 10}]}, "it has 10 questions, of which 10"),
        ({"tasks": [{"name": "a b", "data": "capitals.jsonl"}]}, "evals.tasks[1].name"),
        ({"tasks": [{"name": "x", "data": "bad.jsonl"}]}, "question 1 is not"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_built(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evals: dict[str, object], said: str
) -> None:
    (tmp_path / "limited.json").write_text(json.dumps(limited()))
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"results": REPORTED["results"]}))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"question": "x", "choices": ["a", "b"], "answer": 2}\n')
    shutil.copy(DATA / "capitals.jsonl", tmp_path)
    models = [folder / "m0", folder / "m1"]
    (tmp_path / "recipe.yaml").write_text(recipe_text(models[0], list(models), evals=evals, release={"quants": []}))
    assert main(["build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out/model").exists()


@pytest.mark.slow
def test_every_task_of_the_sets_is_one_of_the_harness_s() -> None:
    from lm_eval.tasks import TaskManager

    from evals.suites import SUITES

    known = set(TaskManager().all_tasks)
    assert {task.name for suite in SUITES.values() for task in suite.tasks} <= known


def test_a_task_that_the_harness_does_not_have_is_named_with_the_nearest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [folder / "m0", folder / "m1"]
    text = recipe_text(models[0], list(models), evals={"tasks": ["arc_chalenge"]}, release={"quants": []})
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "has no task 'arc_chalenge'; perhaps you meant 'arc_challenge'" in capsys.readouterr().err
