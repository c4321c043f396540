"""Publishing beside plain `upload_folder`, bytes downloaded beside whole repositories, and disk beside the promise.

    python -m benchmarks.publish_speed [throughput] [downloads] [promise] [--mb N] [--rounds N]

The embedded Hub runs as a process of its own. Both sides send the same files through the same client to new repositories, in
alternating order; ours also compares, verifies and tags.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from huggingface_hub import HfApi, constants

from benchmarks.publish_faults import REPO, make_build
from bot.disk import parse_size, plan_bounded
from bot.publish import publish
from merge.ranged import bytes_of
from merge.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
TOKEN = "me:admin=*:hf_benchmark"  # noqa: S105 - of a Hub that lives for this run


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """An embedded Hub in a process of its own; its address."""
    command = [sys.executable, "-m", "bot", "hub", "--port", "0", "--root", str(folder), "--token", TOKEN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            for word in line.split():
                if word.startswith("http://127.0.0.1"):
                    threading.Thread(target=process.stdout.read, daemon=True).start()
                    yield word.rstrip(".,/")
                    return
        raise RuntimeError("the embedded Hub did not start")
    finally:
        process.terminate()
        process.wait()


def throughput(megabytes: int, rounds: int, folder: Path) -> None:
    """Seconds of both sides for the same files."""
    out = make_build(folder / "out", 1, size=megabytes * 1_000_000 // 3)
    size = sum(path.stat().st_size for name in ("model", "gguf") for path in (out / name).iterdir())
    with hub(folder / "hub") as endpoint:
        api = HfApi(endpoint=endpoint, token="hf_benchmark")  # noqa: S106

        def plain() -> None:
            for name in ("gguf", "model"):
                api.create_repo(f"me/Plain-{name}")
                api.upload_folder(repo_id=f"me/Plain-{name}", folder_path=out / name)

        def ours() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                publish(out, token="hf_benchmark", endpoint=endpoint)  # noqa: S106

        sides: list[tuple[str, Callable[[], None], list[float]]] = [
            ("moerge publish", ours, []),
            ("upload_folder, twice", plain, []),
        ]
        for number in range(rounds + 1):
            for _, side, seconds in sides if number % 2 else sides[::-1]:
                os.sync()
                started = time.monotonic()
                side()
                if number:  # the first round warms the files
                    seconds.append(time.monotonic() - started)
            for repo in (REPO, f"{REPO}-GGUF", "me/Plain-model", "me/Plain-gguf"):
                api.delete_repo(repo)
    print(f"{size / 1e6:,.0f} MB, 2 repositories; {rounds} rounds, medians\n")
    print("| | seconds | MB/s | lowest to highest, s |\n|---|---|---|---|")
    for name, _, seconds in sides:
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.2f} | {size / 1e6 / middle:.0f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    ratio = statistics.median(b / a for a, b in zip(sides[0][2], sides[1][2], strict=True))
    print(f"\nThroughput, ours over plain (median of the rounds' own): {ratio:.2f}\n")


def downloads() -> None:
    """What a 4x7B reads of its sources, from headers."""
    from tests.headers import planned

    path = ROOT / "recipes/Beyonder-4x7B-v3.yaml"
    plans = {}
    for mode in ("random", "hidden", "discriminant"):
        text = f"{path.read_text()}\nrelease: {{quants: [BF16, Q8_0, Q4_K_M]}}\ngate_mode: {mode}\n"
        plans[mode] = planned(parse_recipe(text.encode(), path), ROOT / "tests/data/models")
    plan = plans["hidden"]
    whole = {
        key: bytes_of([(key, x) for x in source.tensors or {}], plan.sources) for key, source in plan.sources.items()
    }
    items = plan_bounded(plan, parse_size("14GB")).schedule.items
    print(
        "| Beyonder-4x7B, BF16, Q8_0, Q4_K_M; gates hidden, 14GB | bytes read | of the whole repository |\n|---|---|---|"
    )
    for key, source in plan.sources.items():
        names = {name for item in items for owner, name in item.reads if owner == key}
        count = bytes_of([(key, name) for name in names], plan.sources)
        role = " (base)" if key == plan.base else ""
        print(f"| {source.name}{role} | {count / 1e9:.2f} GB | {count / whole[key]:.3f} |")
    print(
        "\n| gates | --max-disk | promised | downloads, GB | of the repositories | files |\n|---|---|---|---|---|---|"
    )
    for mode, room in [(mode, room) for mode in plans for room in ("8GB", "14GB", "25GB", "60GB")]:
        bounded = plan_bounded(plans[mode], parse_size(room))
        files = sum(item.layer is None for item in bounded.schedule.items)
        print(
            f"| {mode} | {room} | {bounded.disk_bytes / 1e9:.2f} GB | {bounded.download / 1e9:.1f} | "
            f"{bounded.download / sum(whole.values()):.3f} | {files} |"
        )
    print()


def promise(folder: Path) -> None:
    """A bounded build of small models: bytes that went over the line, and the disk as sampled, beside what was promised."""
    from bot.cli import main
    from bot.preview import plan_recipe
    from merge.recipe import load_recipe
    from merge.sources import Sources
    from tests.dense import recipe_text, save_dense

    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 8}
    constants.HF_HUB_CACHE = str(folder / "cache" / "hub")
    with hub(folder / "small") as endpoint:
        api = HfApi(endpoint=endpoint, token="hf_benchmark")  # noqa: S106
        for number in range(3):
            model = save_dense(folder / f"m{number}", seed=number, model_type="mistral", **shape)
            api.create_repo(f"me/m{number}")
            api.upload_folder(repo_id=f"me/m{number}", folder_path=model)
            shutil.rmtree(model)
        recipe = folder / "recipe.yaml"
        release = {"repo": "me/Small-3x200M", "quants": ["BF16", "Q8_0", "Q4_K_M"], "license": "mit"}
        recipe.write_text(recipe_text("me/m0", [f"me/m{n}" for n in range(3)], release=release))
        os.environ.update({"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_benchmark"})
        plan = plan_recipe(load_recipe(recipe), Sources(folder, endpoint=endpoint, token="hf_benchmark"))  # noqa: S106
        print(
            "| bounded build, 3 models of Mistral's shape | promised, MB | largest sampled, MB | downloads, MB | ratio to whole |"
        )
        print("|---|---|---|---|---|")
        whole = sum(size for source in plan.sources.values() for size in source.files.values())
        for room in ("400MB",):
            bounded = plan_bounded(plan, parse_size(room))
            out = folder / f"out-{room}"
            with (
                watched(out, folder / "cache") as peak,
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                assert main(["build", str(recipe), "--out", str(out), "--publish", "--max-disk", room]) == 0
            print(
                f"| --max-disk {room} | {bounded.disk_bytes / 1e6:.0f} | {max(peak) / 1e6:.0f} | "
                f"{bounded.download / 1e6:.0f} | {bounded.download / whole:.3f} |"
            )
            for repo in ("me/Small-3x200M", "me/Small-3x200M-GGUF"):
                api.delete_repo(repo)
            shutil.rmtree(out)
    print(f"\nThe three repositories together: {whole / 1e6:.0f} MB.")


@contextlib.contextmanager
def watched(*folders: Path) -> Iterator[list[int]]:
    """The bytes that the files in some folders take, sampled every 20 ms."""
    seen, stop = [0], threading.Event()

    def run() -> None:
        while not stop.wait(0.02):
            total = 0
            for folder in folders:
                for path, _, names in os.walk(folder):
                    for name in names:
                        with contextlib.suppress(OSError):
                            total += (Path(path) / name).stat().st_blocks * 512
            seen.append(total)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=("throughput", "downloads", "promise", []), help="default: all")
    parser.add_argument("--mb", type=int, default=450)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HUB_CACHE = f"{folder}/cache"
        for part in args.parts or ("throughput", "downloads", "promise"):
            if part == "throughput":
                throughput(args.mb, args.rounds, Path(folder))
            elif part == "downloads":
                downloads()
            else:
                promise(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
