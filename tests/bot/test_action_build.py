"""`command: build` on real events: what changed is built and published, once, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from bot.hub.server import Server, running
from tests.bot.workflow import ZEROS, Recipes, hub_recipe, pull_request, push, run_step, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipes(tmp_path: Path, models: Path) -> Recipes:
    repository = Recipes(tmp_path / "workspace", models=False)
    shutil.copytree(models, repository.folder / "models")
    return repository


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "hub") as server:
        yield server


def tiny(repo: str | None, *, seed: int = 0, comment: str = "a recipe") -> str:
    """A recipe over this repository's models that is built in seconds."""
    value = {
        "base_model": "../models/m0",
        "gate_mode": "random",
        "experts_per_token": 1,
        "experts": [{"source_model": "../models/m0"}, {"source_model": "../models/m1"}],
        "build": {"seed": seed},
        "release": {"license": "apache-2.0", "quants": ["Q8_0"], **({"repo": repo} if repo else {})},
    }
    return f"# {comment}\n{yaml.safe_dump(value)}"


def test_a_push_builds_and_publishes_exactly_the_recipe_it_adds(recipes: Recipes, hub: Server) -> None:
    before = recipes.commit(**{"recipes/old.yaml": tiny("me/Old")})
    added = {"recipes/new.yaml": tiny("me/New", seed=1), "recipes/old.yaml": tiny("me/Old", comment="another comment")}
    after = recipes.commit(**added)
    given = {"command": "build", "token": hub.token(), "hub_endpoint": hub.endpoint}
    step = run_step(recipes.folder, "push", push(before, after), after, **given)
    assert step.code == 0, step.log
    assert json.loads(step.outputs["changed"]) == ["recipes/new.yaml"]
    [release] = json.loads(step.outputs["published"])
    assert (release["recipe"], release["repo"], release["changed"]) == ("recipes/new.yaml", "me/New", True)
    assert step.outputs["model_url"] == release["url"] == f"{hub.endpoint}/me/New"
    assert release["commit"][:9] in step.summary and "published" in step.summary
    assert hub.token() not in step.log.split("\n", 1)[1] + step.summary
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    assert {model.id for model in api.list_models()} == {"me/New", "me/New-GGUF"}
    assert api.model_info("me/New").sha == release["commit"]

    # The job run again: nothing is built anew, and the Hub has it already.
    again = run_step(recipes.folder, "push", push(before, after), after, **given)
    assert again.code == 0 and "published already" in again.summary
    [release_again] = json.loads(again.outputs["published"])
    assert release_again["changed"] is False
    assert api.model_info("me/New").sha == release["commit"]


@pytest.mark.slow
def test_one_recipe_that_fails_does_not_keep_the_others_from_the_hub(recipes: Recipes, hub: Server) -> None:
    missing = hub_recipe("nobody/nothing", "nobody/nothing")
    files = {"recipes/a-broken.yaml": "base_model: a/b\n", "recipes/b-missing.yaml": missing,
             "recipes/c-good.yaml": tiny("me/Good"), "recipes/d-nowhere.yaml": tiny(None)}  # fmt: skip
    head = recipes.commit(**files)
    step = run_step(
        recipes.folder, "push", push(ZEROS, head), head, command="build", token=hub.token(), hub_endpoint=hub.endpoint
    )
    assert step.code != 0
    assert [release["repo"] for release in json.loads(step.outputs["published"])] == ["me/Good"]
    for line in ("::error file=recipes/a-broken.yaml,line=1,", "::error file=recipes/b-missing.yaml,line=1,"):
        assert any(annotation.startswith(line) for annotation in step.annotations), line
    # Without release.repo a recipe is built and not published, and that is said.
    assert any(annotation.startswith("::notice file=recipes/d-nowhere.yaml") for annotation in step.annotations)
    assert (recipes.folder / "moerge-out/recipes/d-nowhere/model/config.json").is_file()
    assert step.summary.count("**failed**") == 2


def test_neither_a_pull_request_nor_publish_false_writes_to_the_hub(recipes: Recipes, hub: Server) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": tiny("me/A")})
    given = {"command": "build", "token": hub.token(), "hub_endpoint": hub.endpoint}
    step = run_step(recipes.folder, "pull_request", pull_request(base, head), head, **given)
    assert step.outputs["published"] == "[]"
    step = run_step(recipes.folder, "push", push(base, head), head, publish="false", **given)
    assert step.code == 0 and step.outputs["published"] == "[]" and "not published" in step.summary
    assert (recipes.folder / "moerge-out/recipes/a/report.json").is_file()
    assert [each.path for each in hub.log.all() if each.method not in ("GET", "HEAD")] == []


@pytest.mark.slow
def test_what_the_hub_refuses_fails_the_job_with_the_reason(recipes: Recipes, hub: Server) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": tiny("stranger/A")})
    step = run_step(
        recipes.folder, "push", push(base, head), head, command="build", hub_endpoint=hub.endpoint,
        token=hub.token("me", "write"),
    )  # fmt: skip
    assert step.code == 4
    assert any(line.startswith("::error file=recipes/a.yaml") and "stranger/A" in line for line in step.annotations)


def test_without_torch_it_is_said_which_image_builds(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": tiny("me/A")})
    hidden = recipes.folder.parent / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'torch' else find(name, package)\n"
    )
    path = f"{hidden}:{Path(__file__).parents[2]}"
    step = run_step(recipes.folder, "push", push(ZEROS, head), head, command="build", environment={"PYTHONPATH": path})
    assert step.code == 2 and any("the build image" in line for line in step.annotations)
