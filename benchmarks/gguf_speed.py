"""GGUF files beside `cp` and llama.cpp's converter and quantiser: seconds and peak memory, side by side.

    python -m benchmarks.gguf_speed [MODEL] [--gigabytes 3] [--peer FOLDER] [--rounds 3] [--quants]

MODEL is a checkpoint folder; without it one of about that many gigabytes is made of random weights (Mixtral, 8 experts). The
work is the BF16 file, or with --quants Q8_0, Q5_K_M and Q4_K_M. The peer is llama.cpp as benchmarks/llama_cpp.py has it. In
each round all run one after the other, in an order that turns, from a source in the page cache and with nothing left to write
back, each timed to the end of `sync`. Figures are medians over the rounds, ratios medians of each round's ratio. Writing alone
is timed: neither converter nor quantiser proves its files. What our proof takes beside it is measured once, at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gates_vs_mergekit import machine, put_section, today
from benchmarks.llama_cpp import add_peer_option, peer
from tests.quants.tiny import config, write_model

QUANTS = ("Q8_0", "Q5_K_M", "Q4_K_M")
OURS = """
import sys, time
from pathlib import Path
from bot.quants import open_model
from quants.build import quantize
from quants.metadata import folder_info
folder, out, types, prove = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:] == ["prove"]
model, started = open_model(folder), time.monotonic()
info = folder_info(folder)
files = quantize(model.config, model.tensors, model.contents, folder, out, "model", types, info, prove=prove)
print(time.monotonic() - started - files[0].seconds)
"""


def timed(*commands: Sequence[str]) -> tuple[float, float]:
    """Seconds that the commands take one after the other and until all is on the disk, and the most memory that one of them
    holds, in GB."""
    os.sync()
    started, most = time.monotonic(), 0
    for command in commands:
        process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            most = max(most, high_water(process.pid))
            time.sleep(0.01)
        if process.returncode:
            sys.exit(f"{' '.join(command[:3])} … ended with {process.returncode}")
    os.sync()
    return time.monotonic() - started, most / 1e9


def high_water(pid: int) -> int:
    """Bytes: the most memory that a process has held so far; 0 where it is over. (What `wait4` tells is at least its parent's.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def synthetic(folder: Path, gigabytes: float) -> Path:
    """A Mixtral of eight experts with about this size in BF16."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (8 * 3 * 1024 * 3584)))
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8, "vocab_size": 4096}
    return write_model(folder, config(num_hidden_layers=layers, **sizes))


def rounds_of(works: dict[str, Callable[[], tuple[float, float]]], count: int) -> dict[str, list[tuple[float, float]]]:
    """What each work took, by round."""
    names = list(works)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(count):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(works[name]())
            print(f"{name}: {found[name][-1][0]:.2f} s, {found[name][-1][1]:.2f} GB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    add_peer_option(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quants", action="store_true", help="Q8_0, Q5_K_M and Q4_K_M instead of BF16")
    args = parser.parse_args()
    tools = peer(args.peer)
    threads = str(len(os.sched_getaffinity(0)))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        model = args.model or synthetic(Path(scratch) / "model", args.gigabytes)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
        types = QUANTS if args.quants else ("BF16",)
        bf16 = str(out / "peer.gguf")
        convert = [*tools.converter, str(model), "--outfile", bf16, "--outtype", "bf16"]
        quantise = [[str(tools.quantise), bf16, str(out / f"{name}.gguf"), name, threads] for name in QUANTS]
        ours = [sys.executable, "-c", OURS, str(model), str(out), ",".join(types)]

        def work(*commands: Sequence[str]) -> Callable[[], tuple[float, float]]:
            def run() -> tuple[float, float]:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                for path in model.glob("*.safetensors"):
                    subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
                return timed(*commands)

            return run

        works = {"moerge": work(ours)}
        if args.quants:
            works["converter and three times llama-quantize"] = work(convert, *quantise)
        else:
            works["`cp -r --reflink=never` of the checkpoint"] = work(
                ["cp", "-r", "--reflink=never", str(model), str(out / "copy")]
            )
            works["converter"] = work(convert)
        found = rounds_of(works, args.rounds)
        shutil.rmtree(out)
        proved = subprocess.run([*ours, "prove"], stdout=subprocess.PIPE, text=True, check=True)
    proof = float(proved.stdout)
    name = args.model.name if args.model else f"a Mixtral of {size:.1f} GB"
    heading = f"## GGUF of {name}: {', '.join(types)}"
    command = f"python -m benchmarks.gguf_speed{' --quants' if args.quants else ''}{' MODEL' if args.model else ''}"
    lines = [
        heading, "",
        f"`{command}`, {today()}, {machine()}, load by other work {load:.1f}; {size:.2f} GB of weights, {threads} threads;",
        f"medians of {args.rounds} rounds, seconds to the end of `sync`, writing alone; the proof takes {proof:.1f} s beside it.", "",
        "| | s | lowest-highest | times ours | peak memory, GB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for label, took in found.items():
        seconds = [of[0] for of in took]
        ratio = statistics.median(other / mine[0] for other, mine in zip(seconds, found["moerge"], strict=True))
        lines.append(
            f"| {label} | {statistics.median(seconds):.1f} | {min(seconds):.1f}-{max(seconds):.1f} | {ratio:.2f} "
            f"| {max(of[1] for of in took):.2f} |"
        )
    put_section(heading, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
