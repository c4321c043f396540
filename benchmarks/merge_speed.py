"""Speed and memory of a merge beside `cp` and mergekit-moe: `make bench-merge`, or `python -m benchmarks.merge_speed`.

Models with random weights are made under build/bench-merge and removed at the end; 21 GB of disk are needed. The five models
of a recipe are three, two of them under two names. In each round the commands run one after the other, in an order that turns
from round to round, each from sources in the page cache and with nothing left to write back, each timed to the end of `sync`.
RssAnon is summed over the process tree every 50 ms. Seconds are medians over the rounds, the ratio is the median of each
round's ratio, memory the highest. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gates_vs_mergekit import ROOT, machine, peer_environment, put_section, today
from benchmarks.merge_models import Shape, make_model

HEADING = "## Merge: speed and memory"
# The result of LARGE is ten times that of SMALL, in bytes.
LARGE, SMALL, WIDE = Shape(22), Shape(2, hidden=1792, intermediate=3584), Shape(11, dtype="float32")
# What a merge may take beside the weights of its calibration.
LIMIT = 500e6
PROMPTS = (
    "Write a function that sorts a list.",
    "Bonjour, comment allez-vous ?",
    "Solve the equation.",
    "Hello, how are you today?",
    "Why is the sky blue?",
)
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One command: seconds to the end of `sync`, and the largest sum of its processes' RssAnon, in bytes."""

    seconds: float
    anonymous: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an environment that has mergekit 0.1.5 (default: one is made)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-merge")
    args = parser.parse_args()
    peer = peer_environment(args.peer or ROOT / "build" / "peers" / "mergekit").parent / "mergekit-moe"
    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    try:
        small, large = made(work / "small", SMALL), made(work / "large", LARGE)
        lines = [
            *starts(work, small),
            *copies(work, small, peer, args.rounds),
            *copies(work, large, peer, args.rounds),
            *gates(work, large, peer),
        ]
        shutil.rmtree(work / "small")
        shutil.rmtree(work / "large")
        lines += casts(work, args.rounds)
    finally:
        shutil.rmtree(work)
    intro = [
        f"`make bench-merge`, {today()}, {machine()}, load by other work {load:.1f}; {args.rounds} rounds, medians; seconds to the",
        "end of `sync`; ratio: seconds over those of the first row, median of the rounds' own; memory: the highest sum of RssAnon.",
        "",
    ]
    put_section(HEADING, [HEADING, "", *intro, *lines])
    print("\n".join(lines))
    return 0


def made(folder: Path, shape: Shape) -> list[Path]:
    """Five models: three, two of them under two names."""
    models = [make_model(folder / f"m{n}", shape, seed=n) for n in range(3)]
    for n in (3, 4):
        models.append(folder / f"m{n}")
        models[n].symlink_to(models[n - 3])
    return models


def copies(work: Path, models: list[Path], peer: Path, rounds: int) -> list[str]:
    """The merge that is a copy: ours, cp's, the peer's."""
    random, kept = recipe(work / "random.yaml", models, "random"), work / "kept"
    subprocess.run(ours(random, kept), check=True, capture_output=True, cwd=ROOT)
    commands = {
        "`moerge merge`": ours(random, work / "out"),
        "`cp -r --reflink=never` of the result": ["cp", "-r", "--reflink=never", str(kept), str(work / "out")],
        "mergekit-moe": [str(peer), str(random), str(work / "out")],
    }
    found = alternate(commands, [*models[:3], kept], work, rounds)
    result = size_of(kept)
    shutil.rmtree(kept)
    title = f"five models of {size_of(models[0]) / 1e9:.2f} GB, {result / 1e9:.2f} GB out, gates random"
    return table(title, found, result)


def gates(work: Path, models: list[Path], peer: Path) -> list[str]:
    """Gates from prompts, once: what they take is the forward pass."""
    hidden, fitted = (recipe(work / f"{mode}.yaml", models, mode) for mode in ("hidden", "discriminant"))
    commands = {
        "`moerge merge`, `hidden`": ours(hidden, work / "out"),
        "mergekit-moe, `hidden`": [str(peer), str(hidden), str(work / "out")],
        "`moerge merge`, `discriminant`": ours(fitted, work / "out"),
    }
    found = alternate(commands, models[:3], work, 1)
    h, i = LARGE.hidden, LARGE.intermediate
    expert = 2 * 3 * h * i
    layer = 2 * 4 * h * h + expert
    title = (
        f"the same once, gates from five short prompts (500 MB, a layer of the base and an expert are "
        f"{(LIMIT + layer + expert) / 1e6:.0f} MB)"
    )
    return table(title, found)


