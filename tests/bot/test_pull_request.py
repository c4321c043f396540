"""A pull request on GitHub: read without a checkout, previewed in one comment and one check run, by the container's entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from github import Auth, Github
from markdown_it import MarkdownIt

from bot.hub.server import Server as Hub
from bot.hub.server import running as hub_running
from demo.github.outer import Fault, Said
from demo.github.server import Server, running
from demo.github.state import Check, Limits
from tests.bot.workflow import MODELS, ZEROS, Recipes, Step, git, hub_recipe, run_step

NAME, FORK = "me/recipes", "stranger/recipes"
MODEL, OTHER = "mlabonne/AlphaMonarch-7B", "mlabonne/NeuralDaredevil-7B"
# What docs/security.md asks for, and nothing else.
FORK_RIGHTS = {"contents": "read", "pull_requests": "write", "checks": "write"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with two models of one shape, as configs with their licences."""
    from huggingface_hub import HfApi

    with hub_running(tmp_path_factory.mktemp("hub")) as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        for name, license in ((MODEL, "cc-by-nc-4.0"), (OTHER, "apache-2.0")):
            api.create_repo(name)
            card = f"---\nlicense: {license}\n---\n".encode()
            config = (MODELS / name / "config.json").read_bytes()
            for path, data in (("config.json", config), ("README.md", card)):
                api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=name)
        yield server


class World:
    """A recipe repository on GitHub, a stranger's fork of it with a pull request, and jobs that run on both."""

    def __init__(self, folder: Path, server: Server, hub: Hub) -> None:
        self.folder, self.server, self.hub = folder, server, hub
        self.main = Recipes(folder / "main", models=False)
        self.main.git("remote", "add", "origin", str(server.repository(NAME).git.path))
        self.push(**{"README.md": "Recipes"})
        self.fork = self.main
        self.number = 0

    def push(self, **files: str) -> str:
        """A commit on the default branch."""
        sha = self.main.commit(**files)
        self.main.git("push", "--quiet", "--force", "origin", "main")
        return sha

    def open(self, **files: str) -> None:
        """A stranger forks, commits and opens a pull request."""
        person = Github(
            auth=Auth.Token(self.server.token("stranger")), base_url=self.server.url, seconds_between_writes=0
        )
        repository = person.get_repo(NAME)
        clone = repository.create_fork().clone_url
        git(self.folder, "clone", "--quiet", clone, "fork")
        self.fork = Recipes(self.folder / "fork", models=False)
        self.fork.git("switch", "--quiet", "-c", "feature")
        self.change(**files)
        self.number = repository.create_pull(base="main", head="stranger:feature", title="Mine", body="").number

    def change(self, **files: str | None) -> str:
        """A commit in the pull request; None deletes a file."""
        for path in [path for path, text in files.items() if text is None]:
            (self.fork.folder / path).unlink()
        sha = self.fork.commit(**{path: text for path, text in files.items() if text is not None})
        self.fork.git("push", "--quiet", "--force", "origin", "feature")
        return sha

    def job(
        self,
        event: str = "pull_request_target",
        rights: dict[str, str] | None = None,
        workspace: Path | None = None,
        **inputs: str,
    ) -> Step:
        """A job of this event, in an empty workspace: there is no checkout."""
        payload = self.server.pull_request_event(NAME, self.number)
        return self.run(event, payload, payload["pull_request"]["base"]["sha"], rights, workspace, **inputs)

    def run(
        self, event: str, payload: dict[str, Any], sha: str, rights: dict[str, str] | None = None, workspace: Path | None = None,
        **inputs: str,
    ) -> Step:  # fmt: skip
        empty = self.folder / "runs/workspace"
        empty.mkdir(parents=True, exist_ok=True)
        self.server.log.clear()
        given = {
            "github_token": self.server.workflow_token(NAME, FORK_RIGHTS if rights is None else rights),
            "hub_endpoint": self.hub.endpoint,
        }
        environment = {
            "GITHUB_API_URL": self.server.url, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_RUN_ID": "42",
            "GIT_CEILING_DIRECTORIES": str(self.folder),
        }  # fmt: skip
        return run_step(workspace or empty, event, payload, sha, environment=environment, **given | inputs)

    @property
    def comments(self) -> list[str]:
        return [comment.body for comment in self.server.repository(NAME).issues[self.number].comments]

    @property
    def checks(self) -> list[Check]:
        return list(self.server.repository(NAME).checks.values())

    @property
    def requests(self) -> list[Said]:
        return [said for said in self.server.log.all() if isinstance(said, Said)]


