"""Which type each tensor of a file gets.

A file type is a mixture: most tensors have its base type, and some that matter more (attention values, down projections,
the output) get more bits. The mixtures are llama.cpp's, so that a `Q4_K_M` made here is what people know by that name
(https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp, llama_tensor_get_type_impl). They depend on the number of
layers and experts, on how many query heads share a key-value head, and on whether there is an importance matrix.

Imports neither torch nor numpy: the preview predicts sizes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quants.filetypes import NEED_IMPORTANCE, TENSOR_TYPES, FileType, padded, tensor_bytes

# What takes the place of a type whose 256-element blocks do not divide a row.
FALLBACK: Mapping[str, str] = MappingProxyType(
    {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0"}
    | {name: "IQ4_NL" for name in TENSOR_TYPES if name.startswith("IQ")}
)
# The file types of one and two bits, which have rules of their own.
_SMALLEST = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
# File types that give the attention output five bits in a model of exactly eight experts, where it is a small part.
_OUTPUT_OF_EIGHT = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)
_ATTENTION_OUTPUT = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_QUERY_AND_KEY = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_EMBEDDING = {"IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ1_S": "Q2_K", "IQ1_M": "Q2_K"} | {
    "IQ2_S": "IQ3_S",
    "IQ2_M": "IQ3_S",
    "IQ3_XXS": "IQ3_S",
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the mixtures depend on besides a tensor's name and shape. `experts` is 0 for a dense model."""

    layers: int
    experts: int
    heads: int
    kv_heads: int
    architecture: str = "llama"

    @property
    def wide_values(self) -> bool:
        """Whether four query heads or more share the values of one head, so that more bits for these cost little."""
        return self.heads // self.kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """llama.cpp's name for Llama models of this shape, whose attention values are an eighth of the queries."""
        return self.architecture == "llama" and self.layers == 80 and self.heads != self.kv_heads


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor among those of its kind: `index` of `count` in the order of the file, `step` of `steps` the layer.

    In a mixture of experts the layer is the one in the name; in a dense model it is the index.
    """

    index: int
    count: int
    step: int
    steps: int


def more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


_LAYER = re.compile(r"blk\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to, from its name."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def file_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which tensors stand in a file: by layer, those outside of the layers first, then by name."""
    layer = layer_of(name)
    return (-1 if layer is None else layer, name)


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is F32 in every file: vectors, norms, routers, and whatever is not a weight."""
    return (
        len(shape) < 2
        or name.endswith(("_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight"))
        or not name.endswith(".weight")
    )


def tensor_types(
    file_type: FileType, shapes: Mapping[str, tuple[int, ...]], model: ModelShape, imatrix: bool = False
) -> dict[str, str]:
    """The type of every tensor of a file.

    `shapes` maps GGUF tensor names to shapes with the row length last; without `output.weight` among them the embedding
    serves as output too, and is stored as one. `imatrix` says whether there is an importance matrix.
    """
    tied = "output.weight" not in shapes
    places = _places(shapes, model)
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        if stays_f32(name, shape):
            types[name] = "F32"
        elif not file_type.is_quantised:
            types[name] = file_type.base
        elif name == "output.weight" or (tied and name == "token_embd.weight"):
            types[name] = _fitting(_output_type(file_type, shape[-1]), shape[-1])
        else:
            types[name] = _fitting(_mixed_type(file_type, name, places.get(name), model, imatrix), shape[-1])
    return types


def needs_importance(file_type: FileType, name: str, tensor_type: str) -> bool:
    """Whether this tensor of this file can only be quantised with the importance of its columns."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return tensor_type in NEED_IMPORTANCE or (file_type.name == "Q2_K_S" and tensor_type == "Q2_K")


def quantised_bytes(
    file_type: FileType, shapes: Mapping[str, tuple[int, ...]], model: ModelShape, imatrix: bool = False
) -> int:
    """Bytes of the tensor data of a whole file, each tensor padded as GGUF has it: exact."""
    types = tensor_types(file_type, shapes, model, imatrix)
    return sum(padded(tensor_bytes(types[name], shape)) for name, shape in shapes.items())


def _places(shapes: Iterable[str], model: ModelShape) -> dict[str, _Place]:
    """The place of every attention value and feed-forward matrix."""
    places = {}
    for kind in ("attn_v", "ffn_down", "ffn_gate", "ffn_up"):
        names = sorted(
            (name for name in shapes if f".{kind}" in name and name.endswith(".weight") and "_inp" not in name),
            key=file_order,
        )
        for index, name in enumerate(names):
            layer = layer_of(name)
            step = layer if model.experts > 1 and layer is not None else index
            places[name] = _Place(index, len(names), step, model.layers)
    return places


def _output_type(file_type: FileType, row: int) -> str:
    """The output's type: at least five or six bits. Where the base's blocks do not fit a row, eight."""
    if file_type.base == "Q8_0" or row % TENSOR_TYPES[file_type.base].elements:
        return "Q8_0"
    return "Q5_K" if file_type.name in _SMALLEST or file_type.name == "IQ3_XXS" else "Q6_K"


