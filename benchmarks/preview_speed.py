"""How long a preview takes: the six community recipes in one command, from configs alone, beside an empty Python.

    python -m benchmarks.preview_speed

Writes its section of benchmarks/RESULTS.md. No peer previews a merge; the limit is the interpreter's own start.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.gates_vs_mergekit import ROOT, machine, put_section, today

RUNS = 7
RECIPES = (
    "Beyonder-4x7B-v3", "BurningBruce-005", "Raiden-16x3.43B", "Xwin-Pygmalion-2x7B", "clown-car-4x7B",
    "smol_llama-8x220M",
)  # fmt: skip


def seconds(command: Sequence[str]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    recipes = [f"recipes/{name}.yaml" for name in RECIPES]
    commands = {
        "an empty Python": [sys.executable, "-c", "pass"],
        "`moerge --help`": [sys.executable, "-m", "bot", "--help"],
        "`moerge preview` of the six": [
            sys.executable, "-m", "bot", "preview", "--models", "tests/data/models", *recipes,
        ],
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(RUNS + 1):
        for name, command in commands.items():
            spent = seconds(command)
            if run:  # the first run warms the disk's cache
                taken[name].append(spent)
    rows = [f"| {name} | {statistics.median(times):.2f} | {max(times):.2f} |" for name, times in taken.items()]
    heading = "## Preview of the six community recipes"
    lines = [
        heading,
        "",
        f"`python -m benchmarks.preview_speed`, {today()}, {machine()}; {RUNS} alternating runs, whole processes.",
        "",
    ]
    lines += ["| | median, s | slowest, s |", "|---|---|---|", *rows]
    print("\n".join(lines))
    put_section(heading, lines)


if __name__ == "__main__":
    main()
