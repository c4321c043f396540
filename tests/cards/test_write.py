from __future__ import annotations

import argparse
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from bot.cli import card
from cards.render import render_gguf_card, render_model_card, write_cards
from evals.results import REPORT
from merge.errors import DestinationError, UsageError
from tests.cards.reports import demo_report, release_report


def moerge_card(folder: Path) -> int:
    parser = argparse.ArgumentParser()
    card.configure(parser)
    return card.run(parser.parse_args([str(folder)]))


def test_both_cards_are_written_beside_their_files(tmp_path: Path) -> None:
    report = release_report()
    assert write_cards(tmp_path, report) == [tmp_path / "model" / "README.md", tmp_path / "gguf" / "README.md"]
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == render_model_card(report)
    assert (tmp_path / "gguf" / "README.md").read_text(encoding="utf-8") == render_gguf_card(report)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"README.md"}
    assert stat.S_IMODE((tmp_path / "model" / "README.md").stat().st_mode) == 0o644


def test_without_gguf_files_there_is_no_card_of_them(tmp_path: Path) -> None:
    write_cards(tmp_path, replace(demo_report(), quants=()))
    assert not (tmp_path / "gguf").exists()


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "model" / "README.md"
    old.parent.mkdir()
    old.write_text("as it was", encoding="utf-8")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_cards(tmp_path, demo_report())
    assert old.read_text(encoding="utf-8") == "as it was"
    assert list(old.parent.iterdir()) == [old]


def test_the_command_renders_from_the_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / REPORT).write_bytes(release_report().to_json())
    assert moerge_card(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "model/README.md"), str(tmp_path / "gguf/README.md")]
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == render_model_card(release_report())


def test_a_folder_without_a_report_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.json cannot be read \(No such file or directory\); name the folder"):
        moerge_card(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"[1]", b'{"name": 1}', b"\xff\xfe"])
def test_a_file_that_is_no_report_is_wrong_use(tmp_path: Path, content: bytes) -> None:
    (tmp_path / REPORT).write_bytes(content)
    with pytest.raises(UsageError, match=r"report\.json is not a build's report \(.+\); build again"):
        moerge_card(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_destination(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(demo_report().to_json())
    (tmp_path / "model").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(DestinationError, match="cannot be written"):
        moerge_card(tmp_path)
