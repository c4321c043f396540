"""The GGUF stages of a build: importance matrix, files, and what quantising did to the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.results import FileMade, QuantFailed, QuantMade
from merge.expr import elements
from merge.files import file_sha256, writing
from merge.progress import progress

if TYPE_CHECKING:
    from evals.quality import Weights
    from quants.metadata import ModelInfo

# The largest file: what the Hub still takes and people still download, and what a small disk still holds beside the source.
LARGE_PARTS, SMALL_PARTS = 50_000_000_000, 2_000_000_000
# Tokens of a piece of calibration text.
CHUNK = 256


def quant_of(result: Mapping[str, Any]) -> QuantMade:
    """A quant as the build's state keeps it."""
    return QuantMade(
        **{
            **result,
            "file": FileMade(**result["file"]),
            "further_files": tuple(FileMade(**file) for file in result["further_files"]),
            "sample_tokens": tuple(result["sample_tokens"]),
        }
    )


def quantised(
    model: Path,
    folder: Path,
    name: str,
    types: list[str],
    info: ModelInfo,
    imatrix: Path | None,
    max_bytes: int | None,
) -> list[QuantMade | QuantFailed]:
    """Make and prove GGUF files. They get their place in `folder` only when all of them are proven, or failed to be."""
    from merge.evaluate import checkpoint_expressions
    from quants.build import data_bytes, quantize
    from quants.imatrix import load_imatrix
    from quants.layout import gguf_layout
    from quants.proof import PROMPT

    tensors, config, evaluator = checkpoint_expressions(model)
    weights = sum(elements(x) for x in tensors.values())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    matrix = load_imatrix(imatrix) if imatrix else None
    total = data_bytes(gguf_layout(config, tensors), types, matrix is not None)
    with progress(f"gguf ({', '.join(types)})", total) as shown:
        files = quantize(
            config, tensors, evaluator, model, partial, name, types, info,
            progress=shown.advance, imatrix=matrix, max_bytes=max_bytes,
        )  # fmt: skip
    made: list[QuantMade | QuantFailed] = []
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for file in files:
            if file.failure or file.proof is None:
                made.append(QuantFailed(file.file_type, file.failure or "it was not proven"))
                continue
            for part in file.parts:
                part.path.rename(folder / part.path.name)
            parts = [FileMade(part.path.name, part.bytes, part.sha256) for part in file.parts]
            made.append(
                QuantMade(
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
            )
        shutil.rmtree(partial)
    return made


def make_imatrix(model: Path, out: Path, prompts: Sequence[str], device: str) -> dict[str, Any]:
    """Measure the importance matrix of the checkpoint in `model` into the file `out`.

    Returns what the state keeps: the file, and by expert the layers in which no token reached it.
    """
    from evals.quality import pieces, text_ids
    from merge.evaluate import checkpoint_expressions
    from merge.forward import StreamedModel
    from quants.imatrix import CALIBRATION, collect, save_imatrix
    from quants.layout import gguf_layout

    tensors, config, evaluator = checkpoint_expressions(model)
    text = "\n\n".join((CALIBRATION.read_text(encoding="utf-8"), *prompts))
    batches = pieces(text_ids(model, text), CHUNK)
    streamed = StreamedModel(config, tensors, evaluator, device=device)
    with progress("importance matrix", streamed.num_layers, unit="layer") as shown:
        matrix = collect(streamed, gguf_layout(config, tensors), batches, [CALIBRATION.name], shown.advance)
    unreached: dict[int, list[int]] = {}
    for layer, experts in matrix.dead_experts().items():
        for expert in experts:
            unreached.setdefault(expert, []).append(layer)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_imatrix(matrix, out)
    return {"file": asdict(FileMade(out.name, out.stat().st_size, file_sha256(out))), "unreached": unreached}


def measure_quants(model: Path, folder: Path, quants: Sequence[QuantMade], device: str) -> dict[str, Any]:
    """The quants in `folder` against the checkpoint in `model`: figures by type, as the state keeps them."""
    from evals.quality import TEXT, measure, pieces, text_ids
    from merge.evaluate import checkpoint_expressions
    from quants.dequantised import dequantised
    from quants.layout import gguf_layout

    tensors, config, evaluator = checkpoint_expressions(model)
    layout = gguf_layout(config, tensors)

    def opened(quant: QuantMade) -> Callable[[], Weights]:
        paths = [folder / file.name for file in quant.files]
        return lambda: dequantised(paths, layout, tensors)

    batches = pieces(text_ids(model, TEXT.read_text(encoding="utf-8")))
    with progress("quality of the quants", 1 + len(quants), unit="model") as shown:
        found = measure(
            config, (tensors, evaluator), {quant.type: opened(quant) for quant in quants}, batches,
            device=device, progress=shown.advance,
        )  # fmt: skip
    return {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "quants": {name: asdict(quality) for name, quality in found.quants.items()},
    }
