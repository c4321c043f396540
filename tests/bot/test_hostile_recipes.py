"""Sixty hostile recipes in a stranger's pull request: none crashes, costs much, or has an effect outside."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from bot.hub.server import Server as Hub
from bot.hub.server import running as hub_running
from demo.github.server import running
from tests.bot.hostile import HOSTILE, MODEL
from tests.bot.test_pull_request import World
from tests.bot.workflow import ROOT
from tests.dense import save_dense

SECONDS, MEGABYTES = 2.0, 300
# Each recipe in a process of its own, as `moerge preview` of a pull request reads it; it prints its time and its memory.
ONE = """
import json, resource, sys, time
from pathlib import Path
import huggingface_hub.utils._http
from bot.changes import ADDED, Change, read_if_recipe, read_recipe
from bot.github.comment import preview_comment
from bot.previews import preview_changes
from merge.hub import Hub
from merge.sources import Sources
folder, endpoint = Path(sys.argv[1]), sys.argv[2]
hub = Hub(endpoint, None)
for path in sorted(folder.iterdir()):
    pid = __import__("os").fork()
    if pid == 0:
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        raw = path.read_bytes()[:256 * 1024 + 1]
        file = read_if_recipe(raw, f"recipes/{path.name}", folder)
        said = file is not None
        if not said:  # it is not looked at any further; here it is, as if someone had named it
            started = time.process_time()
            file = read_recipe(raw, f"recipes/{path.name}", folder)
        change = Change(file.path, ADDED, "the recipe is new", file)
        sources = lambda path: Sources(folder, hub=hub, allow_local=False)
        wall = time.monotonic()
        [preview] = preview_changes([change], sources, runner="ubuntu-latest")
        comment = preview_comment([preview], [change], "x", head="a" * 40)
        wall = time.monotonic() - wall
        print(json.dumps({
            "name": path.name, "recipe": said, "cpu": time.process_time() - started, "wall": wall,
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "code": preview.code,
            "ids": [finding.id for finding in preview.findings], "bug": preview.bug, "comment": comment,
        }), flush=True)
        __import__("os")._exit(0)
    __import__("os").waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    from huggingface_hub import HfApi

    model = save_dense(tmp_path_factory.mktemp("model") / "tiny")
    with hub_running(tmp_path_factory.mktemp("hub")) as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        api.create_repo(MODEL)
        api.upload_folder(repo_id=MODEL, folder_path=model)
        yield server


def test_there_are_sixty() -> None:
    assert len(HOSTILE) >= 60


def test_each_hostile_recipe_is_told_within_two_seconds_and_300_mb(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, raw in HOSTILE.items():
        (folder / f"{name}.yaml").write_bytes(raw)
    done = subprocess.run(
        [sys.executable, "-c", ONE, str(folder), hub.endpoint], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in told} == {f"{name}.yaml" for name in HOSTILE}, done.stderr[-2000:]
    for one in told:
        print(f"{one['cpu']:6.2f} s {one['megabytes']:4.0f} MB {one['name']}: {one['code']} {sorted(set(one['ids']))}")
    for one in told:
        assert one["bug"] is None, one
        assert one["cpu"] <= SECONDS and one["megabytes"] <= MEGABYTES, {**one, "comment": ""}
        assert "Traceback" not in one["comment"] and len(one["comment"]) <= 60_000, one["name"]
        assert harmless(one["comment"]) is None, (one["name"], harmless(one["comment"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes"], "something was written"
    good = {one["name"] for one in told if one["code"] == 0}
    # These say something that can be built; all others are refused.
    assert good <= {
        "many experts.yaml", "markup in a role.yaml", "prompts file outside.yaml", "right to left.yaml", "templates.yaml"
    }, good  # fmt: skip


def test_all_of_them_in_one_pull_request_leave_a_comment_that_does_nothing(tmp_path: Path, hub: Hub) -> None:
    with running(tmp_path / "github") as server:
        world = World(tmp_path, server, hub)
        world.open()
        for number, raw in enumerate(HOSTILE.values()):
            path = world.fork.folder / f"recipes/{number:02}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
        names = (
            "x::error::owned.yaml",
            "$(touch owned).yaml",
            "<img src=x>@everyone.yaml",
            "a|b`c.yaml",
            "-rf.yaml",
            "né\u202e.yaml",
        )
        for name in names:
            (world.fork.folder / "recipes" / name).write_bytes(HOSTILE["markup"])
        world.change()
        step = world.job()
        assert step.code in (1, 4), step.log
        [comment] = world.comments
        assert len(comment) <= 60_000 and harmless(comment) is None, harmless(comment)
        assert harmless(step.summary) is None
        assert {one["path"] for one in world.checks[0].annotations} <= {
            *(f"recipes/{number:02}.yaml" for number in range(len(HOSTILE))), *(f"recipes/{name}" for name in names)
        }  # fmt: skip
        assert not list(tmp_path.rglob("owned*"))
        assert len(world.requests) <= 20, [said.path for said in world.requests]


class _Tags(HTMLParser):
    """The tags and links of a page, and its text outside of code."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self._code += tag in ("code", "pre")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text += data


OURS = {"details", "summary", "code", "b", "strong", "em", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "h2", "h3",
        "h4", "sub", "br", "a", "pre"}  # fmt: skip


def harmless(markdown: str) -> str | None:
    """What a comment, as GitHub renders it, does that it may not; None where it is only text of ours and theirs."""
    page = _Tags()
    page.feed(
        MarkdownIt("commonmark", {"html": True, "linkify": True})
        .enable(["table", "linkify", "strikethrough"])
        .render(markdown)
    )
    if page.tags - OURS:
        return f"tags {page.tags - OURS}"
    if bad := [link for link in page.links if not link.startswith(("https://huggingface.co/", "https://github.com/"))]:
        return f"links {bad}"
    found = re.search(r"(?<![\w`])@[A-Za-z]|(?<![\w&])#\d|\bGH-\d|[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", page.text)
    return (
        f"mention or control {found[0]!r} in {page.text[max(0, found.start() - 40) : found.end() + 20]!r}"
        if found
        else None
    )


def test_the_limits_of_this_test_can_be_broken() -> None:
    assert (
        harmless("hello @everyone")
        and harmless("<img src=x>")
        and harmless("see #12")
        and harmless("https://evil.example")
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
