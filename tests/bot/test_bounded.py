"""A build on a small disk: the same release as any other, within the room that was promised, whatever interrupts it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import HfApi
from safetensors.torch import load_file

from bot.cli import main
from bot.disk import parse_size, plan_bounded
from bot.hub.changes import Delete
from bot.hub.faults import Fault
from bot.hub.names import repo_id
from bot.hub.server import Server, running
from bot.pipeline import build_and_publish
from bot.preview import plan_recipe, preview_of, preview_recipe
from evals.results import read_report
from merge.errors import SourceError, UsageError
from merge.ranged import bytes_of
from merge.recipe import load_recipe, parse_recipe
from merge.reference import parse_reference
from merge.source_files import open_files
from merge.sources import Sources
from tests.bot.workflow import put_models
from tests.dense import recipe_text, save_dense
from tests.headers import planned

REPO = "me/Bounded-2x1M"
ROOM = "26MB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    return [save_dense(folder / f"m{n}", seed=n, **shape) for n in range(3)]


@pytest.fixture
def hub(tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr("bot.publish.patience.PAUSE", 0.01)
    with running(tmp_path / "hub") as server:
        put_models(server, models, "src")
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token())
        yield server


def write_recipe(folder: Path, **keys: object) -> Path:
    release = {"repo": REPO, "quants": ["BF16", "Q8_0", "Q4_K_M"], "version": "v1", "license": "mit"}
    path = folder / "recipe.yaml"
    text = recipe_text("src/m0", ["src/m1", "src/m2"], **({"release": release} | keys))
    for number in (1, 2):
        prompts = "[the quick brown fox, jumps over the lazy dog]" if number == 1 else "[one and two, three and four]"
        text = text.replace(
            f"source_model: src/m{number}", f"source_model: src/m{number}\n  positive_prompts: {prompts}"
        )
    path.write_text(text)
    return path


def tree(server: Server, repo: str) -> dict[str, str]:
    info = HfApi(endpoint=server.endpoint, token=server.token()).model_info(repo, files_metadata=True)
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in info.siblings or []}


def disk_used(*folders: Path) -> int:
    total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                try:
                    total += (Path(path) / name).stat().st_blocks * 512
                except OSError:
                    continue
    return total


class Watch:
    """The largest sum of the sizes of files in some folders while it lasts."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.peak, self._stop = folders, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, disk_used(*self.folders))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("mode", ["hidden", "discriminant"])
def test_a_bounded_build_with_calibrated_gates_keeps_its_promise(mode: str, hub: Server, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, gate_mode=mode, router={"expand": False}), tmp_path / "out"
    plan = plan_recipe(load_recipe(recipe), Sources(tmp_path, endpoint=hub.endpoint, token=hub.token()))
    promised = plan_bounded(plan, parse_size(ROOM))
    hub.log.clear()
    with Watch(out, tmp_path / "cache") as watch:
        assert main(["build", str(recipe), "--out", str(out), "--publish", "--max-disk", ROOM]) == 0
    assert watch.peak <= promised.disk_bytes <= parse_size(ROOM)
    fetched = sum(each.sent for each in hub.log.all("GET", "/resolve/") if each.path.endswith(".safetensors"))
    assert fetched <= promised.download + 3 * (128 << 10)
    if mode == "hidden":  # the base is read once for its router and for the files
        read = [(plan.base, name) for name in plan.sources[plan.base].tensors or {}]
        read += [(key, name) for key in plan.experts for name in plan.sources[key].tensors or {} if ".mlp." in name]
        assert promised.download <= bytes_of(read, plan.sources)


def test_an_interrupted_calibration_goes_on_with_the_routers_that_are_uploaded(hub: Server, tmp_path: Path) -> None:
    release = {"repo": REPO, "quants": ["Q8_0"], "version": "v1", "license": "mit"}
    recipe, out = write_recipe(tmp_path, gate_mode="hidden", release=release), tmp_path / "out"
    arguments = ["build", str(recipe), "--out", str(out), "--publish", "--max-disk", ROOM]
    sent: list[str] = []

    def refuse(number: int, request: Any) -> Fault | None:
        """The Hub takes four files in each run."""
        if request.method == "PUT" and "/storage/" in request.url.path:
            sent.append(request.url.path)
            return Fault(status=403) if len(sent) % 5 == 0 else None
        return None

    hub.faults = refuse
    codes = []
    while not codes or codes[-1] == 4:
        codes.append(main(arguments))
        assert len(codes) > 1 or (out / "gates.partial").is_file()
    assert codes[-1] == 0 and len(codes) > 2
    assert len(sent) - len(set(sent)) == len(codes) - 1  # only what was refused went up again
    hub.faults = None
    assert main(["verify", REPO]) == 0


