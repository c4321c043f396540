"""Commands in comments: obeyed word for word, for those who may write, and for nobody else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.comments import Command, parse_command
from demo.github.server import Server, running
from tests.bot.workflow import Recipes, Step, recipe, run_step

NAME = "me/recipes"


@pytest.fixture
def github(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "github") as server:
        server.repository(NAME)
        yield server


@pytest.fixture
def recipes(tmp_path: Path, github: Server) -> Recipes:
    made = Recipes(tmp_path / "workspace")
    made.commit(**{"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3), "recipes/broken.yaml": "experts: 3\n"})
    made.git("push", "--quiet", str(github.repository(NAME).git.path), "HEAD:refs/heads/main")
    return made


def comment(github: Server, login: str, body: str) -> dict[str, Any]:
    """The event of a new comment under a new issue."""
    from github import Auth, Github

    client = Github(auth=Auth.Token(github.token(login)), base_url=github.url, retry=0, lazy=True)
    issue = client.get_repo(NAME).create_issue("a title")
    return github.comment_event(NAME, issue.create_comment(body).id)


def run(recipes: Recipes, github: Server, payload: dict[str, Any], command: str = "comment", **inputs: str) -> Step:
    token = github.workflow_token(NAME, {"contents": "read", "issues": "write", "pull_requests": "write"})
    environment = {"GITHUB_API_URL": github.url}
    head = recipes.git("rev-parse", "HEAD")
    return run_step(
        recipes.folder,
        "issue_comment",
        payload,
        head,
        environment=environment,
        command=command,
        github_token=token,
        **inputs,
    )


def said(github: Server, payload: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Our reactions to a comment, and the comments after it."""
    issue = github.repository(NAME).issues[payload["issue"]["number"]]
    return [each for each, _ in issue.comments[0].reactions], [each.body for each in issue.comments[1:]]


def test_the_grammar_is_exact() -> None:
    assert parse_command("/moerge preview") == Command("preview")
    assert parse_command(" /moerge preview\r\n") == Command("preview")
    assert parse_command("/moerge build recipes/x.yaml") == Command("build", ("recipes/x.yaml",))
    assert parse_command("/moerge build a.yml b/c-1.0+x@2.yaml a.yml") == Command(
        "build", ("a.yml", "b/c-1.0+x@2.yaml")
    )


@pytest.mark.parametrize(
    "body",
    [
        "", "moerge preview", "/moerge", "/moerge build", "/moerge  preview", "/moerge preview recipes/x.yaml", "/Moerge preview",
        "/moerge preview\n/moerge build recipes/x.yaml", "please /moerge preview", "> /moerge preview", "/moerge build *.yaml",
        "/moerge build recipes/x.yaml,recipes/y.yaml", "/moerge build ../x.yaml", "/moerge build a/../x.yaml",
        "/moerge build /etc/x.yaml", "/moerge build --help.yaml", "/moerge build x.yaml; rm -rf /", "/moerge build $(id).yaml",
        "/moerge build `id`.yaml", "/moerge build x.yaml\n", "/moerge build !x.yaml", "/moerge build recipes/x.yaml @someone",
        "/moerge build " + " ".join(f"{n}.yaml" for n in range(21)), "/moerge build x\u202e.yaml", "/moerge build a//b.yaml",
    ],
)  # fmt: skip
def test_what_is_not_a_command_word_for_word_is_none(body: str) -> None:
    assert parse_command(body) is None or body == "/moerge build x.yaml\n"


@given(st.text())
def test_no_text_makes_a_path_that_leaves_the_repository_or_means_several_files(text: str) -> None:
    command = parse_command(f"/moerge build {text}")
    for path in command.paths if command else ():
        assert not set(path) & set("*?[]!,;$`\\'\" \n|&<>(){}") and ".." not in path.split("/") and path[0] not in "/-"


def test_a_build_that_a_writer_asks_for_is_planned_from_the_default_branch(recipes: Recipes, github: Server) -> None:
    payload = comment(github, "me", "/moerge build recipes/b.yaml")
    step = run(recipes, github, payload)
    assert step.code == 0, step.log
    assert json.loads(step.outputs["changed"]) == ["recipes/b.yaml"]
    assert [entry["recipe"] for entry in json.loads(step.outputs["matrix"])["include"]] == ["recipes/b.yaml"]
    assert "asked for by me" in step.summary
    assert said(github, payload) == (["eyes"], [])


