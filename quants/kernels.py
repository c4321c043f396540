"""ggml's own kernels, called from Python: float rows to the blocks of a tensor type.

The library inside the xllamacpp wheel exports them; ctypes releases the GIL, so threads quantise in parallel. What comes
out is byte for byte what llama.cpp's own quantiser writes.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merge.errors import UsageError
from quants.filetypes import TENSOR_TYPES, tensor_bytes

if TYPE_CHECKING:
    import torch

# ggml's own rows of numbers that are not blocks, by numpy's type; BF16 as its bits.
_FLOAT: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
_NAMES: dict[np.dtype[Any], str] = {np.dtype(np.float16): "fp16", np.dtype(np.uint16): "bf16"}

Array = npt.NDArray[Any]


def encode(rows: Array, tensor_type: str, importance: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.uint8]:
    """The bytes of `rows` (rows, row length; float32, float16, or the bits of BF16) stored as `tensor_type`.

    `importance` (row length) weighs the errors of the columns, where the type's search for the best block heeds it.

    Raises ValueError if a value is not finite in that type: NaN or infinite already, or too large for F16 or for the
    half-precision scales of a block.
    """
    if tensor_type in _FLOAT:
        encoded = _as_float(rows, _FLOAT[tensor_type]).reshape(-1).view(np.uint8)
    else:
        count, length = rows.shape
        encoded = np.empty(tensor_bytes(tensor_type, rows.shape), np.uint8)
        source = float32(rows)
        weights = None
        if importance is not None:
            weights = np.ascontiguousarray(importance, np.float32)
            assert weights.shape == (length,)
        written = library().ggml_quantize_chunk(
            TENSOR_TYPES[tensor_type].id, source.ctypes.data, encoded.ctypes.data, 0, count, length,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        assert written == encoded.nbytes
    if not is_valid(encoded, tensor_type):
        raise ValueError(f"it has values that are not finite as {tensor_type}")
    return encoded


def float32(rows: Array) -> npt.NDArray[np.float32]:
    """`rows` as float32; themselves where they are."""
    return _as_float(rows, np.dtype(np.float32))


def _as_float(rows: Array, dtype: np.dtype[Any]) -> Array:
    """`rows` in another of the types that are numbers, rounded to the nearest."""
    rows = np.ascontiguousarray(rows)
    if rows.dtype == dtype:
        return rows
    if rows.dtype != np.float32:
        wide = np.empty(rows.shape, np.float32)
        _convert(f"ggml_{_NAMES[rows.dtype]}_to_fp32_row", rows, wide)
        rows = wide
    if dtype == np.float32:
        return rows
    narrow = np.empty(rows.shape, dtype)
    _convert(f"ggml_fp32_to_{_NAMES[dtype]}_row", rows, narrow)
    return narrow


def _convert(function: str, source: Array, target: Array) -> None:
    """Calls one of ggml's functions on rows: (source, target, number of the target's elements)."""
    call = library()[function]
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    call.restype = None
    call(source.ctypes.data, target.ctypes.data, target.size)


def decode(encoded: npt.NDArray[np.uint8], tensor_type: str, length: int) -> torch.Tensor:
    """The numbers that `encoded`, whole rows of `length` elements, stands for: float32 (rows, row length)."""
    import torch

    source = np.ascontiguousarray(encoded)
    if tensor_type in _FLOAT:
        values = float32(source.view(_FLOAT[tensor_type]))
        return torch.from_numpy(values.copy()).view(-1, length)
    values = np.empty((source.nbytes // tensor_bytes(tensor_type, (length,)), length), np.float32)
    name = tensor_type.lower()
    # ggml's functions have the K in capitals.
    _convert(f"dequantize_row_{name.removesuffix('_k') + '_K' if name.endswith('_k') else name}", source, values)
    return torch.from_numpy(values)


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
