"""A GGUF file that fails its proof is not published, and the release says so: of an ordinary build and of one on a small disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from bot.cli import main
from bot.hub.server import Server, running
from evals.results import read_report
from quants import kernels
from tests.bot.workflow import put_models
from tests.dense import recipe_text, save_dense

REPO = "me/Tiny-2x1M"
LAYERS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": LAYERS}
    return [save_dense(folder / f"m{n}", seed=n, **shape) for n in range(2)]


@pytest.fixture
def hub(tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    (tmp_path / "text.txt").write_text("the capital of france is paris and many small experts read text " * 20)
    monkeypatch.setattr("evals.quality.TEXT", tmp_path / "text.txt")
    with running(tmp_path / "hub") as server:
        put_models(server, models, "src")
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token())
        yield server


def break_blocks(monkeypatch: pytest.MonkeyPatch, model: Path, layer: int) -> None:
    """Blocks of eight bits come out with an infinite scale, of one matrix of one layer."""
    matrix = load_file(model / "model.safetensors")[f"model.layers.{layer}.self_attn.o_proj.weight"].float().numpy()
    encode = kernels.encode

    def damaged(rows: kernels.Array, kind: str, *importance: object) -> kernels.Array:
        encoded = encode(rows, kind)
        if kind == "Q8_0" and np.array_equal(kernels.float32(rows)[0], matrix[0]):
            encoded[1::34] = 0x7C
        return encoded

    monkeypatch.setattr("quants.writer.encode", damaged)


# Of a build on a small disk a copy of the first layers runs first, and the blocks of each part are looked at.
@pytest.mark.parametrize("layer", [0, LAYERS - 1], ids=["first layer", "last layer"])
@pytest.mark.parametrize("options", [(), ("--max-disk", "26MB")], ids=["whole", "small disk"])
def test_a_quant_that_fails_its_proof_is_left_out_of_the_release_which_says_so(
    options: tuple[str, ...], layer: int, hub: Server, models: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    release = {"repo": REPO, "quants": ["Q8_0", "Q5_0"], "license": "mit"}
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(recipe_text("src/m0", ["src/m0", "src/m1"], release=release))
    break_blocks(monkeypatch, models[0], layer)
    command = ["build", str(recipe), "--out", str(out), "--publish", *options]
    assert main(command) == 0
    assert "Q8_0 is not part of the release" in capsys.readouterr().err
    report = read_report(out / "report.json")
    assert [quant.type for quant in report.quants] == ["Q5_0"]
    assert [failed.type for failed in report.failed_quants] == ["Q8_0"]
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    files = api.list_repo_files(f"{REPO}-GGUF")
    assert [name for name in files if "Q8_0" in name] == []
    assert [name for name in files if "Q5_0" in name]
    for repo in (REPO, f"{REPO}-GGUF"):
        card = Path(api.hf_hub_download(repo, "README.md", local_dir=tmp_path / repo)).read_text()
        assert "Not part of this release, since the file could not be proven to run: Q8_0 (Tiny-2x1M-Q8_0" in card
        assert str(tmp_path) not in card
    assert not list(out.glob("gguf/*Q8_0*"))


@pytest.mark.parametrize("options", [(), ("--max-disk", "26MB")], ids=["whole", "small disk"])
def test_a_release_whose_only_quant_fails_is_the_model_alone_and_says_so(
    options: tuple[str, ...], hub: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = {"repo": REPO, "quants": ["Q8_0"], "license": "mit"}
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(recipe_text("src/m0", ["src/m0", "src/m1"], release=release))
    break_blocks(monkeypatch, models[0], LAYERS - 1)
    assert main(["build", str(recipe), "--out", str(out), "--publish", *options]) == 0
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    assert not api.repo_exists(f"{REPO}-GGUF") or not [
        name for name in api.list_repo_files(f"{REPO}-GGUF") if name.endswith(".gguf")
    ]
    card = Path(api.hf_hub_download(REPO, "README.md", local_dir=tmp_path / "card")).read_text()
    assert "Not part of this release, since the file could not be proven to run: Q8_0 (Tiny-2x1M-Q8_0" in card
    assert read_report(out / "report.json").quants == ()
