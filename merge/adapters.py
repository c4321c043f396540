"""LoRA adapters as PEFT saves them: which matrix of the model each changes, and by how much.

An adapter changes a matrix W to W + s B A, with s = alpha / r (or alpha / sqrt(r) for rank-stabilised LoRA). Whatever else a
configuration can ask for computes something else, so what is not known here is refused, not ignored.

Files: https://huggingface.co/docs/peft/developer_guides/checkpoint
Configuration: https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
Rank-stabilised LoRA: https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.dtypes import WEIGHT_DTYPES
from merge.tensors import TensorInfo

# Keys that do not change what a saved adapter means: training, initialisation, provenance, and the choice of the modules,
# which the tensors' names tell.
NEUTRAL = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "modules_to_save", "peft_type",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
        "trainable_token_indices",
    }
)  # fmt: skip
READ = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"})
# Why a key that is set makes an adapter another thing than W + s B A.
REFUSED = {
    "use_dora": "it is a DoRA adapter, which rescales each row of the merged matrix",
    "fan_in_fan_out": "it is made for transposed matrices (fan_in_fan_out)",
    "lora_bias": "its low-rank matrices have a bias (lora_bias)",
    "layer_replication": "it repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "it works from certain tokens on only (alora_invocation_tokens)",
    "target_parameters": "it changes parameters that belong to no module (target_parameters)",
    "use_qalora": "it is made for quantised groups (use_qalora)",
}
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) change the base's own weights at the
# start of the training, and the adapter fits those only.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# A regular expression without what makes one slow: no groups, and two repetitions at most.
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.|\\d)*(?:(?:\.\*|\\d\+)(?:[A-Za-z0-9_-]|\\?\.|\\d)*){0,2}\$?")
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
MAX_PATTERNS = 100


class AdapterError(ValueError):
    """An adapter that cannot be used: the message says why, of "it"."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix: `scale` times tensor `b` (rows, r) times tensor `a` (r, columns)."""

    a: str
    b: str
    scale: float
    rank: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Adapter:
    """`deltas` by the name of the base's tensor that each changes, and the adapter's tensors that are none of them: whole
    modules (modules_to_save), biases, embeddings."""

    deltas: Mapping[str, Delta]
    others: tuple[str, ...]


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """The deltas of an adapter, from its configuration and headers. Raises AdapterError."""
    config = checkpoint.config
    _check(config)
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for name in checkpoint.tensors or {}:
        match = _TENSOR.fullmatch(name)
        if match is None:
            others.append(name)
        elif match["side"] in pairs.setdefault(match["module"], {}):
            raise AdapterError(f"it has two matrices {match['side']} for {match['module']!r}")
        else:
            pairs[match["module"]][match["side"]] = name
    ranks, alphas = _Patterns(config, "rank_pattern"), _Patterns(config, "alpha_pattern")
    deltas = {}
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"it has only one of the two matrices for {module!r}")
        rank = _positive(ranks.value(module, config.get("r", 8)), "r")
        alpha = _positive(alphas.value(module, config.get("lora_alpha", 8)), "lora_alpha")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        deltas[f"{module}.weight"] = _delta(checkpoint, pair["A"], pair["B"], scale, rank)
    return Adapter(deltas, tuple(others))


