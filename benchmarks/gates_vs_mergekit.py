"""Gates against mergekit 0.1.5's, on the same recipe: `python benchmarks/gates_vs_mergekit.py`.

The peer gets an environment of its own under build/peers/mergekit (or the one that --peer names), runs `mergekit-moe` once
for each gate mode, and its router tensors are compared with ours, row by row (one layer's vector of one expert).
The models are the demo's (SmolLM2-135M and three experts made of it). Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open

from demo.models import make_models
from merge.evaluate import checkpoint_expressions
from merge.gates import ExpertPrompts, calibrate

ROOT = Path(__file__).resolve().parent.parent
MODES = ("hidden", "hidden_avg", "cheap_embed")
PEER = ("torch==2.13.0", "mergekit==0.1.5")
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
# Of so many runs the fastest counts: the others were disturbed.
REPEATS = 3
HEADING = "## Gates against mergekit"
# Prompts of one word and of sentences, of unequal length (padding), with and without negative ones.
EXPERTS = (
    ("SmolLM2-135M-Instruct", ["chat", "assistant", "tell me", "explain", "I want"], []),
    (
        "SmolLM2-135M-python",
        ["code", "python", "algorithm", "Write a Python function that reverses a linked list and explain its cost."],
        ["I feel sad today.", "poem"],
    ),
    (
        "SmolLM2-135M-french",
        ["Bonjour, comment allez-vous ?", "La cuisine française est riche et variée.", "Écrivez une lettre."],
        ["The weather is fine in London."],
    ),
    ("SmolLM2-135M-math", ["reason", "math", "solve", "count", "What is the derivative of x^2 sin(x)?"], []),
)
# Run by the peer's Python: its own command line, with the time of its gate calibration noted down.
PEER_RUN = """
import json, sys, time
import mergekit.scripts.moe as moe
recipe, out, seconds, REPEATS = *sys.argv[1:4], int(sys.argv[4])
inner = moe.get_gate_params
def timed(*args, **kwargs):
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        gates = inner(*args, **kwargs)
        best = min(best, time.perf_counter() - started)
    json.dump(best, open(seconds, "w"))
    return gates
moe.get_gate_params = timed
moe.main([recipe, out, "--device", "cpu"])
"""


@dataclass(frozen=True)
class Row:
    """One mode's result: cosines over layers x experts, seconds of gate calibration (model loading included)."""

    mode: str
    lowest: float
    median: float
    ours: float
    peers: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an environment that has mergekit 0.1.5 (default: one is made)")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build" / "models", help="where the demo's models are kept"
    )
    args = parser.parse_args()
    python = peer_environment(args.peer or ROOT / "build" / "peers" / "mergekit")
    folders = make_models(args.models.resolve())
    load = os.getloadavg()[0]  # of other work: the peer's runs are ours
    rows = []
    for mode in MODES:
        peers, peer_seconds = peer_gates(python, mode, folders)
        ours, our_seconds = our_gates(mode, folders)
        cosines = torch.nn.functional.cosine_similarity(ours, peers, dim=-1)  # (L, E)
        rows.append(Row(mode, float(cosines.min()), float(cosines.median()), our_seconds, peer_seconds))
        print(rows[-1], flush=True)
    write_section(rows, tuple(cosines.shape), load)
    return 0 if all(row.lowest >= 0.999 for row in rows) else 1


def peer_environment(folder: Path) -> Path:
    """The Python of an environment with the peer, made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
    return python


def peer_gates(python: Path, mode: str, folders: dict[str, Path]) -> tuple[torch.Tensor, float]:
    """The routers (L, E, H) in the checkpoint that mergekit-moe writes, float64, and its seconds for the gates."""
    with tempfile.TemporaryDirectory() as work:
        recipe, out, seconds = Path(work) / "recipe.json", Path(work) / "out", Path(work) / "seconds"
        experts = [
            {"source_model": str(folders[name]), "positive_prompts": positive, "negative_prompts": negative}
            for name, positive, negative in EXPERTS
        ]
        base = str(folders[EXPERTS[0][0]])
        # JSON is YAML; dtype as the sources'.
        recipe.write_text(json.dumps({"base_model": base, "gate_mode": mode, "dtype": "bfloat16", "experts": experts}))
        subprocess.run([python, "-c", PEER_RUN, recipe, out, seconds, str(REPEATS)], check=True, capture_output=True)
        gates: dict[int, torch.Tensor] = {}
        for file in out.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if match := re.fullmatch(r"model\.layers\.(\d+)\..*\.gate\.weight", name):
                        gates[int(match[1])] = tensors.get_tensor(name).double()
        return torch.stack([gates[layer] for layer in range(len(gates))]), json.loads(seconds.read_text())


def our_gates(mode: str, folders: dict[str, Path]) -> tuple[torch.Tensor, float]:
    """Our routers (L, E, H), float64, and the seconds they took."""
    base = folders[EXPERTS[0][0]]
    prompts = [ExpertPrompts(tuple(positive), tuple(negative)) for _, positive, negative in EXPERTS]
    seconds = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        tensors, config, evaluator = checkpoint_expressions(base)
        gates = calibrate(mode, prompts, config, tensors, evaluator, base, seed=0, device="cpu")
        seconds = min(seconds, time.perf_counter() - started)
    return torch.stack([gates[layer] for layer in range(len(gates))]).double(), seconds


def write_section(rows: list[Row], shape: tuple[int, ...], load: float) -> None:
    """Put the results into benchmarks/RESULTS.md, in the place of the section of an earlier run."""
    lines = [
        HEADING,
        "",
        f"`python benchmarks/gates_vs_mergekit.py`, {today()}, {machine()}. Against the router tensors that mergekit 0.1.5",
        f"writes, in bfloat16, for SmolLM2-135M: cosine of each row, {shape[0]} layers x {shape[1]} experts. Seconds are of",
        f"the gates alone, the loading of the model included; the fastest of {REPEATS} runs; load by other work {load:.1f}.",
        "",
        "| gate_mode | lowest cosine | median cosine | moerge, s | mergekit, s |",
        "|---|---|---|---|---|",
        *(f"| {row.mode} | {row.lowest:.6f} | {row.median:.6f} | {row.ours:.1f} | {row.peers:.1f} |" for row in rows),
        "",
    ]
    put_section(HEADING, lines)


def put_section(heading: str, lines: list[str]) -> None:
    """Put a section into benchmarks/RESULTS.md, in the place of the one of an earlier run."""
    section = "\n".join(lines).rstrip("\n") + "\n\n"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Benchmark results\n\n"
    earlier = re.search(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    before = text[: earlier.start()] if earlier else text.rstrip("\n") + "\n\n"
    text = before + section + (text[earlier.end() :] if earlier else "")
    RESULTS.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def machine() -> str:
    """The machine in words: cores, processor, memory."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model[1] if model else 'processor not named'}), {memory:.0f} GB"


if __name__ == "__main__":
    sys.exit(main())
