"""A source that cannot be read, or a place that cannot be written: one sentence, exit code 4, and nothing that looks whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bot.cli import main
from tests.dense import recipe_text, save_dense


@pytest.fixture(scope="module")
def whole_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    models = [save_dense(folder / f"m{n}", seed=n, num_hidden_layers=2) for n in range(2)]
    split(models[1])
    return models


def split(model: Path) -> None:
    """The same model in two shards."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, model / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def recipe(whole_models: list[Path], tmp_path: Path) -> Path:
    models: list[Path | str] = [Path(shutil.copytree(model, tmp_path / model.name)) for model in whole_models]
    path = tmp_path / "tiny-2x1M.yaml"
    path.write_text(recipe_text(models[0], models, dtype="bfloat16"))
    return path


def assert_refused(
    recipe: Path, out: Path, said: str, capsys: pytest.CaptureFixture[str], code: int | None = None
) -> None:
    """`moerge merge` ended with exit code 4 and `said`, and left nothing that looks like a checkpoint."""
    assert (main(["merge", str(recipe), str(out)]) if code is None else code) == 4
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not out.exists()
    assert not list(out.parent.glob(f"{out.name}*/model*"))


def test_a_missing_shard_is_named_by_a_build(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m1/model-00002-of-00002.safetensors").unlink()
    assert main(["build", str(recipe), "--out", str(tmp_path / "out")]) == 4
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("left", [0, 4, 200, 0.5, 0.999])  # before, in and behind the header
def test_a_truncated_source_is_named(
    recipe: Path, tmp_path: Path, left: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m0/model.safetensors"
    os.truncate(path, int(left if left > 1 else left * path.stat().st_size))
    assert_refused(recipe, tmp_path / "out", str(tmp_path / "m0"), capsys)


@pytest.mark.parametrize("change", ["written to", "truncated", "removed"])
def test_a_source_that_changes_meanwhile_is_named(
    recipe: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "m0/model.safetensors", 0

    def advance(self: object, count: int) -> None:
        nonlocal seen
        seen += 1
        if seen != 5:
            return
        if change == "removed":
            path.unlink()
        elif change == "truncated":
            os.truncate(path, 1000)
        else:
            with path.open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\0" * 8)

    monkeypatch.setattr("merge.progress._Lines.advance", advance)
    assert_refused(recipe, tmp_path / "out", str(path), capsys)
    assert seen >= 5


def test_a_disk_too_small_is_said_with_both_sizes(
    recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(recipe, small_disk / "out", "GB are to be written, and 0.0 GB are free there", capsys)


def test_a_disk_that_fills_up_meanwhile_is_an_error(
    recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge.writer._check_space", lambda folder, needed: None)  # another process takes the room
    assert_refused(recipe, small_disk / "out", "cannot be written (No space left on device)", capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_limit_on_file_size_is_an_error(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import resource, signal, sys; from bot.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "merge", str(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr, file=sys.stderr)
    assert_refused(recipe, tmp_path / "out", "cannot be written (File too large)", capsys, done.returncode)