def casts(work: Path, rounds: int) -> list[str]:
    """F32 sources, a BF16 result, against cp of the sources."""
    models = [make_model(work / f"w{n}", WIDE, seed=n) for n in range(2)]
    cast = recipe(work / "cast.yaml", models, "random")
    inputs = [str(model) for model in models]
    commands = {
        "`moerge merge`": ours(cast, work / "out"),
        "`cp -r --reflink=never` of the inputs": ["cp", "-r", "--reflink=never", *inputs, str(work / "out")],
    }
    found = alternate(commands, models, work, rounds)
    return table(f"two F32 models of {size_of(models[0]) / 1e9:.2f} GB, BF16 out, gates random", found)


def starts(work: Path, models: list[Path]) -> list[str]:
    """Until the first byte of a merge, and the commands that only look."""
    path, out = recipe(work / "start.yaml", models, "random"), work / "out"
    warm(models)
    first = []
    for _ in range(5):
        begun = time.perf_counter()
        process = subprocess.Popen(ours(path, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and not any(x.stat().st_size for x in work.glob("out.partial/model*")):
            time.sleep(0.001)
        first.append(time.perf_counter() - begun)
        process.wait()
        shutil.rmtree(out)
    command = [sys.executable, "-m", "bot"]
    shown = {
        "`moerge --help`": [*command, "--help"],
        "`moerge preview` of that recipe": [*command, "preview", str(path)],
    }
    rows = [f"| `moerge merge`, gates random: recipe to first byte written | {statistics.median(first):.2f} |"]
    for name, line in shown.items():
        seconds = [measure(line).seconds for _ in range(5)]
        rows.append(f"| {name} | {statistics.median(seconds):.2f} |")
    return ["| start-up, median of 5 | s |", "|---|---|", *rows, ""]


def ours(path: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "bot", "merge", str(path), str(out), "--device", "cpu"]


def recipe(path: Path, models: list[Path], mode: str) -> Path:
    experts = [{"source_model": str(model), "positive_prompts": [PROMPTS[n]]} for n, model in enumerate(models)]
    # JSON is YAML.
    path.write_text(
        json.dumps({"base_model": str(models[0]), "gate_mode": mode, "dtype": "bfloat16", "experts": experts})
    )
    return path


def alternate(commands: dict[str, list[str]], read: list[Path], work: Path, rounds: int) -> dict[str, list[Run]]:
    """Each command once in each round, the order turned by one from round to round."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(work / "out", ignore_errors=True)
            if commands[name][0] == "cp" and len(commands[name]) > 5:
                (work / "out").mkdir()
            cold([folder for folder in read if folder not in reads_of(name, read)])
            warm(reads_of(name, read))
            os.sync()
            found[name].append(measure(commands[name], os.sync))
            print(f"{name}: {found[name][-1]}", flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    return found


def measure(command: list[str], settle: Callable[[], None] = lambda: None) -> Run:
    """Run a command to the end of `settle`, and sample its memory meanwhile."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    peak = [0]

    def sample() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], anonymous(process.pid))
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, error = process.communicate()
    settle()
    seconds = time.perf_counter() - begun
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{error.decode()[-2000:]}")
    return Run(seconds, peak[0])


def anonymous(pid: int) -> int:
    """RssAnon of a process and all below it, in bytes; what has ended meanwhile counts nothing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        total = next((int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("RssAnon")), 0)
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        return 0
    return total


def warm(folders: list[Path]) -> None:
    """Bring files into the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def cold(folders: list[Path]) -> None:
    """Take files out of the page cache, which does not hold the sources and the result of two merges."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reads_of(name: str, folders: list[Path]) -> list[Path]:
    """What a command reads: `cp` of the result its copy, which is the last, and the others everything else."""
    if not any(folder.name == "kept" for folder in folders):
        return folders
    return folders[-1:] if "of the result" in name else folders[:-1]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def table(title: str, found: dict[str, list[Run]], result: int | None = None) -> list[str]:
    """One table; with `result`, the bytes written, also seconds per GB."""
    first = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        seconds = statistics.median(run.seconds for run in runs)
        ratio = statistics.median(run.seconds / own.seconds for run, own in zip(runs, first, strict=True))
        spread = f"{min(run.seconds for run in runs):.1f}-{max(run.seconds for run in runs):.1f}"
        per_gb = f" {seconds / (result / 1e9):.2f} |" if result else ""
        memory = max(run.anonymous for run in runs) / 1e6
        rows.append(f"| {name} | {seconds:.1f} | {spread} |{per_gb} {ratio:.2f} | {memory:.0f} |")
    per_gb = " s per GB out |" if result else ""
    columns = 6 if result else 5
    heads = [f"| | s | lowest-highest |{per_gb} ratio | memory, MB |", "|---" * columns + "|"]
    return [f"{title[0].upper()}{title[1:]}:", "", *heads, *rows, ""]


if __name__ == "__main__":
    sys.exit(main())
