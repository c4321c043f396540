"""`moerge verify` says of a release that it is exactly what its recipe says, or what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from bot.cli import main
from bot.hub.server import Server, running
from bot.pipeline import build_and_publish
from bot.verify import verify
from merge.errors import SourceError
from merge.recipe import load_recipe
from merge.sources import Sources
from tests.dense import recipe_text, save_dense

REPO = "me/Verified-2x1M"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch, running(folder / "hub") as server:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache" / "hub"))
        patch.setenv("HF_ENDPOINT", server.endpoint)
        patch.setenv("HF_TOKEN", server.token())
        api = HfApi(endpoint=server.endpoint, token=server.token())
        for number in range(3):
            api.create_repo(f"src/m{number}")
            api.upload_folder(repo_id=f"src/m{number}", folder_path=save_dense(folder / f"m{number}", seed=number))
        recipe = folder / "recipe.yaml"
        release = {"repo": REPO, "quants": ["Q8_0"], "version": "v1", "license": "mit"}
        recipe.write_text(recipe_text("src/m0", ["src/m1", "src/m2"], experts_per_token=1, release=release))
        options = {"endpoint": server.endpoint, "token": server.token()}
        build_and_publish(load_recipe(recipe), Sources(folder, **options), folder / "out", **options)
        # The sources' branches move afterwards; the release names their commits.
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="src/m1")
        yield server


@pytest.fixture
def api(hub: Server) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token())


def changed(api: HfApi, branch: str, **files: bytes) -> str:
    """A branch of the release with these files otherwise."""
    api.create_branch(REPO, branch=branch)
    for name, content in files.items():
        path = name.replace("__", ".")
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO, revision=branch)
    return branch


def model(api: HfApi) -> Path:
    return Path(api.hf_hub_download(REPO, "model.safetensors", revision="v1"))


def test_a_release_is_exactly_what_its_recipe_says(hub: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", REPO]) == 0
    assert "this is exactly what its recipe says" in capsys.readouterr().out


def test_a_release_that_experts_were_added_to_is_exactly_what_its_recipe_says(
    hub: Server, api: HfApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is a release on the Hub itself; the added expert is one of another release."""
    recipe, options = tmp_path / "recipe.yaml", {"endpoint": hub.endpoint, "token": hub.token()}
    release = {"repo": "me/Extended-3x1M", "quants": [], "license": "mit"}
    text = recipe_text(f"{REPO}@v1", [f"{REPO}@v1"], experts_per_token=1, release=release)
    recipe.write_text(text.replace("- source_model:", "- expert: 1\n  source_model:"))
    build_and_publish(load_recipe(recipe), Sources(tmp_path, **options), tmp_path / "out", **options)
    assert main(["verify", "me/Extended-3x1M"]) == 0
    assert "this is exactly what its recipe says" in capsys.readouterr().out
    made, before = (load_file(api.hf_hub_download(name, "model.safetensors")) for name in ("me/Extended-3x1M", REPO))
    at = "model.layers.1.block_sparse_moe.experts"
    for expert, source in enumerate((0, 1, 1)):
        assert made[f"{at}.{expert}.w2.weight"].equal(before[f"{at}.{source}.w2.weight"])


def test_one_flipped_byte_is_told_with_its_tensor(hub: Server, api: HfApi, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(model(api).read_bytes())
    raw[-10] ^= 1
    branch = changed(api, "flipped", model__safetensors=bytes(raw))
    assert main(["verify", REPO, "--revision", branch]) == 1
    said = capsys.readouterr().out
    assert f"{REPO}/model.safetensors: is not the file that was released (checksum)" in said
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    assert f"{last}: differs from" in said and "from byte" in said
    assert said.count("differs from") == 1


def test_a_swapped_expert_is_told_as_one(hub: Server, api: HfApi, tmp_path: Path) -> None:
    tensors = load_file(model(api))
    one, two = (f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in range(2))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, tmp_path / "swapped.safetensors", {"format": "pt"})
    branch = changed(api, "swapped", model__safetensors=(tmp_path / "swapped.safetensors").read_bytes())
    found = verify(REPO, revision=branch, endpoint=hub.endpoint, token=hub.token())
    assert (
        f"{one}: holds what the recipe gives expert 2 (model.layers.1.mlp.down_proj.weight of src/m2)"
        in found.differences
    )
    assert (
        f"{two}: holds what the recipe gives expert 1 (model.layers.1.mlp.down_proj.weight of src/m1)"
        in found.differences
    )


def test_an_edited_config_and_recipe_are_told_by_key(hub: Server, api: HfApi) -> None:
    config = json.loads(Path(api.hf_hub_download(REPO, "config.json", revision="v1")).read_bytes())
    config["num_experts_per_tok"] = 2
    branch = changed(api, "config", config__json=json.dumps(config).encode())
    found = verify(REPO, revision=branch, endpoint=hub.endpoint, token=hub.token())
    assert "config.json: num_experts_per_tok is 2, and the recipe gives 1" in found.differences
    recipe = Path(api.hf_hub_download(REPO, "recipe.yaml", revision="v1")).read_text()
    branch = changed(api, "recipe", recipe__yaml=recipe.replace("src/m2", "src/m0").encode())
    found = verify(REPO, revision=branch, endpoint=hub.endpoint, token=hub.token())
    assert "recipe.yaml: is not the recipe that the release was built from" in found.differences
    assert any("differs from" in each and "src/m0" in each for each in found.differences)


def test_a_gate_that_is_not_the_seed_s_is_told(hub: Server, api: HfApi, tmp_path: Path) -> None:
    gates = load_file(api.hf_hub_download(REPO, "moerge/gates.safetensors", revision="v1"))
    save_file({name: x + 1 for name, x in gates.items()}, tmp_path / "gates.safetensors", {"key": "0" * 64})
    api.create_branch(REPO, branch="gates")
    path = tmp_path / "gates.safetensors"
    api.upload_file(path_or_fileobj=path, path_in_repo="moerge/gates.safetensors", repo_id=REPO, revision="gates")
    found = verify(REPO, revision="gates", endpoint=hub.endpoint, token=hub.token())
    assert any("not what the recipe's seed gives" in each for each in found.differences)


def test_a_card_that_people_edited_is_no_difference(hub: Server, api: HfApi) -> None:
    branch = changed(api, "card", README__md=b"---\nlicense: mit\n---\nmine\n", notes__txt=b"mine")
    assert verify(REPO, revision=branch, endpoint=hub.endpoint, token=hub.token()).is_exact


def test_what_is_no_release_cannot_be_verified(hub: Server) -> None:
    for repo, said in (("src/m0", "no moerge.lock.json"), ("me/nothing", "no such repository")):
        with pytest.raises(SourceError, match=said):
            verify(repo, endpoint=hub.endpoint, token=hub.token())
