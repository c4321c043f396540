"""A build leaves what is promised, does nothing twice, and goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bot.cli import main
from evals.results import read_report
from tests.dense import recipe_text, save_dense

RELEASE = {"release": {"quants": ["BF16", "Q8_0", "Q4_K_M"], "license": "apache-2.0"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_dense(folder / f"m{n}", seed=n, hidden_size=256, intermediate_size=512) for n in range(3)]


def write_recipe(folder: Path, models: list[Path], **keys: object) -> Path:
    experts = [{"source_model": str(m), "positive_prompts": [f"the {n} of france"]} for n, m in enumerate(models)]
    path = folder / "tiny-3x1M.yaml"
    text = recipe_text(models[0], [], gate_mode="hidden", **(RELEASE | keys))
    path.write_text(text.replace("experts: []", f"experts: {json.dumps(experts)}"))
    return path


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_a_build_leaves_the_promised_files_and_report(models: list[Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    names = set(contents(out))
    assert {"report.json", "state.json", "model/config.json", "model/model.safetensors", "model/README.md"} <= names
    assert {f"gguf/tiny-3x1M-{kind}.gguf" for kind in ("BF16", "Q8_0", "Q4_K_M")} | {"gguf/README.md"} <= names
    report = read_report(out / "report.json")
    assert [quant.proof for quant in report.quants] == ["ran"] * 3
    assert all(len(quant.sample_tokens) > 0 for quant in report.quants)
    assert {source.name for source in report.sources} == {str(model) for model in models}
    # All of the base is used, and of an expert its MLPs alone.
    base, *others = report.sources
    assert base.unused == {}
    for other in others:
        assert other.unused["model.layers.*.self_attn.q_proj.weight"] > 0
        assert not any(".mlp." in name for name in other.unused)
    assert report.gate_mode == "hidden"
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]


def test_a_second_build_does_nothing_and_a_comment_changes_nothing(models: list[Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    before = {name: stat for name, stat in contents(out).items() if name.endswith((".safetensors", ".gguf"))}
    recipe.write_text("# a comment\n" + recipe.read_text())
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    after = contents(out)
    assert {name: after[name] for name in before} == before


def test_only_what_a_change_touches_is_made_again(models: list[Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    before = contents(out)
    recipe = write_recipe(tmp_path, models, release={"quants": ["Q8_0"], "license": "apache-2.0"})
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    after = contents(out)
    assert after["model/model.safetensors"] == before["model/model.safetensors"]
    assert after["gguf/tiny-3x1M-Q8_0.gguf"] == before["gguf/tiny-3x1M-Q8_0.gguf"]
    assert "gguf/tiny-3x1M-BF16.gguf" not in after  # the recipe does not ask for it any more
    recipe = write_recipe(tmp_path, models, experts_per_token=1, release={"quants": ["Q8_0"]})
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    config = json.loads((out / "model/config.json").read_text())
    assert config["num_experts_per_tok"] == 1


def test_a_damaged_file_is_made_again(models: list[Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    good = (out / "gguf/tiny-3x1M-Q8_0.gguf").read_bytes()
    os.truncate(out / "gguf/tiny-3x1M-Q8_0.gguf", 100)
    assert main(["build", str(recipe), "--out", str(out)]) == 0
    assert (out / "gguf/tiny-3x1M-Q8_0.gguf").read_bytes() == good


def test_two_builds_of_one_recipe_give_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models)
    for name in ("one", "two"):
        assert main(["build", str(recipe), "--out", str(tmp_path / name)]) == 0
    for path in (tmp_path / "one").rglob("*"):
        if path.suffix in (".safetensors", ".gguf"):
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


@pytest.mark.slow
def test_a_build_killed_anywhere_ends_in_the_same_files(models: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models)
    assert main(["build", str(recipe), "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "bot", "build", str(recipe), "--out", str(tmp_path / "out")]
    started = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], check=True)
    whole = time.monotonic() - started
    for part in range(1, 9):
        process = subprocess.Popen(command)
        time.sleep(whole * part / 9)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    for path in (tmp_path / "whole").rglob("*"):
        if path.suffix in (".safetensors", ".gguf", ".json") and path.name not in ("state.json", "report.json"):
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    names = set(contents(tmp_path / "out"))
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]


def test_a_folder_that_is_not_a_build_s_is_not_touched(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model/mine.txt").write_text("mine")
    assert main(["build", str(recipe), "--out", str(out)]) == 4
    assert "not from a build" in capsys.readouterr().err
    assert (out / "model/mine.txt").read_text() == "mine"


def test_a_second_build_in_the_same_folder_is_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bot.state import locked

    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    with locked(out):
        assert main(["build", str(recipe), "--out", str(out)]) == 2
    assert "another moerge is building here" in capsys.readouterr().err


def test_sources_without_weights_cannot_be_built(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = root / "recipes/smol_llama-8x220M.yaml"
    code = main(["build", str(recipe), "--out", str(tmp_path / "out"), "--models", str(root / "tests/data/models")])
    assert code == 4
    assert "its weights are not there" in capsys.readouterr().err


def test_merge_writes_the_checkpoint_alone(models: list[Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models), tmp_path / "model"
    assert main(["merge", str(recipe), str(out)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"model", recipe.name}
    assert main(["merge", str(recipe), str(out)]) == 4  # it is there: nothing is overwritten