def test_a_bounded_build_keeps_its_promise_and_fetches_only_what_the_plan_reads_once(
    hub: Server, tmp_path: Path
) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    loaded = load_recipe(recipe)
    plan = plan_recipe(loaded, Sources(tmp_path, endpoint=hub.endpoint, token=hub.token()))
    promised = plan_bounded(plan, parse_size(ROOM))
    hub.log.clear()
    with Watch(out, tmp_path / "cache") as watch:
        assert main(["build", str(recipe), "--out", str(out), "--publish", "--max-disk", ROOM]) == 0
    assert watch.peak <= promised.disk_bytes <= parse_size(ROOM)
    fetched = sum(each.sent for each in hub.log.all("GET", "/resolve/") if each.path.endswith(".safetensors"))
    headers = 3 * (128 << 10)
    assert fetched <= promised.download + headers
    whole = sum(size for source in plan.sources.values() for size in source.files.values())
    assert fetched < 0.9 * whole
    assert not list((out / "model").glob("*.safetensors")) and not list((out / "gguf").glob("*.gguf"))
    # A second run builds and downloads nothing.
    hub.log.clear()
    assert main(["build", str(recipe), "--out", str(tmp_path / "other"), "--publish", "--max-disk", ROOM]) == 3
    assert not [each for each in hub.log.all() if each.method in ("POST", "PUT") and "collections" not in each.path]


def test_a_bounded_release_has_the_weights_of_an_unbounded_one(hub: Server, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, gate_mode="hidden")
    options = {"endpoint": hub.endpoint, "token": hub.token()}
    sources = Sources(tmp_path, **options)
    build_and_publish(load_recipe(recipe), sources, tmp_path / "bounded", max_disk=ROOM, **options)
    bounded = weights(hub, tmp_path / "a")
    HfApi(**options).delete_repo(REPO)
    HfApi(**options).delete_repo(f"{REPO}-GGUF")
    build_and_publish(load_recipe(recipe), Sources(tmp_path, **options), tmp_path / "whole", **options)
    whole = weights(hub, tmp_path / "b")
    assert bounded.keys() == whole.keys() and bounded == whole
    predicted = preview_recipe(recipe, Sources(tmp_path, **options)).gguf_tensor_bytes
    assert predicted is not None
    for kind, count in predicted.items():
        files = list((tmp_path / "a").glob(f"**/snapshots/**/*-{kind}-*.gguf"))
        assert len(files) > 1
        assert sum(path.stat().st_size - int(GGUFReader(path).data_offset) for path in files) == count
    quant = read_report(tmp_path / "bounded/report.json").quants[0]
    assert (quant.type, quant.proof, len(quant.files) > 1) == ("BF16", "structural", True)


def weights(server: Server, folder: Path) -> dict[str, bytes]:
    """Every tensor of a release by the name of its file without the part, and every small file."""
    found: dict[str, bytes] = {}
    for repo in (REPO, f"{REPO}-GGUF"):
        path = Path(HfApi(endpoint=server.endpoint, token=server.token()).snapshot_download(repo, cache_dir=folder))
        for file in sorted(path.iterdir()):
            model = re.sub(r"(-\d{5}-of-\d{5})?\.(gguf|safetensors)$", r".\2", file.name)
            if file.suffix == ".gguf":
                found |= {f"{model}/{tensor.name}": bytes(tensor.data) for tensor in GGUFReader(file).tensors}
            elif file.suffix == ".safetensors":
                tensors = load_file(file)
                found |= {f"{model}/{name}": bytes(x.view(torch.uint8).numpy()) for name, x in tensors.items()}
            elif file.name in ("config.json", "tokenizer.json", "recipe.yaml"):
                found[file.name] = file.read_bytes()
    return found


