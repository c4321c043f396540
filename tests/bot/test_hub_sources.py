"""Sources on the Hub: pinned, read by headers, downloaded once, and each failure one sentence with exit code 4."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from bot.cli import main
from bot.hub.faults import Fault
from bot.hub.server import Server, running
from merge.checkpoint import Checkpoint
from merge.errors import SourceError
from merge.hub import Hub
from merge.reference import parse_reference
from tests.dense import recipe_text, save_dense

BASE, EXPERT = "lab/base", "lab/expert"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_dense(folder / f"m{n}", seed=n) for n in range(2)]


@pytest.fixture
def hub(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A Hub with two models; the client's cache is empty."""
    with running(tmp_path / "hub") as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        for repo, model in zip((BASE, EXPERT), models, strict=True):
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=model)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        server.log.clear()
        yield server


def recipe(folder: Path, base: str = BASE, expert: str = EXPERT, **keys: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(recipe_text(base, [base, expert], **({"release": {"quants": ["Q8_0"]}} | keys)))
    return path


def test_a_preview_fetches_headers_and_nothing_of_the_weights(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", "--json", str(recipe(tmp_path))]) == 0
    [preview] = json.loads(capsys.readouterr().out)
    asked = {exchange.path.split("/resolve/")[-1].split("/", 1)[-1] for exchange in hub.log.all(containing="/resolve/")}
    assert asked == {"config.json", "model.safetensors"}
    assert preview["download_bytes"] > 200_000
    sent = sum(exchange.sent for exchange in hub.log.all("GET"))
    assert sent < preview["download_bytes"]
    downloaded = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "model.safetensors" not in downloaded


def test_a_branch_is_pinned_to_its_commit_when_it_is_read(hub: Server, models: list[Path]) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    sha = api.model_info(BASE).sha
    checkpoint = Hub(hub.endpoint).open(parse_reference(f"{BASE}@main"))
    assert checkpoint.commit == sha
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=BASE)
    local = Hub(hub.endpoint).download(checkpoint, ["config.json"])
    assert local.folder is not None
    assert (local.folder / "config.json").read_bytes() == (models[0] / "config.json").read_bytes()


def test_headers_by_ranges_equal_the_file_s_own(hub: Server, models: list[Path]) -> None:
    from merge.checkpoint import open_folder

    assert Hub(hub.endpoint).open(parse_reference(BASE)).tensors == open_folder(models[0]).tensors


def test_the_index_is_asked_for_only_where_the_shards_names_do_not_say_that_they_are_all(
    hub: Server, models: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors, folder = load_file(models[0] / "model.safetensors"), tmp_path / "sharded"
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shards = {name: {key: tensors[key] for key in sorted(tensors)[part::2]} for part, name in enumerate(names)}
    folder.mkdir()
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    places = {key: name for name, part in shards.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_bytes((models[0] / "config.json").read_bytes())
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    api.create_repo("lab/sharded")
    api.upload_folder(repo_id="lab/sharded", folder_path=folder)
    hub.log.clear()
    whole = Hub(hub.endpoint).open(parse_reference("lab/sharded")).tensors
    assert whole is not None and {name: info.file for name, info in whole.items()} == places
    assert not hub.log.all(containing="index.json")
    # Another file of weights: only the index says which are the model's.
    api.upload_file(path_or_fileobj=b"old", path_in_repo="consolidated.safetensors", repo_id="lab/sharded")
    assert Hub(hub.endpoint).open(parse_reference("lab/sharded")).tensors == whole
    assert hub.log.all(containing="index.json")


def test_a_build_from_the_hub_equals_one_from_folders(hub: Server, models: list[Path], tmp_path: Path) -> None:
    assert main(["merge", str(recipe(tmp_path)), str(tmp_path / "hubbed")]) == 0
    local = recipe(tmp_path, str(models[0]), str(models[1]))
    assert main(["merge", str(local), str(tmp_path / "local")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hubbed" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_second_merge_downloads_nothing(hub: Server, tmp_path: Path) -> None:
    assert main(["merge", str(recipe(tmp_path)), str(tmp_path / "one")]) == 0
    hub.log.clear()
    assert main(["merge", str(recipe(tmp_path)), str(tmp_path / "two")]) == 0
    # The headers are read again, one range a model; the weights are here.
    assert [exchange.range for exchange in hub.log.all("GET", "model.safetensors")] == ["bytes=0-65535"] * 2


SENTENCES = {
    "missing model": ("lab/nowhere", "there is no such model on the Hub, or it is private"),
    "missing revision": (f"{EXPERT}@v9", "there is no such revision"),
    "private": ("lab/secret", "there is no such model on the Hub, or it is private"),
    "gated": ("lab/gated", "the model is gated; accept its conditions"),
    "no config": ("lab/empty", "no config.json in the repository"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_source_that_cannot_be_had_is_one_sentence_at_its_line(
    case: str, hub: Server, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    api.create_repo("lab/secret", private=True)
    api.create_repo("lab/empty")
    api.create_repo("lab/gated")
    api.upload_folder(repo_id="lab/gated", folder_path=models[1])
    api.update_repo_settings("lab/gated", gated="manual")
    expert, sentence = SENTENCES[case]
    path = recipe(tmp_path, expert=expert)
    for command in (["preview", str(path)], ["build", str(path), "--out", str(tmp_path / "out")]):
        assert main(command) == 4, case
        captured = capsys.readouterr()
        said = [line for line in (captured.out + captured.err).splitlines() if "source-unavailable" in line]
        assert len(said) == 1
        assert f"{path}:5: error[source-unavailable]: {expert}" in said[0]
        assert sentence in said[0]
    assert not (tmp_path / "out/model").exists()


def test_a_wrong_token_and_a_hub_that_is_down_are_one_sentence(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["preview", str(recipe(tmp_path))]) == 4
    assert "token" in capsys.readouterr().out
    with pytest.raises(SourceError, match="cannot be reached"):
        Hub("http://127.0.0.1:9").open(parse_reference(BASE))


def test_a_hub_with_trouble_is_said_to_have_it(hub: Server) -> None:
    hub.faults = lambda number, request: Fault(status=500)
    with pytest.raises(SourceError, match="answered with status 500"):
        Hub(hub.endpoint).open(parse_reference(BASE))


def weights_of(hub: Server) -> bytes:
    """What the Hub has as the base's weights."""
    return Path(HfApi(endpoint=hub.endpoint).hf_hub_download(BASE, "model.safetensors")).read_bytes()


def remote(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Hub, Checkpoint, Path]:
    """A Hub to download from, with an empty cache, and where its weights will lie."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "fresh/hub"))
    client = Hub(hub.endpoint)
    checkpoint = client.open(parse_reference(BASE))
    hub.log.clear()
    return client, checkpoint, tmp_path / "fresh/moerge/lab--base" / str(checkpoint.commit) / "model.safetensors"


def test_a_download_cut_off_by_a_kill_goes_on_where_it_stopped(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights_of(hub)
    client, checkpoint, target = remote(hub, tmp_path, monkeypatch)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".partial").write_bytes(whole[:200_000])
    local = client.download(checkpoint, ["model.safetensors"])
    assert local.folder == target.parent
    assert target.read_bytes() == whole
    assert [each.range for each in hub.log.all("GET", "model.safetensors")] == [f"bytes=200000-{len(whole) - 1}"]
    hub.log.clear()
    client.download(checkpoint, ["model.safetensors"])
    assert not hub.log.all("GET", "model.safetensors")


def test_a_connection_that_breaks_again_and_again_costs_no_byte_twice(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights_of(hub)
    client, checkpoint, target = remote(hub, tmp_path, monkeypatch)
    monkeypatch.setattr("merge.download.PAUSE", 0.01)
    hub.faults = lambda number, request: Fault(drop=100_000) if "model.safetensors" in str(request.url) else None
    client.download(checkpoint, ["model.safetensors"])
    assert target.read_bytes() == whole
    assert len(hub.log.all("GET", "model.safetensors")) >= 3


def test_a_download_that_is_not_the_file_is_refused_and_not_kept(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, checkpoint, target = remote(hub, tmp_path, monkeypatch)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".partial").write_bytes(b"x" * 1000)  # a wrong beginning, as a broken disk leaves it
    with pytest.raises(SourceError, match="checksum"):
        client.download(checkpoint, ["model.safetensors"])
    assert not target.exists()
    client.download(checkpoint, ["model.safetensors"])  # once more, from the beginning
    assert target.read_bytes() == weights_of(hub)


def test_a_build_does_not_use_a_download_in_which_a_bit_flipped(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, flipped = recipe(tmp_path, release={"quants": []}), []

    def flip(number: int, request: Any) -> Fault | None:
        """One bit of the first large range of weights."""
        first, _, last = request.headers.get("range", "bytes=0-0").removeprefix("bytes=").partition("-")
        if request.method != "GET" or flipped or int(last) - int(first) < 100_000:
            return None
        flipped.append(request.url.path)
        return Fault(damage="answer")

    hub.faults = flip
    command = ["build", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 4
    assert flipped and "what was downloaded is not the file on the Hub (checksum)" in capsys.readouterr().err
    assert not (tmp_path / "out/model/model.safetensors").exists()
    assert main(command) == 0
    hub.faults = None
    assert main(["merge", str(path), str(tmp_path / "merged")]) == 0
    files = (tmp_path / "out/model/model.safetensors", tmp_path / "merged/model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_branch_means_is_asked_again_only_after_a_while(hub: Server, tmp_path: Path) -> None:
    reference, cache = parse_reference(BASE), tmp_path / "headers"
    first = Hub(hub.endpoint, cache=cache, recent=300.0).open(reference)
    hub.log.clear()
    assert Hub(hub.endpoint, cache=cache, recent=300.0).open(reference) == first
    assert not hub.log.all()
    HfApi(endpoint=hub.endpoint, token=hub.token()).upload_file(
        path_or_fileobj=b"new", path_in_repo="notes.txt", repo_id=BASE
    )
    assert Hub(hub.endpoint, cache=cache, recent=300.0).open(reference).commit == first.commit  # as a job may believe
    newer = Hub(hub.endpoint, cache=cache).open(reference)  # who does not want to
    assert newer.commit != first.commit
    for file in cache.rglob("*.json"):
        os.utime(file, (0, 0))
    hub.log.clear()
    for _ in range(2):  # the answer to the first is recent for the second
        assert Hub(hub.endpoint, cache=cache, recent=300.0).open(reference) == newer
    assert len(hub.log.all()) == 1


def test_a_file_of_another_size_in_the_cache_is_fetched_again(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, checkpoint, target = remote(hub, tmp_path, monkeypatch)
    target.parent.mkdir(parents=True)
    target.write_bytes(b"cut off")  # as a crash of the machine can leave it
    client.download(checkpoint, ["model.safetensors"])
    assert target.read_bytes() == weights_of(hub)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_small_file_in_which_a_bit_flipped_is_not_used(
    name: str, hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, release={"quants": []})
    hub.faults = lambda number, request: Fault(damage="answer") if request.url.path.endswith(f"/{name}") else None
    command = ["merge", str(path), str(tmp_path / "out")]
    assert main(command) == 4
    said = capsys.readouterr()
    assert name in said.out + said.err and "is not the file on the Hub (checksum)" in said.out + said.err
    hub.faults = None
    assert main(command) == 0


def test_a_hub_that_stays_down_ends_a_download_with_one_sentence(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, checkpoint, target = remote(hub, tmp_path, monkeypatch)
    monkeypatch.setattr("merge.download.PAUSE", 0.01)
    hub.faults = lambda number, request: Fault(status=503)
    with pytest.raises(SourceError, match="answered with status 503"):
        client.download(checkpoint, ["model.safetensors"])
    assert not target.exists()
