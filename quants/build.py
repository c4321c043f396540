"""From a checkpoint, or the plan of one, to proven GGUF files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import DestinationError, MoergeError, ProofError, UsageError
from merge.expr import Expr
from quants.families import first_moe_layer
from quants.filetypes import FILE_TYPES, FileType, tensor_bytes
from quants.imatrix import Imatrix, check_imatrix, save_imatrix
from quants.layout import Layout, gguf_layout
from quants.metadata import ModelInfo, gguf_metadata
from quants.rows import Contents
from quants.tokenizer import read_vocabulary
from quants.writer import Progress, Target, write_ggufs

if TYPE_CHECKING:
    from quants.proof import Proof


@dataclass(frozen=True, slots=True)
class Part:
    """A file on the disk: a whole GGUF file, or one part of a split one."""

    path: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class QuantFile:
    """One finished file, in one part or several. `seconds` is the time of the pass that wrote it, shared by the files of
    one call. `failure` says why it was not proven: then its parts are gone again."""

    file_type: str
    parts: tuple[Part, ...]
    seconds: float
    proof: Proof | None = None
    failure: str | None = None

    @property
    def path(self) -> Path:
        """The file that llama.cpp is given: the first part."""
        return self.parts[0].path

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


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
    contents: Contents,
    tokenizer_folder: Path,
    out_dir: Path,
    name: str,
    types: Sequence[str],
    info: ModelInfo,
    *,
    progress: Progress | None = None,
    prove: bool = True,
    threads: int | None = None,
    imatrix: Imatrix | None = None,
    max_bytes: int | None = None,
) -> list[QuantFile]:
    """Makes the GGUF files of `types` in one pass over the source, and proves each.

    `config` and `tensors` describe the checkpoint in its family's Hub layout (a plan's output, or
    merge.evaluate.checkpoint_expressions); the tokenizer's files are in `tokenizer_folder`. `progress` is called with the
    bytes of tensor data written since its last call, data_bytes in all. `prove` loads each file in llama.cpp and
    generates; a file that fails is removed, and says why. With `imatrix` the quantised types heed it, and it is stored
    beside them; with `max_bytes` files are split at that size. Raises SourceError or DestinationError.
    """
    chosen = file_types(types)
    layout = gguf_layout(config, tensors)
    if imatrix:
        check_imatrix(imatrix, layout)
    paths = [file_path(out_dir, name, file_type.name) for file_type in chosen]
    vocabulary = read_vocabulary(tokenizer_folder, embedding_rows(layout), layout.architecture)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{out_dir}: cannot be made ({error.strerror})") from None
    matrix = imatrix_path(out_dir, name)
    named = (matrix.name, imatrix) if imatrix else None
    targets = [
        Target(path, file_type, gguf_metadata(config, layout, vocabulary, info, file_type, named), max_bytes)
        for path, file_type in zip(paths, chosen, strict=True)
    ]
    started = time.monotonic()
    importance = imatrix.importance() if imatrix else None
    written = write_ggufs(layout, contents, targets, progress, threads, importance)
    if imatrix:
        save_imatrix(imatrix, matrix)
    seconds = time.monotonic() - started
    made = []
    for target, files in zip(targets, written, strict=True):
        unproven = QuantFile(target.file_type.name, tuple(Part(path, path.stat().st_size) for path in files), seconds)
        made.append(_proven(unproven, target, config, layout, imatrix is not None, threads) if prove else unproven)
    return made


def imatrix_path(out_dir: Path, name: str) -> Path:
    """Where the importance matrix of a model's quants is."""
    return out_dir / f"{name}-imatrix.gguf"


def embedding_rows(layout: Layout) -> int:
    """Rows of the token embedding: the number of tokens that a GGUF's vocabulary must have."""
    return layout.shapes["token_embd.weight"][0]


def data_bytes(layout: Layout, types: Sequence[str], imatrix: bool = False) -> int:
    """Bytes of tensor data in the files of `types` together."""
    total = 0
    for file_type in file_types(types):
        chosen = layout.types(file_type, imatrix)
        total += sum(tensor_bytes(chosen[name], shape) for name, shape in layout.shapes.items())
    return total


def _proven(
    file: QuantFile, target: Target, config: Mapping[str, Any], layout: Layout, imatrix: bool, threads: int | None
) -> QuantFile:
    from quants.proof import prove

    types = layout.types(target.file_type, imatrix)
    paths = [part.path for part in file.parts]
    first = first_moe_layer(config)
    try:
        proof = prove(paths, layout, types, target.metadata, first_layers=first, threads=threads)
    except ProofError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        return replace(file, failure=str(error))
    except MoergeError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return replace(file, proof=proof)
