"""What a GGUF file begins with: its metadata and the list of its tensors, as bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from gguf import GGUFValueType

from quants.filetypes import TENSOR_TYPES, padded, tensor_bytes
from quants.layout import GgufTensor

# Numbers, as Python's struct module names them.
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


def header(metadata: Mapping[str, gguf.GGUFValue], tensors: Sequence[GgufTensor], types: Mapping[str, str]) -> bytes:
    """All of a file but the tensors' data, which follows padded tensor by tensor. `types` has each tensor's by its name."""
    parts = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += _text(key), struct.pack("<I", value.type), _value(value.value, value.type, value.sub_type)
    offset = 0
    for tensor in tensors:
        kind, shape = types[tensor.name], tensor.expr.shape
        parts += _text(tensor.name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(struct.pack("<IQ", TENSOR_TYPES[kind].id, offset))
        offset += padded(tensor_bytes(kind, shape))
    size = sum(map(len, parts))
    return b"".join((*parts, bytes(padded(size) - size)))


def _value(value: Any, kind: GGUFValueType, sub_type: GGUFValueType | None) -> bytes:
    """A value without its type; of an array, with the type of its elements (`sub_type`, or what they are)."""
    if kind is not GGUFValueType.ARRAY:
        return _elements([value], kind)
    element = sub_type if sub_type is not None else GGUFValueType.get_type(value[0])
    return struct.pack("<IQ", element, len(value)) + _elements(value, element)


def _elements(values: Sequence[Any], kind: GGUFValueType) -> bytes:
    if kind is GGUFValueType.STRING:
        return b"".join(map(_text, values))
    return struct.pack(f"<{len(values)}{_NUMBERS[kind]}", *values)


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw
