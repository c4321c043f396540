"""The importance matrix: how much each column of each weight matters, measured on text.

A quantiser that knows which inputs of a matrix are large keeps the columns that meet them more exact. The measure is
llama.cpp's: the mean square of every input channel, and for a stack of experts that of each expert, over the tokens routed
to it. The file is llama.cpp's too (tools/imatrix, GGUF with `<tensor>.in_sum2` and `<tensor>.counts`), so that either
program reads the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merge.errors import DestinationError, SourceError
from quants.layout import Layout
from quants.mixtures import layer_of

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
