"""Pickle checkpoints and adapters on the Hub: previewed from a few ranges, merged to the bytes of their plain twins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from bot.cli import main
from bot.hub.server import Server, running
from merge.checkpoint import open_folder
from merge.errors import SourceError
from merge.hub import Hub
from merge.reference import parse_reference
from merge.source_files import open_files
from merge.sources import Sources
from tests.dense import recipe_text, save_dense
from tests.merge.test_adapters import save_adapter
from tests.merge.test_pickles import as_pickle
from tests.merge.test_pickles_hostile import FLAG, touch, zipped

SIZES = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"plain": save_dense(folder / "plain", **SIZES), "small": save_dense(folder / "small")}
    for name, options in {"zip": {}, "stream": {"legacy": True}, "sharded": {"shards": 3}}.items():
        made[name] = as_pickle(save_dense(folder / name, **SIZES), **options)  # type: ignore[arg-type]
    made["lora"] = save_adapter(folder / "lora")
    return made


@pytest.fixture(scope="module")
def hub(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("hub") / "root") as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        for name, model in models.items():
            api.create_repo(f"lab/{name}")
            api.upload_folder(repo_id=f"lab/{name}", folder_path=model)
        yield server


@pytest.fixture
def client(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The Hub as the command line's, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.log.clear()
    return hub


def recipe(folder: Path, base: str, *experts: str, name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(recipe_text(base, [*experts], release={"quants": ["Q8_0"]}))
    return path


@pytest.mark.parametrize("kind", ["zip", "stream", "sharded"])
def test_a_pickle_on_the_hub_is_known_from_a_few_ranges(
    client: Server, models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    found = Hub(client.endpoint).open(parse_reference(f"lab/{kind}")).tensors or {}
    local = open_folder(models[kind]).tensors or {}
    assert {n: (i.dtype, i.shape, i.file) for n, i in found.items()} == {
        n: (i.dtype, i.shape, i.file) for n, i in local.items()
    }
    ranges = [e for e in client.log.all("GET") if "/resolve/" in e.path and e.path.endswith(".bin")]
    files = 3 if kind == "sharded" else 1
    assert files <= len(ranges) <= 3 * files
    assert sum(exchange.sent for exchange in ranges) < sum(i.nbytes for i in local.values())


@pytest.mark.parametrize("kind", ["zip", "stream", "sharded"])
def test_a_merge_of_pickles_from_the_hub_equals_that_of_safetensors(
    client: Server, models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    written = []
    for name in ("plain", kind):
        path = recipe(tmp_path, f"lab/{name}", f"lab/{name}", f"lab/{name}", name=name)
        assert main(["merge", str(path), str(tmp_path / f"out-{name}")]) == 0
        written.append((tmp_path / f"out-{name}" / "model.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", ["zip", "stream", "sharded"])
def test_the_tensors_of_a_pickle_are_fetched_one_by_one_where_the_disk_is_small(
    client: Server, models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    sources = Sources(tmp_path, endpoint=client.endpoint)
    there = sources.open(parse_reference(f"lab/{kind}"))
    sizes = [info.nbytes for info in (there.tensors or {}).values()]
    ranged = sources.ranged({}, {"x": there}, tmp_path / "ranges", 2 * max(sizes))
    local = {"x": open_folder(models["plain"])}
    client.log.clear()
    by_range, plain = open_files(ranged)["x"], open_files(local)["x"]
    for name in there.tensors or {}:
        assert torch.equal(by_range.flat(name, 3, 40), plain.flat(name, 3, 40)), name
    sent = sum(exchange.sent for exchange in client.log.all("GET") if exchange.path.endswith(".bin"))
    assert sum(sizes) <= sent < 1.1 * sum(sizes)


def test_an_adapter_from_the_hub_is_counted_and_merged(
    client: Server, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    previews = {}
    for name, expert in (("with", "lab/small+lab/lora"), ("without", "lab/small")):
        path = recipe(tmp_path, "lab/small", expert, "lab/small", name=name)
        assert main(["preview", "--json", str(path)]) == 0
        [previews[name]] = json.loads(capsys.readouterr().out)
    size = (models["lora"] / "adapter_model.safetensors").stat().st_size
    assert previews["with"]["download_bytes"] == previews["without"]["download_bytes"] + size
    assert previews["with"]["parameters"] == previews["without"]["parameters"]
    local = recipe(tmp_path, str(models["small"]), f"{models['small']}+{models['lora']}", "lab/small", name="local")
    for path, out in ((tmp_path / "with.yaml", "a"), (local, "b")):
        assert main(["merge", str(path), str(tmp_path / out)]) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_missing_adapter_is_named_at_its_line(
    client: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "lab/small", "lab/small", "lab/small+lab/gone")
    assert main(["preview", "--json", str(path)]) == 4
    [preview] = json.loads(capsys.readouterr().out)
    [finding] = [finding for finding in preview["findings"] if finding["level"] == "error"]
    assert finding["id"] == "source-unavailable"
    assert finding["line"] == 5
    assert "lab/gone" in finding["message"]


def test_an_adapter_named_as_a_model_is_told_how_to_write_it(client: Server) -> None:
    with pytest.raises(SourceError, match=r"as base\+lab/lora"):
        Hub(client.endpoint).open(parse_reference("lab/lora"))


def test_a_hostile_pickle_on_the_hub_stops_the_preview(
    client: Server, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import os

    monkeypatch.chdir(tmp_path)
    api = HfApi(endpoint=client.endpoint, token=client.token())
    api.create_repo("lab/hostile", exist_ok=True)
    api.upload_file(repo_id="lab/hostile", path_in_repo="config.json", path_or_fileobj=models["small"] / "config.json")
    evil = zipped(touch(os.system, f"touch {FLAG}"))
    api.upload_file(repo_id="lab/hostile", path_in_repo="pytorch_model.bin", path_or_fileobj=evil)
    assert main(["preview", str(recipe(tmp_path, "lab/small", "lab/hostile", "lab/small"))]) == 4
    out = capsys.readouterr()
    assert "asks for 'posix.system', which no tensor needs" in out.out + out.err
    assert not (tmp_path / FLAG).exists()
