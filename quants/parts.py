"""A split GGUF file written one part at a time, for machines that cannot hold all of it.

A part's blocks are checked as soon as it is written. That the whole runs is shown with a twin of the first layers, made of the
same expressions in the same types: the same blocks. Larger machines load the file itself (quants.proof).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf

from merge.errors import ProofError
from quants.layout import GgufTensor
from quants.proof import Proof, generate
from quants.rows import Contents
from quants.split import SplitFile
from quants.structure import check
from quants.writer import Importance, OpenTarget, begin, destination, shard_metadata, write_tensors


def write_part(
    split: SplitFile,
    index: int,
    metadata: Mapping[str, Any],
    contents: Contents,
    importance: Importance | None,
    progress: Callable[[int], None] = lambda count: None,
    threads: int | None = None,
) -> Path:
    """Write part `index` (from 0) of a split file, and check its blocks. Raises DestinationError, SourceError, ProofError."""
    path, tensors = split.paths[index], split.parts[index]
    keys = shard_metadata(metadata, index, len(split.parts), len(split.layout.tensors))
    _write(split, tensors, keys, path, contents, importance, progress, threads)
    try:
        check([path], replace(split.layout, tensors=tensors), split.types)
    except ProofError:
        path.unlink(missing_ok=True)
        raise
    return path


def prove_with_twin(
    split: SplitFile,
    path: Path,
    metadata: Mapping[str, Any],
    contents: Contents,
    importance: Importance | None,
    first_layers: int,
    threads: int | None = None,
) -> Proof:
    """Write a file of the first layers alone to `path`, run it in llama.cpp, and remove it. Raises ProofError."""
    count = f"{split.layout.architecture}.block_count"
    keys = {**metadata, count: gguf.GGUFValue(split.twin_layers(first_layers), metadata[count].type)}
    try:
        _write(split, split.twin_tensors(first_layers), keys, path, contents, importance, lambda count: None, threads)
        return Proof("structural", generate(path, threads=threads))
    finally:
        path.unlink(missing_ok=True)


def _write(
    split: SplitFile,
    tensors: Sequence[GgufTensor],
    metadata: Mapping[str, Any],
    path: Path,
    contents: Contents,
    importance: Importance | None,
    progress: Callable[[int], None],
    threads: int | None,
) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(temporary.unlink, missing_ok=True)
        file = cleanup.enter_context(begin(split.types, tensors, metadata, path, temporary))
        part = replace(split.layout, tensors=tuple(tensors))
        target = OpenTarget(split.types, (file,))
        write_tensors(part, contents, [target], threads or len(os.sched_getaffinity(0)), progress, importance or {})
        with destination(path):
            temporary.rename(path)