def _mixed_type(file_type: FileType, name: str, place: _Place | None, model: ModelShape, imatrix: bool) -> str:
    """The type of a tensor inside the layers (or of an embedding of its own), before the row length is looked at."""
    kind, base = file_type.name, file_type.base
    if name == "token_embd.weight":
        return _EMBEDDING.get(kind, base)
    part = name.split(".")[2]
    if kind in _SMALLEST:
        return _smallest_type(file_type, part, place, model)
    if part == "attn_v":
        assert place is not None
        return _value_type(file_type, place, model)
    if part == "attn_k" and model.experts == 8:
        return "Q8_0"
    if part in ("attn_k", "attn_q"):
        return _QUERY_AND_KEY.get(kind, base)
    if part == "attn_output":
        if model.experts == 8:
            return "Q5_K" if kind in _OUTPUT_OF_EIGHT else base
        return _ATTENTION_OUTPUT.get(kind, base)
    if part.startswith("ffn_down"):
        assert place is not None
        return _DOWN.get(kind, _always_base)(place, model, imatrix) or base
    if part.startswith(("ffn_gate", "ffn_up")) and kind == "IQ3_XS":
        assert place is not None
        middle = place.steps // 8 <= place.step < 7 * place.steps // 8
        return "IQ3_XXS" if middle else base
    return base


def _smallest_type(file_type: FileType, part: str, place: _Place | None, model: ModelShape) -> str:
    """The mixtures of one and two bits."""
    two = file_type.name in ("IQ2_S", "IQ2_M")
    more = "IQ3_S" if two else "Q2_K"
    if part == "attn_v":
        return "Q4_K" if model.wide_values or model.experts >= 4 else more
    if part == "attn_k" and model.experts == 8:
        return "Q4_K"
    if part.startswith("ffn_down"):
        assert place is not None
        return more if place.index < place.steps // 8 else file_type.base
    if part == "attn_output":
        if model.experts == 8:
            return "Q5_K"
        return "IQ3_S" if two else "IQ2_XXS" if file_type.name.startswith("IQ1") else file_type.base
    return file_type.base


def _value_type(file_type: FileType, place: _Place, model: ModelShape) -> str:
    """The type of a layer's attention values."""
    if model.experts == 8:
        return "Q8_0"
    chosen = file_type.base
    match file_type.name:
        case "Q2_K":
            chosen = "Q4_K" if model.wide_values else "Q3_K"
        case "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S":
            chosen = "Q4_K" if model.wide_values else chosen
        case "IQ3_M":
            chosen = "Q4_K"
        case "Q3_K_M":
            chosen = "Q5_K" if place.index < 2 else "Q4_K"
        case "Q3_K_L":
            chosen = "Q5_K"
        case "IQ4_NL" | "IQ4_XS":
            chosen = "Q5_K" if model.wide_values else chosen
        case "Q4_K_M" | "Q5_K_M":
            chosen = "Q6_K" if more_bits(place.index, place.count) else chosen
        case "Q4_K_S":
            chosen = "Q5_K" if place.index < 4 else chosen
    return "Q5_K" if model.is_70b and chosen in ("Q3_K", "Q4_K") else chosen


# The type of a down projection by its place, model and whether there is an importance matrix; None is the base type.
_DownRule = Callable[[_Place, ModelShape, bool], str | None]


def _always_base(place: _Place, model: ModelShape, imatrix: bool) -> str | None:
    return None


def _first_eighth(better: str, with_imatrix: bool | None = None) -> _DownRule:
    """`better` in the first eighth of the layers, where `with_imatrix` is given only with or only without one."""
    return lambda place, model, imatrix: (
        better if place.step < place.steps // 8 and with_imatrix in (None, imatrix) else None
    )


def _often(better: str) -> _DownRule:
    return lambda place, model, imatrix: better if more_bits(place.step, place.steps) else None


def _iq3_m(place: _Place, model: ModelShape, imatrix: bool) -> str | None:
    often = model.experts == 8 and more_bits(place.step, place.steps)
    return "Q4_K" if often or place.step < place.steps // 8 else None


_DOWN: Mapping[str, _DownRule] = MappingProxyType(
    {
        "Q2_K": lambda place, model, imatrix: "Q3_K",
        "Q2_K_S": _first_eighth("Q4_K"),
        "Q3_K_M": lambda place, model, imatrix: "Q5_K" if place.step < place.steps // 16 else "Q4_K",
        "Q3_K_L": lambda place, model, imatrix: "Q5_K",
        "IQ3_M": _iq3_m,
        "Q4_K_M": _often("Q6_K"),
        "Q5_K_M": _often("Q6_K"),
        "Q4_K_S": _first_eighth("Q5_K"),
        "IQ4_NL": _first_eighth("Q5_K", with_imatrix=False),
        "IQ4_XS": _first_eighth("Q5_K", with_imatrix=False),
        "Q4_0": _first_eighth("Q4_1", with_imatrix=True),
        "Q5_0": _first_eighth("Q5_1", with_imatrix=True),
    }
)


def _fitting(tensor_type: str, row: int) -> str:
    """`tensor_type`, or what stands in for it where its blocks do not divide a row."""
    if row % TENSOR_TYPES[tensor_type].elements == 0:
        return tensor_type
    fallback = FALLBACK.get(tensor_type, tensor_type)
    return fallback if row % TENSOR_TYPES[fallback].elements == 0 else "F16"