def test_a_branch_that_moves_during_a_bounded_build_changes_nothing(
    hub: Server, tmp_path: Path, models: list[Path]
) -> None:
    recipe = write_recipe(tmp_path)
    options = {"endpoint": hub.endpoint, "token": hub.token()}
    api = HfApi(**options)
    build_and_publish(load_recipe(recipe), Sources(tmp_path, **options), tmp_path / "one", max_disk=ROOM, **options)
    before = {name: digest for name, digest in tree(hub, REPO).items() if name.endswith(".safetensors")}
    for repo in (REPO, f"{REPO}-GGUF"):
        api.delete_repo(repo)
    moved: list[bool] = []

    def move(number: int, request: Any) -> None:
        """The branch of an expert loses its weights when the first file of the result goes up."""
        if not moved and "/storage/" in request.url.path:
            moved.append(True)
            found = hub.hub.store.get(repo_id("model", "src/m1"))
            found.commit("main", [Delete("model.safetensors")], author="somebody", title="Gone")

    hub.faults = move
    build_and_publish(load_recipe(recipe), Sources(tmp_path, **options), tmp_path / "two", max_disk=ROOM, **options)
    assert moved and before.items() <= tree(hub, REPO).items()


def test_an_upload_that_the_hub_lost_is_made_again(hub: Server, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, release={"repo": REPO, "quants": [], "license": "mit"}), tmp_path / "out"
    arguments = ["build", str(recipe), "--out", str(out), "--publish", "--max-disk", ROOM]
    hub.faults = lambda number, request: Fault(status=403) if "/commit/" in request.url.path else None
    assert main(arguments) == 4
    objects = hub.root.rglob(f"*{Path(REPO).name}*/lfs/objects/*/*/*")
    max(objects, key=lambda path: path.stat().st_size).unlink()  # a shard
    hub.faults = None
    assert main(arguments) == 4  # said, and forgotten
    assert main(arguments) == 0
    assert main(["verify", REPO]) == 0


def test_ranges_that_break_off_are_gone_on_with(hub: Server, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, release={"repo": REPO, "quants": [], "license": "mit"})
    broken: list[str] = []

    def breaks(number: int, request: Any) -> Fault | None:
        """Every third range of weights breaks off, and every seventh is refused."""
        if request.method != "GET" or not request.url.path.endswith(".safetensors"):
            return None
        broken.append(request.headers.get("range", ""))
        if len(broken) % 7 == 0:
            return Fault(status=503, retry_after=0)
        return Fault(drop=1000) if len(broken) % 3 == 0 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge.download.PAUSE", 0.01)
        hub.faults = breaks
        assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--publish", "--max-disk", ROOM]) == 0
    hub.faults = None
    assert main(["verify", REPO]) == 0


def test_a_bit_that_flips_in_a_range_is_found_by_verify(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, release={"repo": REPO, "quants": [], "license": "mit"})
    flipped: list[str] = []

    def flip(number: int, request: Any) -> Fault | None:
        """One bit of the first range that is an expert's whole matrix; no checksum tells of it."""
        first, _, last = request.headers.get("range", "bytes=0-0").removeprefix("bytes=").partition("-")
        if "/src/m1/" not in request.url.path or flipped or int(last) - int(first) + 1 != 2 * 256 * 768:
            return None
        flipped.append(request.headers["range"])
        return Fault(damage="answer")

    hub.faults = flip
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--publish", "--max-disk", ROOM]) == 0
    hub.faults = None
    assert flipped
    assert main(["verify", REPO]) == 1
    said = capsys.readouterr().out
    assert said.count("differs from") == 1 and "of src/m1" in said


def test_a_tensor_that_comes_otherwise_the_second_time_is_refused(hub: Server, tmp_path: Path) -> None:
    sources = Sources(tmp_path, endpoint=hub.endpoint, token=hub.token())
    there = sources.open(parse_reference("src/m1"))
    name = "model.layers.1.mlp.up_proj.weight"
    for expected in (None, "came otherwise than the first time"):
        ranged = sources.ranged({}, {"x": there}, tmp_path / "ranges", 1 << 20)["x"]
        assert ranged.ranges is not None
        ranged.ranges.clear()  # what was fetched went to make room
        if expected is None:
            open_files({"x": ranged})["x"].flat(name, 0, 10)
            hub.faults = lambda number, request: Fault(damage="answer") if request.method == "GET" else None
        else:
            with pytest.raises(SourceError, match=expected):
                open_files({"x": ranged})["x"].flat(name, 0, 10)


