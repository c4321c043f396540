"""The types that the sections of a recipe are made of: texts of a bounded length, numbers as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", min_length=1, max_length=200)]
Prompt = Annotated[str, StringConstraints(max_length=100_000)]
Web = Annotated[str, StringConstraints(pattern=r"^https?://[^\s\x00-\x1f\x7f]+$", max_length=2000)]
Markdown = Annotated[str, StringConstraints(max_length=50_000)]


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; people mean the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value)
    return value


def as_text(value: Any) -> Any:
    """A version `1.0` is a number to YAML; only its text is meant."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _from_list(value: Any) -> Any:
    """YAML has lists where the frozen models have tuples."""
    return tuple(value) if isinstance(value, list) else value


LIST = BeforeValidator(_from_list)
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
