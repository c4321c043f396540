"""`moerge quantize RECIPE`: GGUF files straight from the plan, without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bot.cli import main
from bot.preview import plan_recipe
from bot.quants import measure_quants, planned_model
from bot.work import fetched
from evals.results import read_report
from merge.gates import read_gates
from merge.recipe import load_recipe
from merge.sources import Sources
from tests.dense import recipe_text, save_dense

TYPES = ["BF16", "Q4_K_M", "Q2_K_S"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_dense(folder / f"m{n}", seed=n, hidden_size=256, intermediate_size=512) for n in range(2)]


def write_recipe(folder: Path, models: list[Path], **keys: object) -> Path:
    experts = [
        {"source_model": str(m), "positive_prompts": [f"the {n} of france"], "noise_scale": 0.01 * n}
        for n, m in enumerate(models)
    ]
    path = folder / "tiny-2x1M.yaml"
    text = recipe_text(models[0], [], **{"gate_mode": "hidden"} | keys)
    path.write_text(text.replace("experts: []", f"experts: {json.dumps(experts)}"))
    return path


def test_files_equal_those_of_a_build_and_no_checkpoint_is_written(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("quants.imatrix.CALIBRATION", "evals.quality.TEXT"):
        (tmp_path / "text.txt").write_text("the capital of france is paris and many small experts read text " * 20)
        monkeypatch.setattr(text, tmp_path / "text.txt")
    recipe = write_recipe(tmp_path, models, release={"quants": TYPES, "license": "apache-2.0", "repo": "me/tiny-2x1M"})
    assert main(["build", str(recipe), "--out", str(tmp_path / "built")]) == 0
    assert main(["quantize", str(recipe), str(tmp_path / "out")]) == 0  # the types are the recipe's
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == sorted([*(f"tiny-2x1M-{kind}.gguf" for kind in TYPES), "tiny-2x1M-imatrix.gguf"])
    for name in made:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "built" / "gguf" / name).read_bytes(), name
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    # The quality of the files, measured over the plan, is what the build measured over the checkpoint.
    loaded = load_recipe(recipe)
    plan = plan_recipe(loaded, Sources(tmp_path))
    (gates,) = (tmp_path / "built").glob("gates-*.safetensors")
    model = planned_model(plan, fetched(plan, Sources(tmp_path)), read_gates(gates), tmp_path / "described")
    quants = [quant for quant in read_report(tmp_path / "built" / "report.json").quants if quant.kl is not None]
    found = measure_quants(model, tmp_path / "out", quants, "cpu")["quants"]
    assert {quant.type: quant.kl for quant in quants} == {name: of["kl"] for name, of in found.items()}
    assert found


def test_tensors_equal_those_of_the_merged_checkpoint(models: list[Path], tmp_path: Path) -> None:
    from benchmarks.gguf_reference import describe

    recipe = write_recipe(tmp_path, models, gate_mode="random")
    assert main(["merge", str(recipe), str(tmp_path / "model")]) == 0
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "one"), "--types", "BF16,Q8_0"]) == 0
    assert main(["quantize", str(recipe), str(tmp_path / "two"), "--types", "BF16,Q8_0", "--name", "model"]) == 0
    for name in ("model-BF16.gguf", "model-Q8_0.gguf"):
        one, two = (describe(tmp_path / folder / name) for folder in ("one", "two"))
        assert one["tensors"] == two["tensors"]
        numbers = [{key: value for key, value in of["keys"].items() if key[:8] != "general."} for of in (one, two)]
        assert numbers[0] == numbers[1]


def test_what_was_calibrated_is_kept_when_a_run_fails_and_used_by_the_next(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge.errors import DestinationError

    recipe, out = write_recipe(tmp_path, models), tmp_path / "out"
    command = ["quantize", str(recipe), str(out), "--types", "Q8_0"]

    def full(*_: object, **__: object) -> None:
        raise DestinationError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("quants.writer.write_tensors", full)
        assert main(command) == 4
    (gates,) = out.glob(".tiny-2x1M.work/gates-*")
    assert len(list(out.iterdir())) == 1
    assert gates.is_file()
    monkeypatch.setattr("bot.gates.make_gates", full)
    assert main(command) == 0
    assert [path.name for path in out.iterdir()] == ["tiny-2x1M-Q8_0.gguf"]


def test_a_family_that_gguf_has_not_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_dense(tmp_path / "olmo", model_type="olmo2")
    recipe = write_recipe(tmp_path, [base, base], gate_mode="random")
    assert main(["quantize", str(recipe), str(tmp_path / "out"), "--types", "Q8_0"]) == 1
    said = capsys.readouterr().err
    assert "no-gguf" in said
    assert "llama.cpp has no such models" in said
    assert not (tmp_path / "out").exists()
