"""Killed at any change it makes to the disk and run again, a command ends in the files of one that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dense import recipe_text, save_dense


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models: list[Path | str] = [save_dense(folder / f"m{n}", seed=n, num_hidden_layers=2) for n in range(2)]
    path = folder / "tiny-2x1M.yaml"
    path.write_text(recipe_text(models[0], models, dtype="bfloat16", release={"quants": [], "license": "mit"}))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(folder: Path, begin: str, end: str, *command: str) -> int:
    """The number of kills; what was made of each is folder/1, folder/2 …"""
    line = [sys.executable, "-m", "tests.bot.kills", str(folder), begin, end, *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_merge_killed_before_any_of_its_changes_ends_in_the_same_files(recipe: Path, tmp_path: Path) -> None:
    kills = killed(tmp_path, "", "nothing", "merge", str(recipe), "OUT")
    made = [files(tmp_path / str(number)) for number in range(1, kills + 2)]  # the last one was not killed
    assert kills > 40
    assert len([name for name in made[-1] if name.endswith(".safetensors")]) >= 3
    for number, one in enumerate(made, 1):
        assert one == made[-1], f"change {number}"
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(1, kills + 2)}


@pytest.mark.slow
def test_a_build_killed_from_its_last_shard_to_its_report_ends_in_the_same_files(recipe: Path, tmp_path: Path) -> None:
    command = ["build", str(recipe), "--out", "OUT"]
    assert killed(tmp_path / "whole", "nothing", "nothing", *command) == 0
    last = max(path.stem for path in (tmp_path / "whole/1/model").glob("model-*.safetensors"))
    kills = killed(tmp_path, last, "report.json", *command)
    made = [files(tmp_path / str(number)) for number in range(1, kills + 2)]
    assert kills > 20
    for number, one in enumerate(made, 1):
        assert one.keys() == made[-1].keys(), f"change {number}"
        for name in one.keys() - {"state.json", "report.json", "model/README.md"}:  # these tell seconds
            assert one[name] == made[-1][name], f"change {number}: {name}"
        assert set(json.loads(one["state.json"])["stages"]) == set(json.loads(made[-1]["state.json"])["stages"])
