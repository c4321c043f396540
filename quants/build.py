"""From a checkpoint, or the plan of one, to proven GGUF files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import DestinationError, MoergeError, UsageError
from merge.evaluate import Evaluator
from merge.expr import Expr
from quants.filetypes import FILE_TYPES, FileType, tensor_bytes
from quants.layout import Layout, gguf_layout
from quants.metadata import ModelInfo, gguf_metadata
from quants.proof import Generation, generate
from quants.tokenizer import read_vocabulary
from quants.writer import Progress, Target, write_ggufs


@dataclass(frozen=True, slots=True)
class QuantFile:
    """One finished file. `seconds` is the time of the pass that wrote it, shared by the files of one call."""

    path: Path
    file_type: str
    bytes: int
    seconds: float
    sha256: str
    proof: Generation | None


def file_types(names: Sequence[str]) -> list[FileType]:
    """The file types of these names, each once, in order. Raises UsageError for an unknown one."""
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        said = f"there is no GGUF file type {unknown[0]!r}" if unknown else "no GGUF file type is named"
        raise UsageError(f"{said}; known are {', '.join(FILE_TYPES)}")
    return [FILE_TYPES[name] for name in dict.fromkeys(names)]


def file_path(out_dir: Path, name: str, file_type: str) -> Path:
    """Where the file of a type goes: `<name>-Q4_K_M.gguf`. Raises UsageError where `name` is not one of a file."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise UsageError(f"{name!r} is not a name for a file")
    return out_dir / f"{name}-{file_type}.gguf"


def quantize(
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    out_dir: Path,
    name: str,
    types: Sequence[str],
    info: ModelInfo,
    *,
    progress: Progress | None = None,
    prove: bool = True,
    threads: int | None = None,
) -> list[QuantFile]:
    """Makes the GGUF files of `types` in one pass over the source, and proves each.

    `config` and `tensors` describe the checkpoint in its family's Hub layout (a plan's output, or
    merge.evaluate.checkpoint_expressions); the tokenizer's files are in `tokenizer_folder`. `progress` is called with the
    bytes of tensor data written since its last call, data_bytes in all. `prove` loads each file in llama.cpp and generates; a file that fails is
    removed. Raises SourceError, DestinationError or ProofError.
    """
    chosen = file_types(types)
    layout = gguf_layout(config, tensors)
    paths = [file_path(out_dir, name, file_type.name) for file_type in chosen]
    vocabulary = read_vocabulary(tokenizer_folder, embedding_rows(layout))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{out_dir}: cannot be made ({error.strerror})") from None
    targets = [
        Target(path, file_type, gguf_metadata(config, layout, vocabulary, info, file_type))
        for path, file_type in zip(paths, chosen, strict=True)
    ]
    started = time.monotonic()
    write_ggufs(layout, evaluator, targets, progress, threads)
    seconds = time.monotonic() - started
    return [_finished(target, seconds, prove, threads) for target in targets]


def embedding_rows(layout: Layout) -> int:
    """Rows of the token embedding: the number of tokens that a GGUF's vocabulary must have."""
    return layout.shapes["token_embd.weight"][0]


def data_bytes(layout: Layout, types: Sequence[str]) -> int:
    """Bytes of tensor data in the files of `types` together."""
    return sum(tensor_bytes(kind, shape) for kind, shape in _stored(layout, types))


def _stored(layout: Layout, types: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of every file."""
    for file_type in file_types(types):
        chosen = layout.types(file_type)
        yield from ((chosen[name], shape) for name, shape in layout.shapes.items())


def _finished(target: Target, seconds: float, prove: bool, threads: int | None) -> QuantFile:
    try:
        proof = generate(target.path, threads=threads) if prove else None
        with target.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, 2)
    except MoergeError:
        target.path.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise DestinationError(f"{target.path}: cannot be read back ({error.strerror})") from None
    return QuantFile(target.path, target.file_type.name, size, seconds, digest, proof)
