"""The families of mixture-of-experts models that a merge can make, one module each.

A family says which dense models it takes, what the result's config.json is, and what each tensor is called in the result.
To add one, copy `mixtral.py` and list it in FAMILIES.
"""

from __future__ import annotations

from typing import Any, Protocol

from merge.families import mixtral
from merge.families.dense import DenseModel


class Family(Protocol):
    """What a family's module provides."""

    NAME: str
    TITLE: str
    ACCEPTS: tuple[str, ...]

    def router_tensor(self, layer: int) -> str: ...
    def expert_tensor(self, layer: int, expert: int, part: str) -> str: ...
    def keeps(self, tensor: str) -> bool: ...
    def output_config(
        self, base: DenseModel, experts: int, experts_per_token: int, torch_dtype: str
    ) -> dict[str, Any]: ...


FAMILIES: tuple[Family, ...] = (mixtral,)


def find_family(name: str) -> Family | None:
    """The family a recipe's `architecture` names. As in mergekit, the beginning of a name is enough."""
    return next((family for family in FAMILIES if family.NAME.startswith(name.lower())), None) if name else None


def family_for(model_type: str) -> Family | None:
    """The family a dense base of this model_type goes to when the recipe names none."""
    return next((family for family in FAMILIES if model_type in family.ACCEPTS), None)
