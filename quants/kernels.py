"""ggml's own kernels, called from Python: float rows to the blocks of a tensor type.

The library inside the xllamacpp wheel exports them; ctypes releases the GIL, so threads quantise in parallel. What comes
out is byte for byte what llama.cpp's own quantiser writes.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from merge.errors import UsageError
from quants.filetypes import TENSOR_TYPES, tensor_bytes

_FLOAT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode(
    rows: torch.Tensor, tensor_type: str, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """The bytes of `rows` (rows, row length; F32, F16 or BF16) stored as `tensor_type`.

    `importance` (row length) weighs the errors of the columns, where the type's search for the best block heeds it.

    Raises ValueError if a value is not finite in that type: NaN or infinite already, or too large for F16 or for the
    half-precision scales of a block.
    """
    if tensor_type in _FLOAT:
        encoded = rows.to(_FLOAT[tensor_type]).contiguous().view(torch.uint8).reshape(-1).numpy()
    else:
        count, length = rows.shape
        encoded = np.empty(tensor_bytes(tensor_type, rows.shape), np.uint8)
        source = rows.float().contiguous()
        weights = None
        if importance is not None:
            weights = np.ascontiguousarray(importance, np.float32)
            assert weights.shape == (length,)
        written = library().ggml_quantize_chunk(
            TENSOR_TYPES[tensor_type].id, source.data_ptr(), encoded.ctypes.data, 0, count, length,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        assert written == encoded.nbytes
    if not is_valid(encoded, tensor_type):
        raise ValueError(f"it has values that are not finite as {tensor_type}")
    return encoded


def decode(encoded: npt.NDArray[np.uint8], tensor_type: str, length: int) -> torch.Tensor:
    """The numbers that `encoded`, whole rows of `length` elements, stands for: float32 (rows, row length)."""
    if tensor_type in _FLOAT:
        return torch.from_numpy(encoded.copy()).view(_FLOAT[tensor_type]).view(-1, length).float()
    count = encoded.nbytes // tensor_bytes(tensor_type, (length,))
    values = torch.empty(count, length)
    source = np.ascontiguousarray(encoded)
    name = tensor_type.lower()
    # ggml's functions have the K in capitals.
    function = library()[f"dequantize_row_{name.removesuffix('_k') + '_K' if name.endswith('_k') else name}"]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(source.ctypes.data, values.data_ptr(), count * length)
    return values


def is_valid(encoded: npt.NDArray[np.uint8], tensor_type: str) -> bool:
    """Whether every number of these blocks is finite."""
    return bool(library().ggml_validate_row_data(TENSOR_TYPES[tensor_type].id, encoded.ctypes.data, encoded.nbytes))


@functools.cache
def library() -> ctypes.CDLL:
    """The ggml library, with the signatures of what we call. Raises UsageError where xllamacpp is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("GGUF needs the xllamacpp package: install moerge with its `build` extra, moerge[build]")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    if not found:
        raise UsageError("the installed xllamacpp has no shared library; reinstall it")
    loaded = ctypes.CDLL(str(found[0]))
    # https://github.com/ggml-org/llama.cpp, ggml/include/ggml.h
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    return loaded
