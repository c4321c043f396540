"""Router weights from prompts: mergekit's modes (`mergekit`), and a discriminant fitted on the merged model (`routed`)."""

from merge.gates.mergekit import MODES, RANDOM_MODES, base_files, calibrate, random_gates
from merge.gates.prompts import ExpertPrompts, PromptError, load_tokenizer
from merge.gates.report import MAX_CONDITION, LayerReport, gate_report
from merge.gates.store import gates_key, gates_path, load_gates, save_gates, write_gates

__all__ = [
    "MAX_CONDITION",
    "MODES",
    "RANDOM_MODES",
    "ExpertPrompts",
    "LayerReport",
    "PromptError",
    "base_files",
    "calibrate",
    "gate_report",
    "gates_key",
    "gates_path",
    "load_gates",
    "load_tokenizer",
    "random_gates",
    "save_gates",
    "write_gates",
]
