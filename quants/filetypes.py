"""The GGUF file types we make, and which type each tensor of a file gets.

A file type is a mixture: most tensors have its base type, and some that matter more (attention values, the experts' down
projections, the output) get more bits. The mixtures are llama.cpp's, so that a `Q4_K_M` made here is what people know by
that name (https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp). Adding a file type is one entry in FILE_TYPES.

Imports neither torch nor numpy: the preview predicts sizes with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

# GGUF pads every tensor's data to this many bytes.
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores a tensor: `id` in the file, and blocks of `elements` in `nbytes` bytes each."""

    id: int
    elements: int
    nbytes: int


# https://github.com/ggml-org/llama.cpp, ggml/include/ggml.h (ids) and ggml/src/ggml-common.h (blocks)
TENSOR_TYPES: Mapping[str, TensorType] = MappingProxyType(
    {
        "F32": TensorType(0, 1, 4),
        "F16": TensorType(1, 1, 2),
        "BF16": TensorType(30, 1, 2),
        "Q5_0": TensorType(6, 32, 22),
        "Q5_1": TensorType(7, 32, 24),
        "Q8_0": TensorType(8, 32, 34),
        "Q4_K": TensorType(12, 256, 144),
        "Q5_K": TensorType(13, 256, 176),
        "Q6_K": TensorType(14, 256, 210),
    }
)
# What takes the place of a type whose 256-element blocks do not divide a row.
FALLBACK: Mapping[str, str] = MappingProxyType({"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"})


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the mixtures depend on besides a tensor's name and shape. `experts` is 0 for a dense model."""

    layers: int
    experts: int
    heads: int
    kv_heads: int


# Whether the layer at `index` of `count` is one of those that get more bits.
LayerChoice = Callable[[int, int], bool]


def more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def first_eighth(index: int, count: int) -> bool:
    return index < count // 8


def first_four(index: int, count: int) -> bool:
    return index < 4


@dataclass(frozen=True, slots=True)
class FileType:
    """A kind of GGUF file. `id` is llama.cpp's `general.file_type`; `base` the type of most tensors.

    `attn_v` and `ffn_down` name the type that these tensors get in the chosen layers. `attn_output_of_8` is the type of the
    attention output in a model of exactly eight experts, where attention is a small part of the whole.
    """

    name: str
    id: int
    base: str
    when: str
    attn_v: tuple[LayerChoice, str] | None = None
    ffn_down: tuple[LayerChoice, str] | None = None
    attn_output_of_8: str | None = None

    @property
    def is_quantised(self) -> bool:
        return TENSOR_TYPES[self.base].elements > 1


FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    {
        file_type.name: file_type
        for file_type in (
            FileType("F32", 0, "F32", "Only to convert further: twice the size of BF16 for the same numbers."),
            FileType("F16", 1, "F16", "Unquantised, for hardware without BF16."),
            FileType("BF16", 32, "BF16", "Unquantised, the model's own precision; the source for other quants."),
            FileType("Q8_0", 7, "Q8_0", "Practically the same as the original in half the space; take it if it fits."),
            FileType("Q6_K", 18, "Q6_K", "Very close to the original; take it if Q8_0 does not fit."),
            FileType(
                "Q5_K_M", 17, "Q5_K", "High quality, a little larger than Q4_K_M.",
                attn_v=(more_bits, "Q6_K"), ffn_down=(more_bits, "Q6_K"),
            ),
            FileType("Q5_K_S", 16, "Q5_K", "Like Q5_K_M, slightly smaller and slightly less exact."),
            FileType(
                "Q4_K_M", 15, "Q4_K", "The usual choice: good quality at a little over a quarter of BF16's size.",
                attn_v=(more_bits, "Q6_K"), ffn_down=(more_bits, "Q6_K"), attn_output_of_8="Q5_K",
            ),
            FileType(
                "Q4_K_S", 14, "Q4_K", "Like Q4_K_M, smaller and somewhat less exact.",
                attn_v=(first_four, "Q5_K"), ffn_down=(first_eighth, "Q5_K"), attn_output_of_8="Q5_K",
            ),
        )
    }
)  # fmt: skip