def test_a_writer_may_have_a_fork_s_pull_request_previewed_again(recipes: Recipes, github: Server) -> None:
    from github import Auth, Github

    def client(login: str) -> Any:
        return Github(auth=Auth.Token(github.token(login)), base_url=github.url, retry=0, lazy=True).get_repo(NAME)

    client("stranger").create_fork()
    recipes.git("checkout", "--quiet", "-b", "feature")
    recipes.commit(**{"recipes/new.yaml": "base_model: a/b\nexperts: 3\n"})
    recipes.git("push", "--quiet", str(github.repository("stranger/recipes").git.path), "HEAD:refs/heads/feature")
    recipes.git("checkout", "--quiet", "main")
    pull = client("stranger").create_pull(base="main", head="stranger:feature", title="New", body="")
    asked = client("me").get_issue(pull.number).create_comment("/moerge preview")
    step = run(recipes, github, github.comment_event(NAME, asked.id), token="hf_" + "NotForAFork")
    assert step.code == 1, step.log  # the recipe has an error
    comments = github.repository(NAME).issues[pull.number].comments
    assert [each for each, _ in comments[0].reactions] == ["eyes"]
    assert len(comments) == 2 and "preview of 1 recipe, which has errors" in comments[1].body


@pytest.mark.parametrize("body", ["/moerge build recipes/b.yaml", "/moerge preview"])
def test_a_stranger_s_command_is_ignored_without_a_word(body: str, recipes: Recipes, github: Server) -> None:
    payload = comment(github, "stranger", body)
    step = run(recipes, github, payload)
    assert step.code == 0 and step.outputs["changed"] == "[]" and json.loads(step.outputs["matrix"]) == {"include": []}
    assert said(github, payload) == ([], [])


def test_other_comments_cost_no_request(recipes: Recipes, github: Server) -> None:
    count = 0
    for body in ("nice model!", "/moerge build ../../x.yaml", "::set-output name=changed::[1]\n/moerge preview"):
        payload = comment(github, "me", body)
        count = len(github.log.all())
        assert run(recipes, github, payload).outputs["changed"] == "[]"
        assert len(github.log.all()) == count
    edited = comment(github, "me", "/moerge build recipes/b.yaml") | {"action": "edited"}
    assert run(recipes, github, edited).outputs["changed"] == "[]"


def test_a_bot_s_comment_is_no_command(recipes: Recipes, github: Server) -> None:
    payload = comment(github, "me", "/moerge build recipes/b.yaml")
    payload["comment"]["user"]["type"] = "Bot"
    assert run(recipes, github, payload).outputs["changed"] == "[]"


def test_what_cannot_be_built_is_answered(recipes: Recipes, github: Server) -> None:
    payload = comment(github, "me", "/moerge build recipes/zzz.yaml")
    step = run(recipes, github, payload)
    reactions, [answer] = said(github, payload)
    assert step.code == 1 and reactions == ["eyes", "confused"]
    assert "`recipes/zzz.yaml`" in answer and "`recipes/a.yaml`" in answer
    payload = comment(github, "me", "/moerge build recipes/broken.yaml recipes/a.yaml")
    step = run(recipes, github, payload)
    reactions, [answer] = said(github, payload)
    assert step.code == 1 and "`recipes/broken.yaml`" in answer and "**error**" in answer
    assert [entry["name"] for entry in json.loads(step.outputs["matrix"])["include"]] == ["a"]
    payload = comment(github, "me", "/moerge preview")
    assert run(recipes, github, payload).code == 0
    assert "is for a pull request" in said(github, payload)[1][0]


def test_the_answer_has_what_became_of_every_recipe(recipes: Recipes, github: Server) -> None:
    payload = comment(github, "me", "/moerge build recipes/b.yaml recipes/a.yaml")
    matrix = run(recipes, github, payload).outputs["matrix"]
    step = run(recipes, github, payload, "reply", expected=matrix)
    assert step.code == 0, step.log
    _, [answer] = said(github, payload)
    assert "2 recipes, 0 published, 2 failed" in answer and "no result" in answer
