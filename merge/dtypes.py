"""The data types of checkpoints: safetensors' names, their sizes, and the names recipes use."""

from __future__ import annotations

# Bytes per element, by safetensors' own names (https://github.com/huggingface/safetensors, `Dtype`).
SIZES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# What a weight of a merge can be stored as.
WEIGHT_DTYPES = ("F32", "F16", "BF16")

# The names config.json and recipes use (torch's), to safetensors'.
FROM_TORCH_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAME = {name: torch_name for torch_name, name in FROM_TORCH_NAME.items()}
# All that a source's numbers can be read as, to torch's names.
TORCH_TYPE = {**TORCH_NAME, "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def from_config(value: object) -> str | None:
    """safetensors' name of a config.json `dtype`/`torch_dtype` value ("bfloat16", "torch.float16"), or None."""
    if not isinstance(value, str):
        return None
    return FROM_TORCH_NAME.get(value.removeprefix("torch."))
