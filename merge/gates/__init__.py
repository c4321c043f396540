"""Router weights from prompts: mergekit's modes (`mergekit`), and a discriminant fitted on the merged model (`routed`).

A name is imported when it is first asked for: random gates, and reading gates from a file, need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge.gates.mergekit import base_files, calibrate
    from merge.gates.prompts import ExpertPrompts, PromptError, load_tokenizer
    from merge.gates.random import random_gates
    from merge.gates.report import gate_report
    from merge.gates.store import gates_key, gates_path, load_gates, read_gates, save_gates

__all__ = [
    "ExpertPrompts",
    "PromptError",
    "base_files",
    "calibrate",
    "gate_report",
    "gates_key",
    "gates_path",
    "load_gates",
    "load_tokenizer",
    "random_gates",
    "read_gates",
    "save_gates",
]

# The module of this package that each name lives in.
_HOMES = {
    "base_files": "mergekit",
    "calibrate": "mergekit",
    "ExpertPrompts": "prompts",
    "PromptError": "prompts",
    "load_tokenizer": "prompts",
    "gate_report": "report",
    "random_gates": "random",
    "gates_key": "store",
    "gates_path": "store",
    "load_gates": "store",
    "read_gates": "store",
    "save_gates": "store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"merge.gates.{_HOMES[name]}"), name)
