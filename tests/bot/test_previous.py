"""A card says what became better and worse since the release that is on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from bot.hub.server import Server, running
from bot.previous import with_previous
from bot.publish import publish
from bot.publish.contents import PUBLISHED_REPORT
from cards.render import write_cards
from evals.results import REPORT, FileMade, Report, read_report
from merge.files import file_sha256
from tests.cards.reports import measured_report, sha

REPO = "me/Compared-4x7B"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with running(tmp_path / "hub") as server:
        yield server


def build(folder: Path, version: str, chat: float, recipe: str) -> Report:
    """What a build leaves, with one small file for the model."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps({"version": version}))
    (folder / "model/image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    made = measured_report()
    path = folder / "model/config.json"
    score = replace(made.scores[0], value=chat)
    report = replace(
        made,
        repo=REPO,
        version=version,
        recipe_identity=sha(recipe),
        scores=(score, *made.scores[1:]),
        files=(FileMade("config.json", path.stat().st_size, file_sha256(path)),),
        quants=(),
        previous=None,
    )
    (folder / REPORT).write_bytes(report.to_json())
    write_cards(folder, report)
    return report


def test_a_new_release_is_compared_with_the_one_on_the_hub_and_keeps_it_when_published_again(
    tmp_path: Path, hub: Server
) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())

    def card() -> str:
        return ModelCard(Path(api.hf_hub_download(REPO, "README.md")).read_text(encoding="utf-8")).text

    def published(folder: Path) -> bool:
        return publish(folder, token=hub.token(), endpoint=hub.endpoint).changed

    build(tmp_path / "one", "1.0", 68.0, "one")
    assert published(tmp_path / "one")
    assert "release before" not in card()
    build(tmp_path / "two", "2.0", 73.5, "two")
    assert published(tmp_path / "two")
    assert "The release before was `1.0`. Of the figures that both have, 1 became better and 0 worse." in card()
    assert "| AI2 Reasoning Challenge (25-shot) | 68.00 | 73.50 | better |" in card()
    # Published again, and built again elsewhere without knowing of the first release: nothing changes.
    assert not published(tmp_path / "two")
    build(tmp_path / "again", "2.0", 73.5, "two")
    assert not published(tmp_path / "again")
    files = set(api.list_repo_files(REPO))
    assert {"architecture.svg", "routing.png", "image.png", ".eval_results/gsm8k.yaml", PUBLISHED_REPORT} <= files
    read = read_report(Path(api.hf_hub_download(REPO, PUBLISHED_REPORT)))
    assert read.previous is not None
    assert read.previous.label == "1.0"


def test_a_report_that_this_moerge_cannot_read_is_no_release_to_compare_with(tmp_path: Path, hub: Server) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    build(tmp_path / "one", "1.0", 68.0, "one")
    publish(tmp_path / "one", token=hub.token(), endpoint=hub.endpoint)
    api.upload_file(path_or_fileobj=b'{"name": 1}', path_in_repo=PUBLISHED_REPORT, repo_id=REPO)
    build(tmp_path / "two", "2.0", 70.0, "two")
    assert publish(tmp_path / "two", token=hub.token(), endpoint=hub.endpoint).changed
    assert "release before" not in ModelCard.load(tmp_path / "two/model/README.md").text


def test_a_worse_release_is_said_to_be_worse(tmp_path: Path) -> None:
    from cards.evaluation import comparison

    old, new = build(tmp_path / "a", "1", 70.0, "a"), build(tmp_path / "b", "2", 60.0, "b")
    table = comparison(with_previous(new, old))
    assert table is not None
    assert "0 became better and 1 worse" in table.before
