"""The GGUF stages of a build: importance matrix, files, and what quantising did to the model.

All of them take an `OpenModel`: a merged checkpoint, or a plan over its sources and gates, which needs no checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import SourceError
from merge.expr import Expr, Read, elements
from merge.files import file_sha256, writing
from merge.progress import progress

if TYPE_CHECKING:
    from evals.quality import Weights
    from evals.results import QuantFailed, QuantMade
    from merge.checkpoint import Checkpoint
    from merge.gates.added import Rows
    from merge.plan import MergePlan
    from merge.stored import Stored
    from quants.build import QuantFile
    from quants.metadata import ModelInfo

# The largest file: what the Hub still takes and people still download, and what a small disk still holds beside the source.
LARGE_PARTS, SMALL_PARTS = 50_000_000_000, 2_000_000_000
# Tokens of a piece of calibration text.
CHUNK = 256


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model whose weights can be had: its config.json, its tensors under their names on the Hub, and what evaluates them.
    `folder` has its tokenizer and config.json, and perhaps nothing else."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Expr]
    contents: Stored
    folder: Path


def open_model(folder: Path) -> OpenModel:
    """The checkpoint in `folder`. Raises SourceError."""
    from merge.checkpoint import open_folder
    from merge.source_files import open_files
    from merge.stored import Stored

    checkpoint = open_folder(folder)
    if checkpoint.tensors is None:
        raise SourceError(f"{folder}: no safetensors weights in it")
    tensors: dict[str, Expr] = {
        name: Read(checkpoint.key, name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()
    }
    return OpenModel(checkpoint.config, tensors, Stored(open_files({checkpoint.key: checkpoint}), {}), folder)


def planned_model(
    plan: MergePlan, local: Mapping[str, Checkpoint], gates: Mapping[int, Rows], folder: Path
) -> OpenModel:
    """The model that a plan describes, over its sources on this machine and the gates, layer -> (experts, hidden).

    Writes the small files of its checkpoint, config.json and tokenizer, into `folder`; its weights are read where they are.
    Raises SourceError or DestinationError.
    """
    from merge.source_files import open_files
    from merge.stored import Stored
    from merge.writer import write_described

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_described(plan, local[plan.base], folder)
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    return OpenModel(plan.config, tensors, Stored(open_files(local), gates), folder)


def check_tokenizer(plan: MergePlan, local: Mapping[str, Checkpoint]) -> None:
    """Raise SourceError where no GGUF file can be made of the base's tokenizer: before the calibration, not after it."""
    from quants.build import embedding_rows
    from quants.layout import gguf_layout
    from quants.tokenizer import read_vocabulary

    folder = local[plan.base].folder
    assert folder is not None
    layout = gguf_layout(plan.config, {tensor.name: tensor.expr for tensor in plan.tensors})
    read_vocabulary(folder, embedding_rows(layout), layout.architecture)


def quant_of(result: Mapping[str, Any]) -> QuantMade:
    """A quant as the build's state keeps it."""
    from evals.results import FileMade, QuantMade

    return QuantMade(
        **{
            **result,
            "file": FileMade(**result["file"]),
            "further_files": tuple(FileMade(**file) for file in result["further_files"]),
            "sample_tokens": tuple(result["sample_tokens"]),
        }
    )


