"""Where recipes are built, and which first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bot.cli import main
from bot.runners import Runner, parse_runner
from tests.bot.workflow import Recipes, hub_recipe, push, recipe, run_step


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path / "workspace")


@pytest.mark.parametrize(
    ("text", "runner"),
    [
        ("ubuntu-latest", Runner(("ubuntu-latest",))),
        ("self-hosted, gpu,gpu", Runner(("self-hosted", "gpu"))),
        ("group one", Runner(("group one",))),
        ("hf-jobs", Runner(("ubuntu-latest",), "cpu-upgrade", 6 * 3600)),
        ("hf-jobs:a10g-large", Runner(("ubuntu-latest",), "a10g-large", 6 * 3600)),
        ("hf-jobs:h200x8:90m", Runner(("ubuntu-latest",), "h200x8", 5400)),
        ("hf-jobs::2d", Runner(("ubuntu-latest",), "cpu-upgrade", 2 * 86400)),
    ],
)
def test_a_runner_is_labels_or_a_job_with_flavor_and_time(text: str, runner: Runner) -> None:
    assert parse_runner(text) == runner
    assert parse_runner(runner.text) == runner


@pytest.mark.parametrize(
    "text", [",", "hf-jobs:A10G", "hf-jobs:a10g-large:forever", "hf-jobs:a:1h:2", "hf-jobs:a10g:8d", "hf-jobs:a10g:5s"]
)
def test_what_is_no_runner_is_said_at_its_line_and_not_built(text: str, recipes: Recipes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_runner(text)
    before = recipes.commit()
    after = recipes.commit(**{"recipes/a.yaml": recipe(2, build={"runner": text}), "recipes/b.yaml": recipe(3)})
    step = run_step(recipes.folder, "push", push(before, after), after, command="plan")
    assert step.code == 1
    [error] = [line for line in step.annotations if line.startswith("::error")]
    assert error.startswith("::error file=recipes/a.yaml,line=") and "title=bad-runner" in error
    assert [entry["name"] for entry in json.loads(step.outputs["matrix"])["include"]] == ["b"]


def test_a_preview_says_what_a_hugging_face_job_cannot_build(
    recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.write("recipes/a.yaml", recipe(2, build={"runner": "hf-jobs:a10g-lrge"}))
    assert main(["preview", str(recipes.folder / "recipes/a.yaml"), "--json"]) == 1
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)[0]["findings"]}
    assert "perhaps you meant a10g-large" in found["unknown-flavor"]["message"]
    assert {"job-without-repository", "job-with-local-source"} <= set(found)


def test_a_job_is_sent_off_from_a_hosted_runner_and_labels_are_a_list(recipes: Recipes) -> None:
    before = recipes.commit()
    job = hub_recipe("a/b", "c/d", build={"runner": "hf-jobs:l4x1:2h"}, release={"repo": "me/J"})
    own = recipe(2, build={"runner": "self-hosted, gpu"}, release={"repo": "me/A"})
    cpu = recipe(3, build={"runner": "big", "device": "cpu"})
    after = recipes.commit(**{"recipes/a.yaml": own, "recipes/cpu.yaml": cpu, "recipes/j.yaml": job})
    step = run_step(recipes.folder, "push", push(before, after), after, command="plan")
    assert step.code == 0, step.log
    assert json.loads(step.outputs["matrix"])["include"] == [
        {"recipe": "recipes/a.yaml", "name": "A", "runner": ["self-hosted", "gpu"], "repo": "me/A", "gpu": True, "job": ""},
        {"recipe": "recipes/cpu.yaml", "name": "cpu", "runner": "big", "repo": "", "gpu": False, "job": ""},
        {
            "recipe": "recipes/j.yaml", "name": "J", "runner": "ubuntu-latest", "repo": "me/J", "gpu": False,
            "job": "hf-jobs:l4x1:2h",
        },
    ]  # fmt: skip
    assert "hf-jobs:l4x1" in step.summary and "self-hosted, gpu" in step.summary


def test_changed_recipes_come_before_new_ones_and_what_is_left_out_is_named(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/zz.yaml": recipe(2)})
    files = {f"recipes/{number:03}.yaml": recipe(2) for number in range(257)}
    after = recipes.commit(**files, **{"recipes/zz.yaml": recipe(3)})
    step = run_step(recipes.folder, "push", push(before, after), after, command="plan")
    names = [entry["name"] for entry in json.loads(step.outputs["matrix"])["include"]]
    assert names[0] == "zz" and names[1:] == [f"{number:03}" for number in range(255)]
    [warning] = [line for line in step.annotations if line.startswith("::warning")]
    assert "recipes/255.yaml" in warning and "recipes/256.yaml" in warning and "recipes/254.yaml" not in warning
    assert "2 recipes are left for another run" in step.summary


def test_two_recipes_of_one_repository_are_not_built_over_each_other(recipes: Recipes) -> None:
    before = recipes.commit()
    files = {f"recipes/{name}.yaml": recipe(number, release={"repo": repo}) for number, (name, repo) in enumerate(
        (("a", "me/Same"), ("b", "me/same"), ("c", "me/Other")), start=2)}  # fmt: skip
    after = recipes.commit(**files)
    step = run_step(recipes.folder, "push", push(before, after), after, command="plan")
    assert step.code == 1
    assert [entry["recipe"] for entry in json.loads(step.outputs["matrix"])["include"]] == [
        "recipes/a.yaml",
        "recipes/c.yaml",
    ]
    assert any("file=recipes/b.yaml" in line and "title=shared-repository" in line for line in step.annotations)


def test_a_default_runner_that_is_none_is_a_wrong_input(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    step = run_step(recipes.folder, "push", push("0" * 40, head), head, command="plan", runner="hf-jobs:a10g:soon")
    assert step.code == 2 and "runner 'hf-jobs:a10g:soon'" in step.annotations[0]