_LAYER = re.compile(r"blk\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to, from its name."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def file_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which tensors stand in a file: by layer, those outside of the layers first, then by name."""
    layer = layer_of(name)
    return (-1 if layer is None else layer, name)


def tensor_bytes(tensor_type: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor's data. `shape` has the row length last; raises ValueError where blocks do not divide the row."""
    stored = TENSOR_TYPES[tensor_type]
    *leading, row = shape
    if row % stored.elements:
        raise ValueError(f"a row of {row} does not divide into {tensor_type} blocks of {stored.elements}")
    return math.prod(leading) * (row // stored.elements) * stored.nbytes


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of tensor data."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def tensor_types(file_type: FileType, shapes: Mapping[str, tuple[int, ...]], model: ModelShape) -> dict[str, str]:
    """The type of every tensor of a file.

    `shapes` maps GGUF tensor names to shapes with the row length last; without `output.weight` among them the embedding
    serves as output too, and is stored as one.
    """
    tied = "output.weight" not in shapes
    values = sorted((name for name in shapes if _is(name, "attn_v.weight")), key=file_order)
    place = {name: index for index, name in enumerate(values)}
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        if stays_f32(name, shape):
            types[name] = "F32"
        elif not file_type.is_quantised:
            types[name] = file_type.base
        elif name == "output.weight" or (tied and name == "token_embd.weight"):
            types[name] = _fitting(_output_type(file_type.base, shape[-1]), shape[-1])
        else:
            types[name] = _fitting(_mixed_type(file_type, name, place, model), shape[-1])
    return types


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is F32 in every file: vectors, norms, routers, and whatever is not a weight."""
    return (
        len(shape) < 2
        or name.endswith("_norm.weight")
        or _is(name, "ffn_gate_inp.weight")
        or _is(name, "ffn_gate_inp_shexp.weight")
        or not name.endswith(".weight")
    )


def quantised_bytes(file_type: FileType, shapes: Mapping[str, tuple[int, ...]], model: ModelShape) -> int:
    """Bytes of the tensor data of a whole file, each tensor padded as GGUF has it: exact."""
    types = tensor_types(file_type, shapes, model)
    return sum(padded(tensor_bytes(types[name], shape)) for name, shape in shapes.items())


def _mixed_type(file_type: FileType, name: str, place: Mapping[str, int], model: ModelShape) -> str:
    """The type of a tensor inside the layers (or of an embedding of its own), before the row length is looked at."""
    layer = layer_of(name)
    eight = model.experts == 8
    if _is(name, "attn_v.weight"):
        if eight:
            return "Q8_0"
        chosen = _chosen(file_type.attn_v, place[name], len(place)) or file_type.base
        # The one more rule for 70B models, whose attention values are small: eight query heads share each.
        return "Q5_K" if chosen == "Q4_K" and model.layers == 80 and model.heads != model.kv_heads else chosen
    if _is(name, "attn_k.weight") and eight:
        return "Q8_0"
    if _is(name, "attn_output.weight") and eight:
        return file_type.attn_output_of_8 or file_type.base
    if layer is not None and ".ffn_down" in name:
        return _chosen(file_type.ffn_down, layer, model.layers) or file_type.base
    return file_type.base


def _output_type(base: str, row: int) -> str:
    """The output's type: at least six bits. Where the base's blocks do not fit a row, eight."""
    return "Q8_0" if base == "Q8_0" or row % TENSOR_TYPES[base].elements else "Q6_K"


def _chosen(choice: tuple[LayerChoice, str] | None, index: int, count: int) -> str | None:
    return choice[1] if choice is not None and choice[0](index, count) else None


def _fitting(tensor_type: str, row: int) -> str:
    """`tensor_type`, or what stands in for it where its blocks do not divide a row."""
    if row % TENSOR_TYPES[tensor_type].elements == 0:
        return tensor_type
    fallback = FALLBACK.get(tensor_type, tensor_type)
    return fallback if row % TENSOR_TYPES[fallback].elements == 0 else "F16"


def _is(name: str, tensor: str) -> bool:
    return name.endswith(f".{tensor}")