def mlp_deltas(
    checkpoint: Checkpoint, matrices: Mapping[str, TensorInfo], line: int | None
) -> tuple[dict[str, Delta], list[f.Finding]]:
    """What the adapter of a source changes in its MLPs, by the tensor's name, and what there is to say about the rest of it.

    `matrices` are the source's tensors, `line` is where the recipe names it. A source without an adapter changes nothing.
    """
    adapter = checkpoint.adapter
    if adapter is None:
        return {}, []
    try:
        if adapter.tensors is None:
            raise AdapterError("its weights (adapter_model.safetensors) are not there")
        found = read_adapter(adapter)
        used = {name: delta for name, delta in found.deltas.items() if ".mlp." in name}
        for name, delta in used.items():
            matrix = matrices.get(name)
            if matrix is None:
                raise AdapterError(f"it changes {name!r}, which {checkpoint.name} does not have")
            if matrix.shape != delta.shape:
                shapes = f"{list(delta.shape)}, not {list(matrix.shape)}"
                raise AdapterError(f"it is made for another model than {checkpoint.name}: {name!r} is {shapes}")
        for name in found.others:
            if ".mlp." in name:
                raise AdapterError(f"its tensor {name!r} is no low-rank delta of an MLP matrix")
        for tensor in (tensor for delta in used.values() for tensor in (delta.a, delta.b)):
            if (dtype := adapter.tensors[tensor].dtype) not in WEIGHT_DTYPES:
                raise AdapterError(f"its tensor {tensor!r} is stored as {dtype}")
    except AdapterError as error:
        return {}, [f.AdapterUnusable(line, adapter=adapter.name, problem=str(error))]
    rest = [name for name in found.deltas if name not in used] + list(found.others)
    parts = ", ".join(sorted({_part(name) for name in rest})) or "nothing at all"
    said: list[f.Finding] = []
    if not used:
        said.append(f.AdapterWithoutMlp(line, adapter=adapter.name, parts=parts, model=checkpoint.name))
    elif rest:
        said.append(f.AdapterPartlyUsed(line, adapter=adapter.name, parts=parts, used=len(used)))
    trained_on = adapter.config.get("base_model_name_or_path")
    if isinstance(trained_on, str) and _is_another(trained_on, checkpoint.name):
        said.append(
            f.AdapterOfAnotherBase(line, adapter=adapter.name, trained_on=trained_on[:100], model=checkpoint.name)
        )
    return used, said


def _part(tensor: str) -> str:
    """The kind of module a tensor belongs to: q_proj, lm_head, embed_tokens."""
    return re.sub(r"\.(?:lora_(?:embedding_)?[AB].*|weight|bias)$", "", tensor).split(".")[-1][:40]


def _is_another(trained_on: str, name: str) -> bool:
    """Whether two names of models on the Hub are different ones; of a folder nothing can be said."""
    mine = name.split("@")[0]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", trained_on) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", mine)
    return bool(on_hub) and trained_on.lower() != mine.lower()


def _delta(checkpoint: Checkpoint, a: str, b: str, scale: float, rank: float) -> Delta:
    assert checkpoint.tensors is not None
    a_shape, b_shape = checkpoint.tensors[a].shape, checkpoint.tensors[b].shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
        raise AdapterError(f"{a!r} and {b!r} have shapes {list(a_shape)} and {list(b_shape)}, which do not multiply")
    if a_shape[0] != rank:
        raise AdapterError(f"its configuration says rank {rank:g}, {a!r} has {a_shape[0]}")
    return Delta(a, b, scale, a_shape[0], (b_shape[0], a_shape[1]))


def _check(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"it is a {str(config.get('peft_type'))[:40]!r} adapter; only LORA adapters can be merged")
    for key, value in config.items():
        if key in NEUTRAL or key in READ or not value:
            continue
        raise AdapterError(REFUSED.get(key, f"its configuration sets {key[:60]!r}, which is not known here"))
    if config.get("use_rslora") not in (None, True, False):
        raise AdapterError("its use_rslora is neither true nor false")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in INITIALISATIONS):
        raise AdapterError(
            f"it was initialised from its base ({str(start)[:40]}), whose weights that changed too; save it with "
            "path_initial_model_for_weight_conversion to make an ordinary adapter of it"
        )


class _Patterns:
    """`rank_pattern` or `alpha_pattern`: from the end of a module's name, or a regular expression for it, to a number; the
    first that fits counts, as in PEFT's `get_pattern_key`."""

    def __init__(self, config: Mapping[str, Any], key: str) -> None:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"its {key} is not a mapping")
        self._values: list[tuple[str | re.Pattern[str], Any]] = []
        expressions = 0
        for pattern, value in patterns.items():
            if _LITERAL.fullmatch(pattern):
                self._values.append((pattern, value))
                continue
            expressions += 1
            if len(pattern) > 200 or not _PATTERN.fullmatch(pattern) or expressions > MAX_PATTERNS:
                raise AdapterError(f"its {key} has the regular expression {pattern[:60]!r}, which is not read")
            self._values.append((re.compile(rf"(.*\.)?({pattern})$"), value))

    def value(self, module: str, default: Any) -> Any:
        for pattern, value in self._values:
            if isinstance(pattern, str):
                if module == pattern or module.endswith("." + pattern):
                    return value
            elif pattern.match(module):
                return value
        return default


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise AdapterError(f"its {key} is {str(value)[:40]}, which is not a positive number")
    return value