def _build(recipe: str, out: str, endpoint: str, token: str, cache: str) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = cache
    options = {"endpoint": endpoint, "token": token}
    build_and_publish(
        load_recipe(Path(recipe)), Sources(Path(recipe).parent, **options), Path(out), max_disk=ROOM, **options
    )


@pytest.mark.slow
def test_a_bounded_build_that_is_killed_makes_only_what_is_missing(hub: Server, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    arguments = (str(recipe), str(out), hub.endpoint, hub.token(), str(tmp_path / "cache" / "hub"))
    context = multiprocessing.get_context("spawn")
    sent: list[int] = []
    for _ in range(6):
        process = context.Process(target=_build, args=arguments)
        process.start()
        # Killed once more files have gone up than the time before.
        while process.is_alive() and len(hub.log.all("PUT", "/storage/")) <= len(sent):
            time.sleep(0.02)
        if not process.is_alive():
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        sent = [each.number for each in hub.log.all("PUT", "/storage/")]
    _build(*arguments)
    puts = [each.path for each in hub.log.all("PUT", "/storage/") if each.status == 200]
    assert len(puts) == len(set(puts))  # nothing went up twice
    assert "model.safetensors.index.json" in tree(hub, REPO)


@pytest.mark.parametrize("mode", ["random", "hidden"])
def test_a_4x7b_in_bf16_with_three_quants_is_planned_within_14_gb(mode: str, root: Path) -> None:
    recipe = root / "recipes/Beyonder-4x7B-v3.yaml"
    text = recipe.read_text() + f"\nrelease: {{quants: [BF16, Q8_0, Q4_K_M]}}\ngate_mode: {mode}\n"
    loaded = parse_recipe(text.encode(), recipe)
    plan = planned(loaded, root / "tests/data/models")
    assert len(plan.quants) == 3
    bounded = plan_bounded(plan, parse_size("14GB"))
    assert bounded.disk_bytes <= 14_000_000_000
    assert all(item.bytes <= 2_100_000_000 for item in bounded.schedule.items if not item.name.endswith(".twin"))
    # Of an expert that is not the base only the MLPs are read, each byte once.
    whole = bytes_of(
        [(key, name) for key, source in plan.sources.items() for name in source.tensors or {}], plan.sources
    )
    for key, source in plan.sources.items():
        read = {(key, tensor) for item in bounded.schedule.items for owner, tensor in item.reads if owner == key}
        share = bytes_of(read, plan.sources) / bytes_of([(key, name) for name in source.tensors or {}], plan.sources)
        assert share <= 0.78 or key == plan.base
    assert bounded.download <= 0.85 * whole
    with pytest.raises(UsageError, match="GB are needed"):
        plan_bounded(plan, parse_size("1GB"))


def test_what_a_discriminant_router_costs_on_a_small_disk_is_in_the_preview(root: Path) -> None:
    recipe = root / "recipes/Beyonder-4x7B-v3.yaml"

    def findings(prompt: str, **build: str) -> dict[str, str]:
        loaded = parse_recipe(
            re.sub(r'prompts: \["(\w+).*', rf'prompts: ["\1 {prompt}"]', recipe.read_text()).encode()
            + f"\ngate_mode: discriminant\nrelease: {{quants: [Q8_0]}}\nbuild: {build}\n".encode(),
            recipe,
        )
        preview = preview_of(planned(loaded, root / "tests/data/models"), loaded, str(recipe))
        return {finding.id: finding.text for finding in preview.findings}

    sentence = "this is a whole sentence of far more than seven words"
    found = findings("code", max_disk="14GB")
    assert "by a model of 14.5 GB, which must fit on the disk" in found["too-little-disk"]
    found = findings(sentence, max_disk="14GB")
    assert "too-little-disk" not in found and "more than all sources have (57.9 GB)" in found["read-again"]
    assert not {"too-little-disk", "read-again"} & findings("code", max_disk="60GB").keys()


def test_sizes_are_read_as_people_write_them() -> None:
    assert (parse_size("14GB"), parse_size("1.5 gb"), parse_size("2GiB"), parse_size("10")) == (
        14_000_000_000, 1_500_000_000, 2 << 30, 10,
    )  # fmt: skip
    with pytest.raises(UsageError, match="not a size"):
        parse_size("plenty")
