"""The end of a run: releases, statuses and summary on GitHub, from what build jobs left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from markdown_it import MarkdownIt

from bot.hub import server as hubs
from bot.releases import About, Release, ReleasedFile, release_text, tag_of, tagged_recipe
from demo.github import server as githubs
from tests.bot.workflow import ZEROS, Recipes, Step, push, recipe, run_step, tiny_models

NAME = "me/recipes"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipes(tmp_path: Path, models: Path, github: githubs.Server) -> Recipes:
    made = Recipes(tmp_path / "workspace", models=False)
    shutil.copytree(models, made.folder / "models")
    return made


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[hubs.Server]:
    with hubs.running(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def github(tmp_path: Path) -> Iterator[githubs.Server]:
    with githubs.running(tmp_path / "github") as server:
        server.repository(NAME)
        yield server


def tiny(**release: str) -> str:
    value = {
        "base_model": "../models/m0",
        "gate_mode": "random",
        "experts_per_token": 1,
        "experts": [{"source_model": "../models/m0"}, {"source_model": "../models/m1"}],
        "release": {"repo": "me/Tiny", "license": "apache-2.0", "quants": ["Q8_0"], **release},
        "card": {"description": "A very small model of two. | <img src=x> @everyone"},
    }
    return yaml.safe_dump(value)


def pushed(recipes: Recipes, github: githubs.Server) -> None:
    recipes.git("push", "--quiet", "--tags", str(github.repository(NAME).git.path), "+HEAD:refs/heads/main")


def collect(
    recipes: Recipes, github: githubs.Server, payload: dict[str, object], sha: str, expected: str, **given: str
) -> Step:
    token = github.workflow_token(NAME, {"contents": "write", "statuses": "write"})
    return run_step(
        recipes.folder, "push", payload, sha, environment={"GITHUB_API_URL": github.url},
        command="collect", github_token=token, expected=expected, **given,
    )  # fmt: skip


def statuses(github: githubs.Server, commit: str) -> set[tuple[str, str]]:
    from github import Auth, Github

    client = Github(auth=Auth.Token(github.token("me")), base_url=github.url, retry=0, lazy=True)
    return {
        (each.state, each.context) for each in client.get_repo(NAME).get_commit(commit).get_combined_status().statuses
    }


def test_a_version_becomes_a_release_on_github_and_a_second_run_changes_nothing(
    recipes: Recipes, hub: hubs.Server, github: githubs.Server
) -> None:
    before = recipes.commit()
    after = recipes.commit(**{"recipes/tiny.yaml": tiny(version="1.0")})
    pushed(recipes, github)
    event = push(before, after)
    plan = run_step(recipes.folder, "push", event, after, command="plan")
    built = run_step(
        recipes.folder, "push", event, after, command="build", token=hub.token(), hub_endpoint=hub.endpoint
    )
    assert built.code == 0, built.log
    for _ in range(2):
        step = collect(recipes, github, event, after, plan.outputs["matrix"])
        assert step.code == 0, step.log
        assert "1 recipe, 1 published" in step.summary and "on GitHub" in step.summary
        [release] = github.repository(NAME).releases.values()
    assert release.fields["tag_name"] == "Tiny-v1.0"
    assert recipes.git("ls-remote", str(github.repository(NAME).git.path), "refs/tags/Tiny-v1.0").startswith(after)
    [file] = [each for each in json.loads((recipes.folder / "moerge-out/outcomes.json").read_text())[0]["release"]["files"]
              if each["name"] == "Tiny-Q8_0.gguf"]  # fmt: skip
    assert file["sha256"] in release.fields["body"] and "me/Tiny-GGUF/Tiny-Q8_0.gguf" in release.fields["body"]
    sums = (recipes.folder / "moerge-out/checksums.txt").read_text()
    assert f"{file['sha256']}  me/Tiny-GGUF/Tiny-Q8_0.gguf\n" in sums
    api = HfApi(endpoint=hub.endpoint)
    [info] = api.get_paths_info("me/Tiny-GGUF", ["Tiny-Q8_0.gguf"])
    assert info.lfs is not None and info.lfs.sha256 == file["sha256"] and info.size == file["bytes"]  # type: ignore[union-attr]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(release.fields["body"])
    assert "A very small model of two" in html and "<img" not in html
    assert statuses(github, after) == {("success", "moerge/Tiny")}


@pytest.mark.slow
def test_a_pushed_tag_builds_its_recipe_alone_and_tags_the_hub(
    recipes: Recipes, hub: hubs.Server, github: githubs.Server
) -> None:
    files = {"recipes/tiny.yaml": tiny(), "recipes/other.yaml": recipe(2)}
    head = recipes.commit(**files)
    recipes.git("tag", "Tiny-v2.1")
    pushed(recipes, github)
    event = push(ZEROS, head, "refs/tags/Tiny-v2.1")
    plan = run_step(recipes.folder, "push", event, head, command="plan")
    assert json.loads(plan.outputs["changed"]) == ["recipes/tiny.yaml"] and "tag Tiny-v2.1" in plan.summary
    built = run_step(recipes.folder, "push", event, head, command="build", token=hub.token(), hub_endpoint=hub.endpoint)
    assert built.code == 0, built.log
    api = HfApi(endpoint=hub.endpoint)
    for repo in ("me/Tiny", "me/Tiny-GGUF"):
        assert "2.1" in {ref.name for ref in api.list_repo_refs(repo).tags}
    assert collect(recipes, github, event, head, plan.outputs["matrix"]).code == 0
    assert [release.fields["tag_name"] for release in github.repository(NAME).releases.values()] == ["Tiny-v2.1"]


def test_a_tag_that_means_no_recipe_builds_nothing_and_one_that_contradicts_is_an_error(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/tiny.yaml": tiny(version="1.0")})
    for tag in ("v1.0", "Other-v1.0", "Tiny-v", "Tiny-v1/2"):
        step = run_step(recipes.folder, "push", push(ZEROS, head, f"refs/tags/{tag}"), head, command="plan")
        assert step.code == 0 and step.outputs["changed"] == "[]", tag
    step = run_step(recipes.folder, "push", push(ZEROS, head, "refs/tags/Tiny-v1.1"), head, command="plan")
    assert step.code == 1 and step.outputs["changed"] == "[]"
    assert any("title=tag-version" in line for line in step.annotations)


def test_a_recipe_without_a_result_fails_the_run_and_gets_a_status(recipes: Recipes, github: githubs.Server) -> None:
    head = recipes.commit(**{"recipes/tiny.yaml": tiny(version="1.0")})
    pushed(recipes, github)
    event = push(ZEROS, head)
    plan = run_step(recipes.folder, "push", event, head, command="plan")
    step = collect(recipes, github, event, head, plan.outputs["matrix"])
    assert step.code == 4 and any("file=recipes/tiny.yaml" in line and "no result" in line for line in step.annotations)
    assert statuses(github, head) == {("error", "moerge/Tiny")}
    assert not github.repository(NAME).releases


def test_what_another_job_left_is_checked_and_never_executed(recipes: Recipes, github: githubs.Server) -> None:
    head = recipes.commit(**{"recipes/tiny.yaml": tiny()})
    pushed(recipes, github)
    out = recipes.folder / "moerge-out/moerge-0"
    out.mkdir(parents=True)
    for text in ("[", "[1]", '[{"recipe": 1}]', "{}x", "[" * 100_000):
        (out / "outcomes.json").write_text(text)
        step = collect(recipes, github, push(ZEROS, head), head, "")
        assert step.code == 2 and "not what a build left" in step.annotations[0], text[:20]


FACTS = About("Tiny", None, "First | paragraph\n\n# Second", "Mixtral", 10**9, 10**8, ("a/b", "./c"), 2, "mit", "1")
RELEASE = Release(FACTS, "me/Tiny", "https://hf.co/me/Tiny", "a" * 40, None, True, ())


def test_a_release_of_thousands_of_files_fits() -> None:
    files = tuple(ReleasedFile("me/Tiny", f"model-{n:05}.safetensors", 10**9, "ab" * 32) for n in range(5000))
    text = release_text(replace(RELEASE, files=files))
    assert len(text) < 125_000 and "more, in the repository" in text
    assert "Second" not in text and "Licence | mit" in text and "huggingface.co/a/b" in text


def test_tags_name_a_recipe_and_a_version() -> None:
    names = ["A", "A-v2", "B-v1-v"]
    assert tagged_recipe("A-v1.0", names) == ("A", "1.0")
    assert tagged_recipe("A-v2-v3", names) == ("A-v2", "3")
    assert tagged_recipe("A-v2", names) == ("A", "2")
    assert tagged_recipe("v1", names) is None
    assert tag_of("A", "v1.0") == tag_of("A", "1.0") == "A-v1.0"
