"""What a GGUF file says of itself, filled from the recipe and its sources on the Hub."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader
from huggingface_hub import HfApi

from bot.cli import main
from bot.hub.server import Server, running
from tests.dense import recipe_text, save_dense


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    with running(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token())
        yield server


def test_general_keys_are_those_of_the_recipe(hub: Server, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    commits = []
    for number in range(2):
        api.create_repo(f"src/m{number}")
        folder = save_dense(tmp_path / f"m{number}", number)
        commits.append(api.upload_folder(repo_id=f"src/m{number}", folder_path=folder).oid)
    release = {"repo": "me/Tiny-2x1M", "quants": ["BF16"], "license": "other", "license_name": "tiny-license"}
    release |= {"license_link": "https://example.com/license", "tags": ["tiny", "merge"], "language": ["en", "fr"]}
    recipe = tmp_path / "recipe.yaml"
    card = {"title": "Tiny, twice"}
    recipe.write_text(recipe_text("src/m0", ["src/m0", "src/m1"], release=release, card=card))
    assert main(["build", str(recipe), "--out", str(tmp_path / "out")]) == 0
    fields = GGUFReader(tmp_path / "out/gguf/Tiny-2x1M-BF16.gguf").fields
    said = {name: of.contents() for name, of in fields.items() if name.startswith("general.")}
    size = said.pop("general.size_label")
    assert said == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "general.name": "Tiny, twice",
        "general.basename": "Tiny-2x1M",
        "general.quantized_by": "moerge",
        "general.license": "other",
        "general.license.name": "tiny-license",
        "general.license.link": "https://example.com/license",
        "general.repo_url": "https://huggingface.co/me/Tiny-2x1M",
        "general.base_model.count": 2,
        **{
            f"general.base_model.{number}.{key}": value
            for number in range(2)
            for key, value in (
                ("name", f"m{number}"),
                ("organization", "src"),
                ("version", commits[number]),
                ("repo_url", f"https://huggingface.co/src/m{number}"),
            )
        },
        "general.tags": ["moe", "frankenmoe", "merge", "tiny"],
        "general.languages": ["en", "fr"],
    }
    # The number of experts, and the size of a model with one of them.
    one = sum(
        math.prod(tensor.shape.tolist()) // (2 if "_exps" in tensor.name else 1)
        for tensor in GGUFReader(tmp_path / "out/gguf/Tiny-2x1M-BF16.gguf").tensors
    )
    assert size == f"2x{one / 1e3:.0f}K"
