"""`moerge watch`: the bot without Actions, against a GitHub and a Hub on this machine."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from github import Auth, Github
from huggingface_hub import HfApi

from bot.hub import server as hubs
from bot.watch import Options, Watch
from demo.github import server as githubs
from demo.github.outer import Fault
from merge.errors import SourceError
from tests.bot.workflow import ROOT, Recipes, hub_recipe, tiny_models

NAME = "me/recipes"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hubs.Server]:
    folder = tmp_path_factory.mktemp("hub")
    with hubs.running(folder / "hub") as server:
        tiny_models(folder, server)
        yield server


@pytest.fixture
def github(tmp_path: Path) -> Iterator[githubs.Server]:
    with githubs.running(tmp_path / "github") as server:
        server.repository(NAME)
        yield server


@pytest.fixture
def recipes(tmp_path: Path, github: githubs.Server) -> Recipes:
    made = Recipes(tmp_path / "workspace", models=False)
    made.commit(**{"README.md": "recipes"})
    push(made, github)
    return made


def tiny(repo: str, **keys: Any) -> str:
    release = {"repo": repo, "license": "apache-2.0", "quants": ["Q8_0"]}
    return hub_recipe("lab/m0", "lab/m1", experts_per_token=1, release=release, **keys)


def push(recipes: Recipes, github: githubs.Server, branch: str = "main") -> None:
    recipes.git("push", "--quiet", "--force", str(github.repository(NAME).git.path), f"HEAD:refs/heads/{branch}")


def environment(github: githubs.Server, hub: hubs.Server) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SSL_CERT_FILE") if name in os.environ}
    return kept | {
        "GITHUB_TOKEN": github.token("me"), "GITHUB_API_URL": github.url, "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token(), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


class Watcher:
    """A watcher that runs as a process, its lines kept in a file."""

    def __init__(self, folder: Path, github: githubs.Server, hub: hubs.Server, *arguments: str) -> None:
        self.log = folder.parent / "watch.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bot", "watch", NAME, "--dir", str(folder), "--interval", "0.3", *arguments],
                env=environment(github, hub), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self, happened: Callable[[], Any], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def client(github: githubs.Server) -> Any:
    return Github(auth=Auth.Token(github.token("me")), base_url=github.url, retry=0, lazy=True).get_repo(NAME)


def states(github: githubs.Server, commit: str) -> dict[str, str]:
    return {status.context: status.state for status in client(github).get_commit(commit).get_combined_status().statuses}


def state(folder: Path) -> dict[str, Any]:
    path = folder / "watch.json"
    value: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return value


def test_a_pull_request_is_previewed_once_looking_again_is_free_and_a_signal_ends_it(
    recipes: Recipes, github: githubs.Server, hub: hubs.Server, tmp_path: Path
) -> None:
    recipes.git("checkout", "--quiet", "-b", "feature")
    recipes.commit(**{"recipes/new.yaml": tiny("admin/New"), "recipes/bad.yaml": "base_model: a/b\nexperts: 3\n"})
    push(recipes, github, "feature")
    pull = client(github).create_pull(base="main", head="feature", title="Two recipes", body="")
    watcher = Watcher(tmp_path / "watch", github, hub)
    watcher.wait(lambda: state(tmp_path / "watch").get("previewed"))
    [comment] = github.repository(NAME).issues[pull.number].comments
    assert "new.yaml" in comment.body and "bad.yaml" in comment.body
    # Once it has seen its own comment, each look asks the same and is told that nothing changed, which costs nothing.
    count = len(github.log.all())
    watcher.wait(
        lambda: (
            len(looked := github.log.all()[count:]) > 9
            and all(each.status == 304 and not each.counted for each in looked[-9:])  # type: ignore[attr-defined]
        )
    )
    assert watcher.end(signal.SIGTERM) == 0
    # A new start previews nothing twice.
    again = Watcher(tmp_path / "watch", github, hub, "--once")
    assert again.process.wait(60) == 0
    assert len(github.repository(NAME).issues[pull.number].comments) == 1
    assert watcher.log.read_text().count("preview of #") == 2  # began, ended


@pytest.mark.slow
def test_a_watcher_killed_while_it_builds_goes_on_and_publishes_once(
    recipes: Recipes, github: githubs.Server, hub: hubs.Server, tmp_path: Path
) -> None:
    folder = tmp_path / "watch"
    first = Watcher(folder, github, hub, "--jobs", "2")
    first.wait(lambda: state(folder).get("built"))
    before = state(folder)["built"]
    files = {"recipes/one.yaml": tiny("admin/One"),
             "recipes/two.yaml": tiny("admin/Two", build={"seed": 2}), "recipes/none.yaml": "base_model: a/b\nexperts: 3\n"}  # fmt: skip
    head = recipes.commit(**files)
    push(recipes, github)
    first.wait(
        lambda: (folder / "runs").exists() and any("build_of" in path.name for path in (folder / "runs").iterdir())
    )
    time.sleep(1.0)
    first.end(signal.SIGKILL)
    assert state(folder)["built"] == before
    assert states(github, head) == {"moerge/One": "pending", "moerge/Two": "pending"}
    second = Watcher(folder, github, hub, "--jobs", "2")
    second.wait(lambda: state(folder)["built"] == head, 240)
    assert second.end(signal.SIGINT) == 0
    assert states(github, head) == {"moerge/One": "success", "moerge/Two": "success"}
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    for name in ("One", "Two"):
        assert len([each for each in api.list_repo_commits(f"admin/{name}") if each.title.startswith("Release")]) == 1


def test_a_rate_limit_is_waited_out_and_a_wrong_token_ends_it(
    github: githubs.Server, recipes: Recipes, hub: hubs.Server, tmp_path: Path
) -> None:
    faults = [Fault(limit="secondary", retry_after=1), Fault(limit="primary", reset=1.0), Fault(status=502)]
    github.faults = lambda number, request: faults.pop(0) if faults else None
    watcher = Watcher(tmp_path / "watch", github, hub)
    watcher.wait(lambda: state(tmp_path / "watch").get("built"), 60)
    assert watcher.end() == 0
    said = watcher.log.read_text()
    assert "asks for a pause" in said and "rate limit is used up" in said and "answered with 502" in said
    github.state.tokens.clear()
    other = Watcher(tmp_path / "other", github, hub)
    github.state.tokens.clear()
    assert other.process.wait(60) == 4
    assert "check GITHUB_TOKEN" in other.log.read_text()


def test_a_push_that_could_not_be_fetched_or_planned_is_looked_at_again(
    recipes: Recipes, github: githubs.Server, hub: hubs.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A git that fails at one of its commands.
    failing, real = tmp_path / "failing", shutil.which("git")
    failing.write_text("nothing")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/git"
    program.write_text(f'#!/bin/sh\ncase " $* " in *" $(cat {failing}) "*) exit 128;; esac\nexec {real} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    watcher = Watcher(tmp_path / "watch", github, hub)
    watcher.wait(lambda: state(tmp_path / "watch").get("built"))
    failing.write_text("fetch")
    before = state(tmp_path / "watch")["built"]
    head = recipes.commit(**{"recipes/bad.yaml": "base_model: a/b\nexperts: 3\n"})
    push(recipes, github)
    watcher.wait(lambda: "git fetch: ; tried again" in watcher.log.read_text())
    failing.write_text("ls-tree")
    watcher.wait(lambda: watcher.log.read_text().count(f"plan of {head[:9]}: begins") > 1)
    assert state(tmp_path / "watch")["built"] == before
    failing.write_text("nothing")
    watcher.wait(lambda: state(tmp_path / "watch")["built"] == head)
    assert "a recipe has an error" in watcher.log.read_text() and watcher.end() == 0


def test_git_tells_the_token_to_the_server_that_the_repository_is_on(tmp_path: Path) -> None:
    told: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers["Authorization"])
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = Options(NAME, tmp_path, "secret", url, 1.0, 1, True, None, None, False, None)
        with pytest.raises(SourceError, match="git clone"):
            Watch(options)._check_out(f"{url}/{NAME}.git", "main", "0" * 40)
        server.shutdown()
    assert told == [f"basic {base64.b64encode(b'x-access-token:secret').decode()}"]


def test_two_watchers_do_not_share_a_folder_nor_a_folder_two_repositories(
    github: githubs.Server, recipes: Recipes, hub: hubs.Server, tmp_path: Path
) -> None:
    first = Watcher(tmp_path / "watch", github, hub)
    first.wait(lambda: state(tmp_path / "watch").get("built"))
    assert Watcher(tmp_path / "watch", github, hub, "--once").process.wait(60) == 2
    assert first.end() == 0
    command = [sys.executable, "-m", "bot", "watch", "me/other", "--dir", str(tmp_path / "watch"), "--once"]
    done = subprocess.run(command, env=environment(github, hub), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "watches me/recipes" in done.stderr
