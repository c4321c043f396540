"""The families of mixture-of-experts models that a merge can make, one module each.

A family says which dense models it takes, what the result's config.json is, and what each tensor is called in the result.
To add one, copy `mixtral.py` and list it in FAMILIES; a dense model_type that is new goes into `model_types.py`.
"""

from __future__ import annotations

import re

from merge.families import (
    cohere2_moe,
    deepseek,
    deepseek_v3,
    ernie4_5_moe,
    flex_olmo,
    granitemoe,
    granitemoe_swa,
    hunyuan_v1_moe,
    mixtral,
    qwen2_moe,
    qwen3_moe,
)
from merge.families.family import Family

# In the order in which they are tried where a recipe names none; Mixtral first, as in mergekit.
FAMILIES: tuple[Family, ...] = (
    mixtral,
    deepseek,
    qwen2_moe,
    qwen3_moe,
    granitemoe,
    granitemoe_swa,
    flex_olmo,
    ernie4_5_moe,
    hunyuan_v1_moe,
    cohere2_moe,
    deepseek_v3,
)

# Those whose sliding windows llama.cpp has. It runs the others without, as it does Mistral's dense models.
WINDOW_IN_GGUF = frozenset({granitemoe_swa.NAME, cohere2_moe.NAME})
# Those whose GGUF says whether the chosen experts' weights are made to sum to one. For the others llama.cpp does as it does.
NORM_IN_GGUF = frozenset({deepseek_v3.NAME})
# Where one expert is not enough: the choice among DeepSeek-V3's groups looks at the best two of each.
LEAST_EXPERTS = {deepseek_v3.NAME: 2}
# Those that transformers has no class for: nothing of it can run such a model.
WITHOUT_CLASS = frozenset({deepseek.NAME})


def families_named(name: str) -> list[Family]:
    """The families that a recipe's `architecture` may mean. As in mergekit, the beginning of a name is enough."""
    word = _plain(name)
    return [
        family
        for family in FAMILIES
        if word and any(_plain(known).startswith(word) for known in (family.NAME, family.TITLE, *family.ALIASES))
    ]


def families_for(model_type: str) -> list[Family]:
    """The families that take a dense base of this model_type."""
    return [family for family in FAMILIES if model_type in family.ACCEPTS]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
