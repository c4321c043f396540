"""The GGUF file types we make, and the tensor types they are made of.

Imports neither torch nor numpy: the preview predicts sizes with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
        "Q4_0": TensorType(2, 32, 18),
        "Q4_1": TensorType(3, 32, 20),
        "Q5_0": TensorType(6, 32, 22),
        "Q5_1": TensorType(7, 32, 24),
        "Q8_0": TensorType(8, 32, 34),
        "IQ4_NL": TensorType(20, 32, 18),
        "Q2_K": TensorType(10, 256, 84),
        "Q3_K": TensorType(11, 256, 110),
        "Q4_K": TensorType(12, 256, 144),
        "Q5_K": TensorType(13, 256, 176),
        "Q6_K": TensorType(14, 256, 210),
        "IQ1_S": TensorType(19, 256, 50),
        "IQ1_M": TensorType(29, 256, 56),
        "IQ2_XXS": TensorType(16, 256, 66),
        "IQ2_XS": TensorType(17, 256, 74),
        "IQ2_S": TensorType(22, 256, 82),
        "IQ3_XXS": TensorType(18, 256, 98),
        "IQ3_S": TensorType(21, 256, 110),
        "IQ4_XS": TensorType(23, 256, 136),
    }
)
# Types whose search for the best block fails without the importance of each column: ggml refuses to make them.
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


@dataclass(frozen=True, slots=True)
class FileType:
    """A kind of GGUF file. `id` is llama.cpp's `general.file_type`; `base` the type of most tensors.

    `needs_imatrix` says that it is only made with an importance matrix. Which tensor gets which type is in quants.mixtures.
    """

    name: str
    id: int
    base: str
    when: str
    needs_imatrix: bool = False

    @property
    def is_quantised(self) -> bool:
        return TENSOR_TYPES[self.base].elements > 1


# From the largest to the smallest. https://github.com/ggml-org/llama.cpp, include/llama.h (ids)
FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    {
        file_type.name: file_type
        for file_type in (
            FileType("F32", 0, "F32", "Only to convert further: twice the size of BF16 for the same numbers."),
            FileType("F16", 1, "F16", "Unquantised, for hardware without BF16."),
            FileType("BF16", 32, "BF16", "Unquantised, the model's own precision; the source for other quants."),
            FileType("Q8_0", 7, "Q8_0", "Practically the same as the original in half the space; take it if it fits."),
            FileType("Q6_K", 18, "Q6_K", "Very close to the original; take it if Q8_0 does not fit."),
            FileType("Q5_K_M", 17, "Q5_K", "High quality, a little larger than Q4_K_M."),
            FileType("Q5_K_S", 16, "Q5_K", "Like Q5_K_M, slightly smaller and slightly less exact."),
            FileType("Q5_0", 8, "Q5_0", "An older five-bit kind, for programs that know no K-quants."),
            FileType("Q4_K_M", 15, "Q4_K", "The usual choice: good quality at a little over a quarter of BF16's size."),
            FileType("Q4_K_S", 14, "Q4_K", "Like Q4_K_M, smaller and somewhat less exact."),
            FileType("IQ4_NL", 25, "IQ4_NL", "Like IQ4_XS, slightly larger, in blocks that fit every row; quick on ARM."),
            FileType("Q4_0", 2, "Q4_0", "An older four-bit kind, quick on processors; Q4_K_S is more exact."),
            FileType("IQ4_XS", 30, "IQ4_XS", "About as good as Q4_K_S and smaller; slower on processors."),
            FileType("Q3_K_L", 13, "Q3_K", "Lower quality; take it where four bits do not fit."),
            FileType("Q3_K_M", 12, "Q3_K", "Low quality, smaller than Q3_K_L."),
            FileType("IQ3_M", 27, "IQ3_S", "About as good as Q3_K_M and smaller; slower on processors."),
            FileType("IQ3_S", 26, "IQ3_S", "Better than Q3_K_S at the same size; slower on processors."),
            FileType("Q3_K_S", 11, "Q3_K", "Low quality; IQ3_S is better at this size."),
            FileType("IQ3_XS", 22, "IQ3_S", "Smaller than IQ3_S, and lower in quality.", needs_imatrix=True),
            FileType("IQ3_XXS", 23, "IQ3_XXS", "Low quality in three bits.", needs_imatrix=True),
            FileType("Q2_K", 10, "Q2_K", "Very low quality, but often still usable."),
            FileType("Q2_K_S", 21, "Q2_K", "Very low quality, smaller than Q2_K.", needs_imatrix=True),
            FileType("IQ2_M", 29, "IQ2_S", "Low quality; often better than Q2_K at a smaller size.", needs_imatrix=True),
            FileType("IQ2_S", 28, "IQ2_XS", "Low quality, smaller than IQ2_M.", needs_imatrix=True),
            FileType("IQ2_XS", 20, "IQ2_XS", "Low quality, smaller than IQ2_S.", needs_imatrix=True),
            FileType("IQ2_XXS", 19, "IQ2_XXS", "Very low quality, for very little memory.", needs_imatrix=True),
            FileType("IQ1_M", 31, "IQ1_M", "Extremely low quality; only where nothing else fits.", needs_imatrix=True),
            FileType("IQ1_S", 24, "IQ1_S", "The smallest there is; expect nonsense.", needs_imatrix=True),
        )
    }
)  # fmt: skip


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
