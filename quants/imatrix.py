"""The importance matrix: how much each column of each weight matters, measured on text.

A quantiser that knows which inputs of a matrix are large keeps the columns that meet them more exact. The measure is
llama.cpp's: the mean square of every input channel, and for a stack of experts that of each expert, over the tokens routed
to it. The file is llama.cpp's too (tools/imatrix, GGUF with `<tensor>.in_sum2` and `<tensor>.counts`), so that either
program reads the other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from merge.errors import DestinationError, SourceError
from quants.layout import Layout
from quants.mixtures import layer_of, stays_f32

if TYPE_CHECKING:
    from merge.forward import Batch, Progress, StreamedLayer, StreamedModel

# Prose, dialogue, code, sums and other languages, written for this purpose.
CALIBRATION = Path(__file__).with_name("calibration.txt")
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Sums of squared inputs by GGUF tensor: `sums` (experts or 1, columns), over `counts` (experts or 1) tokens each.

    Measured on `chunks` pieces of `chunk_size` tokens of the texts named in `datasets`.
    """

    sums: Mapping[str, npt.NDArray[np.float32]]
    counts: Mapping[str, npt.NDArray[np.float32]]
    chunks: int
    chunk_size: int
    datasets: tuple[str, ...]

    def importance(self) -> dict[str, npt.NDArray[np.float32]]:
        """Mean squares by tensor (experts or 1, columns). An expert that no token reached has ones: all columns alike."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
        return found

    def dead_experts(self) -> dict[int, tuple[int, ...]]:
        """By layer, the experts that no token of the text was routed to."""
        dead = {}
        for name, counts in self.counts.items():
            layer = layer_of(name)
            if layer is not None and name.endswith("_down_exps.weight") and (counts == 0).any():
                dead[layer] = tuple(np.flatnonzero(counts == 0).tolist())
        return dead


def save_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Writes the file under a temporary name and renames it. Raises DestinationError."""
    import gguf

    temporary = path.with_name(f".{path.name}.part")
    try:
        writer = gguf.GGUFWriter(temporary, "")
        writer.kv_data[0] = {}
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array("imatrix.datasets", list(imatrix.datasets))
        writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name in sorted(imatrix.sums):
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(imatrix.sums[name]))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(imatrix.counts[name][:, None]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DestinationError(f"{path}: cannot be written ({error.strerror or error})") from None


def load_imatrix(path: Path) -> Imatrix:
    """Reads a GGUF imatrix, llama.cpp's or ours. Raises SourceError where the file is not one."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        values = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
        names = [name.removesuffix(_SUMS) for name in values if name.endswith(_SUMS)]
        counts = {name: values[name + _COUNTS].reshape(-1) for name in names}
        sums = {name: values[name + _SUMS].reshape(len(counts[name]), -1) for name in names}
        chunks, size, datasets = (
            reader.fields[f"imatrix.{key}"].contents() for key in ("chunk_count", "chunk_size", "datasets")
        )
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # the reader raises whatever the bytes provoke
        raise SourceError(f"{path}: not a GGUF importance matrix ({error!r})") from None
    if not names or not all(np.isfinite(values[name]).all() for name in values):
        raise SourceError(f"{path}: an importance matrix without entries, or with some that are not finite")
    return Imatrix(sums, counts, int(chunks), int(size), tuple(map(str, datasets)))


def check_imatrix(imatrix: Imatrix, layout: Layout) -> None:
    """Raises SourceError where the matrix is of another model: its shapes are not those of `layout`."""
    shapes = layout.shapes
    for name, sums in imatrix.sums.items():
        shape = shapes.get(name)
        if shape is None:
            continue
        wanted = (shape[0] if len(shape) == 3 else 1, shape[-1])
        if sums.shape != wanted:
            raise SourceError(
                f"the importance matrix has {sums.shape} for {name}, the model {wanted}: it is of another"
            )
    if not imatrix.sums.keys() & shapes.keys():
        raise SourceError("the importance matrix has no tensor of this model")


def collect(
    model: StreamedModel,
    layout: Layout,
    batches: Sequence[Batch],
    datasets: Sequence[str],
    progress: Progress | None = None,
) -> Imatrix:
    """Runs `batches` (equally long, without padding) through the model and sums up what its matrices are given.

    Layer by layer, on the model's device. `layout` says what each matrix is called in a GGUF file.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for tensor in layout.tensors:
        shape = tensor.expr.shape
        if layer_of(tensor.name) is not None and not stays_f32(tensor.name, shape):
            experts = shape[0] if len(shape) == 3 else 1
            sums[tensor.name] = torch.zeros(experts, shape[-1], dtype=torch.float64)
            counts[tensor.name] = torch.zeros(experts)
    run = model.start(batches)
    for layer in model.layers(progress):
        places = dict(_places(model, layer, layout))
        meter = _Meter({pointer: [at for at in found if at[0] in sums] for pointer, found in places.items()})
        with meter:
            layer.advance(run)
        for (name, expert), (total, count) in meter.totals.items():
            sums[name][expert] += total.cpu()
            counts[name][expert] += count
    chunk = batches[0].input_ids.shape[1]
    return Imatrix(
        {name: total.float().numpy() for name, total in sums.items()},
        {name: count.numpy() for name, count in counts.items()},
        sum(batch.input_ids.shape[0] for batch in batches),
        chunk,
        tuple(datasets),
    )


# A row of the matrix file: GGUF tensor and expert.
_Place = tuple[str, int]


class _Meter(TorchFunctionMode):
    """Sees every matrix product of a layer while it runs, and sums the squares of what goes into it.

    `places` says which weights they are by the address of their numbers: modules of all families end in the same function,
    whether their experts are modules or slices of one tensor.
    """

    def __init__(self, places: Mapping[int, Sequence[_Place]]) -> None:
        super().__init__()
        self.places = places
        self.totals: dict[_Place, tuple[torch.Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and (places := self.places.get(args[1].data_ptr())):
            x = args[0].reshape(-1, args[0].shape[-1])  # (tokens, columns)
            squares = x.double().square().sum(0)
            for place in places:
                total, count = self.totals.get(place, (torch.zeros_like(squares), 0))
                self.totals[place] = total + squares, count + len(x)
        return func(*args, **(kwargs or {}))


def _places(model: StreamedModel, layer: StreamedLayer, layout: Layout) -> Iterator[tuple[int, list[_Place]]]:
    """Of each matrix in a layer the address, and the rows of the file that it belongs to."""
    sources = model.parameter_sources(layer)
    for name, parameter in layer.module.named_parameters():
        names = sources[name]
        if parameter.dim() == 2:
            origins = [origin for source in names for origin in layout.origins.get(source, ())]
            yield parameter.data_ptr(), [(origin.tensor, origin.expert or 0) for origin in origins]
        elif parameter.dim() == 3:
            experts = len(parameter)
            for expert in range(experts):
                # One tensor of all experts, or those of the experts in turn, part after part.
                own = names if len(names) < experts else names[expert::experts]
                origins = [origin for source in own for origin in layout.origins.get(source, ())]
                yield parameter[expert].data_ptr(), [(origin.tensor, expert) for origin in origins]
