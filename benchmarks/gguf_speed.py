"""GGUF files beside `cp` and llama.cpp's converter and quantiser, seconds and memory: `make bench-gguf`.

    python -m benchmarks.gguf_speed [--demo MODEL] [--gigabytes 3] [--peer FOLDER] [--rounds 3] [--quant-rounds 1]

Two models: the demo's (made of its sources unless a checkpoint folder is given) and one of about that many gigabytes with
random weights (Mixtral, 8 experts), for which 12 GB of disk are needed. Of both the BF16 file is made; of the large one also
Q8_0, Q5_K_M and Q4_K_M, by us in one pass over the checkpoint. The peer is llama.cpp as benchmarks/llama_cpp.py has it. In
each round all run one after the other, in an order that turns, from a source in the page cache and with nothing left to write
back, each timed to the end of `sync`. RssAnon is summed over the process tree every 50 ms. Figures are medians over the
rounds, ratios medians of each round's ratio. Writing alone is timed: neither converter nor quantiser proves its files. What
our proof takes beside it is measured once, at the end. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gates_vs_mergekit import ROOT, machine, put_section, today
from benchmarks.llama_cpp import Peer, add_peer_option, peer
from benchmarks.merge_speed import Run, measure, ours, recipe, table, warm
from demo.models import make_models
from tests.quants.tiny import config, write_model

HEADING = "## GGUF: speed and memory"
QUANTS = ("Q8_0", "Q5_K_M", "Q4_K_M")
QUANTIZE = """
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
# What a row is made of: commands that run one after the other.
Commands = list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="MODEL", help="the checkpoint of the demo, or another small one")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    add_peer_option(parser)
    parser.add_argument("--rounds", type=int, default=3, help="of the BF16 files (default: 3)")
    parser.add_argument(
        "--quant-rounds", type=int, default=1, help="of the quantised files (default: 1); 0 leaves them out"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-gguf", help="removed at the end")
    args = parser.parse_args()
    tools, load, work = peer(args.peer), os.getloadavg()[0], args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        small = args.demo or demo_model(work)
        lines = bf16(f"The demo's model, {gigabytes(small):.2f} GB", small, tools, work, args.rounds)
        large = synthetic(work / "large", args.gigabytes)
        named = f"A Mixtral of {gigabytes(large):.1f} GB"
        lines += bf16(named, large, tools, work, args.rounds)
        if args.quant_rounds:
            lines += quants(named, large, tools, work, args.quant_rounds)
    finally:
        shutil.rmtree(work)
    intro = [
        f"`make bench-gguf`, {today()}, {machine()}, load by other work {load:.1f}; medians of {args.rounds} rounds (quantised files:",
        f"{args.quant_rounds}), {threads()} threads, writing alone, seconds to the end of `sync`; ratio: seconds over those of the first row,",
        "median of the rounds' own; memory: the highest sum of RssAnon.",
        "",
    ]
    put_section(HEADING, [HEADING, "", *intro, *lines])
    print("\n".join((HEADING, "", *intro, *lines)))


def bf16(named: str, model: Path, tools: Peer, work: Path, rounds: int) -> list[str]:
    """The table of the BF16 file."""
    out = work / "out"
    works = {
        "moerge": [quantize(model, out, ["BF16"])],
        "`cp -r --reflink=never` of the checkpoint": [["cp", "-r", "--reflink=never", str(model), str(out / "copy")]],
        "convert_hf_to_gguf.py": [convert(tools, model, out)],
    }
    found = alternate(works, model, out, rounds)
    shutil.rmtree(out)
    proved = subprocess.run(
        [*quantize(model, out, ["BF16"]), "prove"], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return table(f"{named}: BF16; our proof takes {float(proved.stdout):.1f} s beside it", found)


def quants(named: str, model: Path, tools: Peer, work: Path, rounds: int) -> list[str]:
    """The table of the quantised files."""
    out = work / "out"
    quantise = [
        [str(tools.quantise), str(out / "peer.gguf"), str(out / f"{name}.gguf"), name, threads()] for name in QUANTS
    ]
    works = {
        "moerge": [quantize(model, out, QUANTS)],
        "convert_hf_to_gguf.py and three times llama-quantize": [convert(tools, model, out), *quantise],
    }
    return table(f"{named}: {', '.join(QUANTS)}", alternate(works, model, out, rounds))


def quantize(model: Path, out: Path, types: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", QUANTIZE, str(model), str(out), ",".join(types)]


def convert(tools: Peer, model: Path, out: Path) -> list[str]:
    return [*tools.converter, str(model), "--outfile", str(out / "peer.gguf"), "--outtype", "bf16"]


def alternate(works: dict[str, Commands], model: Path, out: Path, rounds: int) -> dict[str, list[Run]]:
    """Each row once in each round, the order turned by one from round to round."""
    names = list(works)
    found: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            warm([model])
            os.sync()
            begun = time.perf_counter()
            most = max(measure(command).anonymous for command in works[name])
            os.sync()
            found[name].append(Run(time.perf_counter() - begun, most))
            print(f"{name}: {found[name][-1]}", flush=True)
    return found


def demo_model(work: Path) -> Path:
    """The demo's mixture of its four sources, with random gates: what they are takes no part in the time."""
    out = work / "demo"
    path = recipe(work / "demo.yaml", list(make_models(ROOT / "build" / "models").values()), "random")
    subprocess.run(ours(path, out), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return out


def synthetic(folder: Path, size: float) -> Path:
    """A Mixtral of eight experts with about `size` gigabytes in BF16."""
    layers = max(1, round(size * 1e9 / 2 / (8 * 3 * 1024 * 3584)))
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8, "vocab_size": 4096}
    return write_model(folder, config(num_hidden_layers=layers, **sizes))


def gigabytes(model: Path) -> float:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9


def threads() -> str:
    return str(len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