def quantised(
    model: OpenModel,
    folder: Path,
    name: str,
    types: list[str],
    info: ModelInfo,
    imatrix: Path | None,
    max_bytes: int | None,
    threads: int | None = None,
) -> list[QuantMade | QuantFailed]:
    """Make and prove GGUF files. They get their place in `folder` only when all of them are proven, or failed to be."""
    from quants.build import data_bytes, quantize
    from quants.imatrix import load_imatrix
    from quants.layout import gguf_layout

    weights = sum(elements(x) for x in model.tensors.values())
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    matrix = load_imatrix(imatrix) if imatrix else None
    total = data_bytes(gguf_layout(model.config, model.tensors), types, matrix is not None)
    try:
        with progress(f"gguf ({', '.join(types)})", total) as shown:
            files = quantize(
                model.config, model.tensors, model.contents, model.folder, partial, name, types, info,
                progress=shown.advance, imatrix=matrix, max_bytes=max_bytes, threads=threads,
            )  # fmt: skip
        with writing(folder):
            return [_accepted(file, folder, weights) for file in files]
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _accepted(file: QuantFile, folder: Path, weights: int) -> QuantMade | QuantFailed:
    """A proven file in its place in `folder`; of one that is not, the reason. `weights` is the number of the model's."""
    from evals.results import FileMade, QuantFailed, QuantMade
    from quants.proof import PROMPT

    if file.failure or file.proof is None:
        return QuantFailed(file.file_type, file.failure or "it was not proven")
    parts = [FileMade(part.path.name, part.bytes, file_sha256(part.path)) for part in file.parts]
    for part in file.parts:
        part.path.rename(folder / part.path.name)
    return QuantMade(
        file=parts[0],
        further_files=tuple(parts[1:]),
        type=file.file_type,
        bits_per_weight=8 * file.bytes / weights,
        seconds=file.seconds,
        proof=file.proof.kind,
        prompt=PROMPT,
        sample=file.proof.generation.text,
        sample_tokens=tuple(file.proof.generation.tokens),
    )


def make_imatrix(model: OpenModel, out: Path, prompts: Sequence[str], device: str) -> dict[str, Any]:
    """Measure the importance matrix of `model` into the file `out`.

    Returns what the state keeps: the file, and by expert the layers in which no token reached it.
    """
    from evals.perplexity import token_ids
    from evals.quality import pieces
    from evals.results import FileMade
    from merge.forward import StreamedModel
    from quants.activations import collect
    from quants.imatrix import CALIBRATION, save_imatrix
    from quants.layout import gguf_layout

    text = "\n\n".join((CALIBRATION.read_text(encoding="utf-8"), *prompts))
    batches = pieces(token_ids(model.folder, [text], limit=None)[0], CHUNK)
    streamed = StreamedModel(model.config, model.tensors, model.contents.evaluator, device=device)
    with progress("importance matrix", streamed.num_layers, unit="layer") as shown:
        matrix = collect(streamed, gguf_layout(model.config, model.tensors), batches, [CALIBRATION.name], shown.advance)
    unreached: dict[int, list[int]] = {}
    for layer, experts in matrix.dead_experts().items():
        for expert in experts:
            unreached.setdefault(expert, []).append(layer)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_imatrix(matrix, out)
    return {"file": asdict(FileMade(out.name, out.stat().st_size, file_sha256(out))), "unreached": unreached}


def measure_quants(model: OpenModel, folder: Path, quants: Sequence[QuantMade], device: str) -> dict[str, Any]:
    """The quants in `folder` against the `model` they were made of: figures by type, as the state keeps them."""
    from evals.perplexity import token_ids
    from evals.quality import TEXT, measure, pieces
    from quants.dequantised import dequantised
    from quants.layout import gguf_layout

    layout = gguf_layout(model.config, model.tensors)

    def opened(quant: QuantMade) -> Callable[[], Weights]:
        paths = [folder / file.name for file in quant.files]
        return lambda: dequantised(paths, layout, model.tensors)

    batches = pieces(token_ids(model.folder, [TEXT.read_text(encoding="utf-8")], limit=None)[0])
    with progress("quality of the quants", 1 + len(quants), unit="model") as shown:
        found = measure(
            model.config, (model.tensors, model.contents.evaluator), {quant.type: opened(quant) for quant in quants}, batches,
            device=device, progress=shown.advance,
        )  # fmt: skip
    return {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "quants": {name: asdict(quality) for name, quality in found.quants.items()},
    }
