"""What can be proven of a GGUF file that is too large to run here: every header and block, and a twin of a few layers.

The twin has the file's own blocks for its first layers, and its embedding, output and metadata: what llama.cpp does with it
is what it does with the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.errors import ProofError
from quants.filetypes import TENSOR_TYPES, padded, tensor_bytes
from quants.kernels import is_valid
from quants.layout import Layout
from quants.mixtures import layer_of

# Bytes of blocks looked at in one call.
_PIECE = 64 << 20


def read_tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """gguf's ReaderTensor of every tensor in the files of one model. Raises ProofError where a file is not GGUF."""
    import gguf

    found: dict[str, Any] = {}
    for path in paths:
        try:
            tensors = gguf.GGUFReader(path).tensors
        except Exception as error:  # the reader raises whatever the bytes provoke
            raise ProofError(f"{path.name}: cannot be read as GGUF ({error!r})") from None
        for tensor in tensors:
            if tensor.name in found:
                raise ProofError(f"{path.name}: has {tensor.name} a second time")
            found[tensor.name] = tensor
    return found


def raw(tensor: Any) -> npt.NDArray[np.uint8]:
    """The bytes of a ReaderTensor."""
    data: npt.NDArray[np.uint8] = tensor.data.reshape(-1).view(np.uint8)
    return data


def check(paths: Sequence[Path], layout: Layout, types: Mapping[str, str]) -> None:
    """Raises ProofError unless the files have exactly the tensors of `layout`, of `types`, every block of them finite."""
    found = read_tensors(paths)
    shapes = layout.shapes
    if found.keys() != shapes.keys():
        odd = sorted(found.keys() ^ shapes.keys())
        raise ProofError(f"{paths[0].name}: {odd[0]} is missing, or should not be there ({len(odd)} tensors)")
    for name, shape in shapes.items():
        tensor, kind = found[name], types[name]
        data = raw(tensor)
        told = tuple(reversed(tensor.shape.tolist()))
        if (tensor.tensor_type.name, told, data.nbytes) != (kind, shape, tensor_bytes(kind, shape)):
            raise ProofError(
                f"{paths[0].name}: {name} is {tensor.tensor_type.name} {told}, and should be {kind} {shape}"
            )
        stored = TENSOR_TYPES[kind].nbytes
        step = _PIECE // stored * stored
        for start in range(0, data.nbytes, step):
            if not is_valid(np.ascontiguousarray(data[start : start + step]), kind):
                raise ProofError(f"{paths[0].name}: {name} has blocks that are not finite, so its weights are damaged")


def write_twin(paths: Sequence[Path], out: Path, architecture: str, metadata: Mapping[str, Any], layers: int) -> None:
    """Writes a file like that in `paths`, of the first `layers` layers. `metadata` are the file's keys."""
    import gguf

    tensors = {name: x for name, x in read_tensors(paths).items() if (layer_of(name) or 0) < layers}
    writer = gguf.GGUFWriter(None, architecture)
    count = f"{architecture}.block_count"
    writer.kv_data[0] = {**metadata, count: gguf.GGUFValue(layers, metadata[count].type)}
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape.tolist()))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), raw(tensor).nbytes, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with out.open("r+b") as file:
        at = padded(file.seek(0, 2))
        for tensor in tensors.values():
            file.seek(at)
            file.write(raw(tensor).data)
            at += padded(raw(tensor).nbytes)
        file.truncate(at)