@pytest.fixture
def world(tmp_path: Path, hub: Hub) -> Iterator[World]:
    with running(tmp_path / "github") as server:
        yield World(tmp_path, server, hub)


def good(*names: str, **keys: Any) -> str:
    return hub_recipe(*(names or (OTHER, OTHER)), **{"release": {"quants": ["Q8_0"]}} | keys)


def html(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_a_fork_s_pull_request_is_previewed_without_a_checkout_in_one_comment_and_a_check_run(world: World) -> None:
    world.push(**{"recipes/old.yaml": good()})
    broken = "base_model: a/b\nexperts:\n- source_modle: a/b\n"
    world.open(
        **{"recipes/new.yaml": good(OTHER, MODEL, OTHER), "recipes/broken.yaml": broken, "recipes/notes.yaml": "a: 1\n"}
    )
    step = world.job()
    assert step.code == 1, step.log  # one recipe is broken
    assert json.loads(step.outputs["changed"]) == ["recipes/broken.yaml", "recipes/new.yaml"]
    [comment] = world.comments
    assert comment.startswith("<!-- moerge preview -->")
    for text in (
        "preview of 2 recipes, 1 with errors",
        "19.",
        "cc-by-nc-4.0",
        "unknown-key",
        "Q8_0",
        "actions/runs/42",
    ):
        assert text in comment, text
    [check] = world.checks
    assert check.head_sha == world.fork.git("rev-parse", "HEAD") and check.fields["conclusion"] == "failure"
    places = {(one["path"], one["start_line"], one["title"]) for one in check.annotations}
    assert ("recipes/broken.yaml", 3, "unknown-key") in places
    # What stands in the check run is not said again on the base branch's commit.
    assert not [line for line in step.annotations if "recipes/" in line]
    assert not list((world.folder / "runs/workspace").glob("recipes*")), "something of the pull request was written"
    assert {said.method for said in world.requests} <= {"GET", "POST"} and len(world.requests) <= 8


def test_the_comment_is_edited_in_place_and_says_when_nothing_is_left(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    assert world.job().code == 0
    person = Github(auth=Auth.Token(world.server.token("stranger")), base_url=world.server.url)
    forged = person.get_repo(NAME).get_issue(world.number).create_comment("<!-- moerge preview -->\nnot ours").id
    first = world.comments[0]
    world.change(**{"recipes/a.yaml": good(OTHER, OTHER, OTHER)})
    assert world.job().code == 0
    edited, other = world.comments
    assert edited != first and other.endswith("not ours") and forged
    again = world.job()
    assert again.code == 0 and not [said for said in world.requests if said.method == "PATCH"], (
        "nothing new, yet edited"
    )
    world.change(**{"recipes/a.yaml": None})
    assert world.job().code == 0
    assert "changes no recipe any more" in world.comments[0] and len(world.comments) == 2


def test_where_no_recipe_changed_nothing_is_said(world: World) -> None:
    world.push(**{"recipes/a.yaml": good()})
    world.open(**{"recipes/a.yaml": "# only a comment\n" + good(), "docs.md": "x", "recipes/other.yaml": "list: [1]\n"})
    step = world.job()
    assert step.code == 0 and "Nothing to do" in step.summary
    assert world.comments == [] and world.checks == []


def test_the_comment_says_what_differs_from_the_base_branch(world: World) -> None:
    world.push(**{"recipes/a.yaml": good(OTHER, OTHER)})
    world.open(**{"recipes/a.yaml": good(OTHER, OTHER, OTHER, MODEL, dtype="float16", release={"quants": ["Q4_K_M"]})})
    # The base branch goes on meanwhile: what counts is where the pull request left it.
    world.push(**{"recipes/b.yaml": good(), "recipes/a.yaml": good(OTHER, OTHER, OTHER)})
    step = world.job()
    assert step.code == 0 and json.loads(step.outputs["changed"]) == ["recipes/a.yaml"]
    [comment] = world.comments
    rows = {
        cells[0]: cells[1:] for line in comment.splitlines() if len(cells := re.split(r" ?\| ?", line.strip("| "))) == 3
    }
    assert rows["number of experts"] == ["2", "4"] and rows["quants"] == ["Q8_0", "Q4_K_M"]
    assert rows["parameters"] == ["12.88 B", "24.15 B"] and rows["licence"] == ["apache-2.0", "cc-by-nc-4.0"]
    [preview] = json.loads((world.folder / "runs/workspace" / step.outputs["previews"]).read_text())
    assert {"what": "dtype", "before": "-", "after": "float16"} in preview["against_base"]


def test_mistakes_of_the_recipe_of_a_source_and_of_ours_are_told_apart(world: World, tmp_path: Path) -> None:
    world.open(**{"recipes/wrong.yaml": "base_model: a/b\nexperts: []\n", "recipes/gone.yaml": good("no/where", OTHER)})
    step = world.job()
    assert step.code == 4
    comment = world.comments[0]
    assert "**In the recipe**" in comment and "**In a source model (the recipe may be right)**" in comment
    assert "1 with errors" in world.checks[0].fields["output"]["title"]
    assert "1 whose sources cannot be read" in world.checks[0].fields["output"]["title"]


@pytest.mark.parametrize("limits", [Limits(compared_files=3, pull_files=5), Limits(tree_entries=30)])
def test_a_pull_request_of_more_files_than_github_lists_misses_no_recipe(
    tmp_path: Path, hub: Hub, limits: Limits
) -> None:
    with running(tmp_path / "github", limits=limits) as server:
        world = World(tmp_path, server, hub)
        world.push(**{f"data/{n}/x.txt": str(n) for n in range(12)} | {"recipes/z/old.yaml": good()})
        many = {f"aaa/{n}.txt": str(n) for n in range(20)}
        world.open(**many | {"recipes/z/new.yaml": good(OTHER, OTHER, OTHER), "recipes/z/old.yaml": good(OTHER, MODEL)})
        step = world.job(command="plan")
        assert step.code == 0, step.log
        assert json.loads(step.outputs["changed"]) == ["recipes/z/new.yaml", "recipes/z/old.yaml"]


def test_renamed_and_deleted_recipes_are_named_and_not_built(world: World) -> None:
    world.push(**{"recipes/a.yaml": good(), "recipes/b.yaml": good(OTHER, OTHER, OTHER)})
    world.open()
    world.fork.git("mv", "recipes/a.yaml", "recipes/moved.yaml")
    world.change(**{"recipes/b.yaml": None})
    step = world.job()
    assert step.code == 0 and json.loads(step.outputs["changed"]) == []
    [comment] = world.comments
    assert "`recipes/moved.yaml`: renamed" in comment and "`recipes/b.yaml`: deleted" in comment


def test_a_push_is_compared_through_the_api_also_after_a_force_push_and_the_first_time(world: World) -> None:
    before = world.push(**{"recipes/a.yaml": good()})
    after = world.push(**{"recipes/a.yaml": "# again\n" + good(), "recipes/b.yaml": good(OTHER, OTHER, OTHER)})
    rights = {"contents": "read"}
    plan = world.run("push", world.server.push_event(NAME, before, after), after, rights, command="plan")
    assert json.loads(plan.outputs["changed"]) == ["recipes/b.yaml"], plan.log
    first = world.run("push", world.server.push_event(NAME, ZEROS, after), after, rights, command="plan")
    assert json.loads(first.outputs["changed"]) == ["recipes/a.yaml", "recipes/b.yaml"]
    gone = world.run("push", world.server.push_event(NAME, "1" * 40, after, forced=True), after, rights, command="plan")
    assert len(json.loads(gone.outputs["changed"])) == 2 and "history was rewritten" in gone.summary
    deleted = world.run("push", world.server.push_event(NAME, after, ZEROS), after, rights, command="plan")
    assert deleted.code == 0 and json.loads(deleted.outputs["changed"]) == []


def test_the_other_events_run_without_a_checkout(world: World) -> None:
    head = world.push(**{"recipes/a.yaml": good(), "other/b.yml": good(OTHER, OTHER, OTHER)})
    rights, server = {"contents": "read"}, world.server
    scheduled = world.run("schedule", server.schedule_event(NAME), head, rights, command="plan")
    assert json.loads(scheduled.outputs["changed"]) == ["recipes/a.yaml"]
    asked = world.run(
        "workflow_dispatch", server.dispatch_event(NAME, {}), head, rights, command="plan", recipes="other/*.yml"
    )
    assert json.loads(asked.outputs["changed"]) == ["other/b.yml"]
    owner = Github(auth=Auth.Token(server.token("me")), base_url=server.url).get_repo(NAME)
    release = owner.create_git_release("v1", "One", "").id
    released = world.run("release", server.release_event(NAME, release), head, rights, command="plan")
    assert released.code == 0 and json.loads(released.outputs["changed"]) == ["recipes/a.yaml"]


def test_a_token_that_may_not_comment_leaves_the_preview_in_the_job_and_does_not_fail_it(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    step = world.job("pull_request", {"contents": "read", "pull_requests": "read"})
    assert step.code == 0 and world.comments == []
    assert any(
        line.startswith("::notice") and "could not be put on the pull request" in line for line in step.annotations
    )
    assert "12.88 B" in step.summary
    silent = world.job(comment="false")
    assert silent.code == 0 and world.comments == [] and world.checks == []


def test_a_checkout_is_used_where_there_is_one_and_its_preview_is_commented_too(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    work = world.folder / "work/checkout"
    git(world.folder, "clone", "--quiet", str(world.server.repository(NAME).git.path), str(work))
    git(work, "fetch", "--quiet", "origin", f"refs/pull/{world.number}/head")
    step = world.job("pull_request", workspace=work)
    assert step.code == 0 and len(world.comments) == 1
    assert not [said for said in world.requests if "/git/" in said.path]
    # Its place in the workspace is no part of the paths that GitHub knows; a folder of the repository is.
    world.change(**{"recipes/a.yaml": good("no/where", OTHER)})
    git(work, "fetch", "--quiet", "origin", f"refs/pull/{world.number}/head")
    git(work, "checkout", "--quiet", "FETCH_HEAD")
    for folder, globs in (("checkout", ""), ("checkout/recipes", "*.yaml")):
        step = world.job("pull_request", workspace=work.parent, working_directory=folder, recipes=globs)
        assert step.code == 4, step.log
        assert {each["path"] for each in world.checks[-1].annotations} == {"recipes/a.yaml"}, folder


def test_strict_makes_warnings_errors(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    assert world.job().code == 0
    strict = world.job(strict="true")
    assert strict.code == 1 and world.checks[-1].fields["conclusion"] == "failure"


def test_server_errors_and_limits_are_waited_out_and_what_is_not_is_one_sentence(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    planned = [Fault(status=502), Fault(limit="secondary", retry_after=1), Fault(status=503)]
    world.server.faults = lambda number, request: planned.pop(0) if planned else None
    assert world.job().code == 0 and len(world.comments) == 1
    world.server.faults = lambda number, request: Fault(limit="primary", reset=3000)
    step = world.job()
    assert step.code == 4 and len(step.annotations) == 1 and "rate limit" in step.annotations[0]
    world.server.faults = None
    wrong = world.job(github_token="ghs_wrong")
    assert wrong.code == 4 and "refused the token" in wrong.annotations[0]


def test_the_tokens_are_masked_and_nowhere_printed(world: World) -> None:
    world.open(**{"recipes/a.yaml": good("no/where", OTHER)})
    token = world.server.workflow_token(NAME, FORK_RIGHTS)
    step = world.job(github_token=token, token="hf_secret_of_the_base")
    assert f"::add-mask::{token}" in step.log and "::add-mask::hf_secret_of_the_base" in step.log
    rest = step.log.replace(f"::add-mask::{token}", "").replace("::add-mask::hf_secret_of_the_base", "")
    for secret in (token, "hf_secret_of_the_base"):
        assert secret not in rest + step.summary + json.dumps(step.outputs) + "".join(world.comments)


def test_fifty_recipes_with_hundreds_of_findings_take_at_most_twelve_requests_and_fit_a_comment(world: World) -> None:
    world.push(**{f"recipes/{number:02}.yaml": good(OTHER, OTHER) for number in range(25)})
    wrong = "".join(f"wrong_{number}: 1\n" for number in range(30))
    recipes = {f"recipes/{number:02}.yaml": good(OTHER, MODEL, OTHER, MODEL) for number in range(40)}
    recipes |= {f"recipes/{number:02}.yaml": good() + wrong for number in range(40, 50)}
    world.open(**recipes)
    step = world.job()
    assert step.code == 1 and len(json.loads(step.outputs["changed"])) == 50
    assert len(world.requests) <= 12, [said.path for said in world.requests]
    [comment] = world.comments
    assert len(comment) <= 60_000
    for number in range(50):
        assert f"`recipes/{number:02}.yaml`" in comment, "every recipe has at least its row"
    for number in range(40, 50):
        assert f"<code>recipes/{number:02}.yaml</code>" in comment.replace("\u2060", ""), (
            "a recipe with errors has its section first"
        )
    assert len(world.checks[0].annotations) == 250 and world.checks[0].fields["status"] == "completed"
    assert len(step.summary.encode()) < 1 << 20


def test_a_preview_that_a_writer_asks_for_in_a_comment_reads_a_fork_without_a_token(world: World) -> None:
    world.open(**{"recipes/a.yaml": good()})
    server = world.server
    asked = Github(auth=Auth.Token(server.token("me")), base_url=server.url).get_repo(NAME).get_issue(world.number)
    said = asked.create_comment("/moerge preview").id
    rights = FORK_RIGHTS | {"issues": "write"}
    head = world.main.git("rev-parse", "HEAD")
    step = world.run(
        "issue_comment", server.comment_event(NAME, said), head, rights, command="comment", token="hf_secret"
    )
    assert step.code == 0, step.log
    assert world.comments[0] == "/moerge preview" and world.comments[1].startswith("<!-- moerge preview -->")
    assert world.checks[0].head_sha == world.fork.git("rev-parse", "HEAD")
    assert not [one for one in world.hub.log.all() if one.status in (401, 403)]


def test_a_preview_that_a_comment_asks_for_names_nothing_to_build_also_where_it_fails(world: World) -> None:
    world.open(**{"recipes/*.yaml": good(), "recipes/gone.yaml": good("no/where", OTHER)})
    server = world.server
    asked = Github(auth=Auth.Token(server.token("me")), base_url=server.url).get_repo(NAME).get_issue(world.number)
    event = server.comment_event(NAME, asked.create_comment("/moerge preview").id)
    head, rights = world.main.git("rev-parse", "HEAD"), FORK_RIGHTS | {"issues": "write"}
    for more, code in (({}, 4), ({"out": "file/below"}, 4)):
        (world.folder / "runs/workspace").mkdir(parents=True, exist_ok=True)
        (world.folder / "runs/workspace/file").write_text("in the way")
        step = world.run("issue_comment", event, head, rights, command="comment", **more)
        assert step.code == code, step.log
        assert (step.outputs["changed"], json.loads(step.outputs["matrix"])) == ("[]", {"include": []}), more
    assert "recipes/gone.yaml" in world.comments[1]
