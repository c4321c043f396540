"""The plan: a recipe plus the headers of its sources, worked out to every tensor of the result.

A plain value. The preview counts it, the writer evaluates it, the GGUF writer wraps it; none of them decides anything again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.expr import Concat, Expr, Gate, Read, nbytes, pieces, reads
from merge.prompt_slices import PromptsRead
from merge.recipe import RANDOM_GATES, Expert


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the result: its name on the Hub and what it is made of."""

    name: str
    expr: Expr


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts. `active` are used for one token: the shared ones and `experts_per_token` experts."""

    total: int
    active: int
    shared: int
    per_expert: int


@dataclass(frozen=True)
class MergePlan:
    """Everything about the result that follows from the recipe and its sources' headers.

    `sources` maps the key that Read nodes name to the checkpoint; `base` is the key of the base. `config` is the result's
    config.json, `companions` the files copied from the base. `unused` names, by source key, the tensors that no output
    reads. `kept_experts` are the experts that a base which is a mixture has already; `experts` are those of the recipe, which
    stand behind them. `gated` are the recipe's experts that the calibrated gates have a row of, in the rows' order behind those
    of the kept experts: the experts, and a shared expert that has a gate. `slices` are the prompts
    that the recipe takes from datasets, by the section and the place in it of the expert.
    """

    name: str
    family: str
    family_title: str
    why_family: str
    dtype: str
    config: Mapping[str, Any]
    tensors: tuple[OutputTensor, ...]
    sources: Mapping[str, Checkpoint]
    base: str
    experts: tuple[str, ...]
    experts_per_token: int
    shared_experts: tuple[str, ...]
    gated: tuple[Expert, ...]
    companions: tuple[str, ...]
    parameters: Parameters
    unused: Mapping[str, tuple[str, ...]]
    findings: tuple[f.Finding, ...]
    license: str | None
    quants: tuple[str, ...]
    gate_mode: str
    # The model, and the adapter where it has one, that each expert and then each shared expert is from.
    models: tuple[tuple[str, str | None], ...] = ()
    # All of each expert is read: it writes text from its own short prompts, or is measured as it is.
    experts_whole: bool = False
    # What each expert is worth is measured at the end, because the recipe asks for it.
    measures_worth: bool = False
    slices: Mapping[tuple[str, int], PromptsRead] = field(default_factory=dict)
    why_no_gguf: str | None = None
    kept_experts: int = 0
    # A shared expert runs beside the others: the recipe's, or that of a base that is a mixture.
    has_shared: bool = False

    @property
    def expert_count(self) -> int:
        """The experts of each layer."""
        return self.kept_experts + len(self.experts)

    @property
    def kept_routers(self) -> dict[int, Expr]:
        """By layer, the rows of the router that belong to the kept experts: (kept experts, hidden)."""
        if not self.kept_experts:
            return {}
        routers = [x.xs for x in (tensor.expr for tensor in self.tensors) if isinstance(x, Concat)]
        return {new.layer: kept for kept, new in (xs for xs in routers if len(xs) == 2) if isinstance(new, Gate)}

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(nbytes(tensor.expr) for tensor in self.tensors)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the result's tensors that are a source's own, untouched."""
        return sum(nbytes(piece) for tensor in self.tensors for piece in pieces(tensor.expr) if isinstance(piece, Read))

    @cached_property
    def needed_files(self) -> dict[str, tuple[str, ...]]:
        """By source key, the files that a build reads: the shards with a tensor it uses, and the base's companions.
        Gates made from hidden states need the whole base."""
        needed: dict[str, set[str]] = {key: set() for key in self.sources}
        for tensor in self.tensors:
            for read in reads(tensor.expr):
                infos = self.sources[read.source].tensors
                file = infos[read.tensor].file if infos is not None else None
                if file is not None:
                    needed[read.source].add(file)
        needed[self.base].update(self.companions)
        for key in {key for pair in self.models for key in pair if key} if self.experts_whole else ():
            needed[key].update(self.whole(key))
        if self.gate_mode not in RANDOM_GATES:
            base = self.sources[self.base].tensors or {}
            needed[self.base].update(info.file for info in base.values() if info.file is not None)
        return {key: tuple(sorted(files)) for key, files in needed.items()}

    def whole(self, key: str) -> set[str]:
        """The files that a source is run from as it is."""
        source = self.sources[key]
        return {info.file for info in (source.tensors or {}).values() if info.file is not None} | set(source.companions)

    @property
    def needed_companions(self) -> dict[str, tuple[str, ...]]:
        """By source key, the small files that a build reads."""
        small = {file for source in self.sources.values() for file in source.companions}
        return {key: tuple(file for file in files if file in small) for key, files in self.needed_files.items()}

    @cached_property
    def download_bytes(self) -> int:
        """Bytes to fetch from the Hub before the merge; what is on this machine already counts nothing."""
        return sum(read.bytes for read in self.slices.values()) + sum(
            self.sources[key].files.get(file, 0)
            for key, files in self.needed_files.items()
            if self.sources[key].is_hub
            for file in files
        )

    @property
    def dense_tensors(self) -> dict[str, Expr]:
        """The dense base model itself, as bare reads: what gate calibration runs."""
        base = self.sources[self.base]
        return {name: Read(self.base, name, info.dtype, info.shape) for name, info in (base.tensors or {}).items()}

    def identity(self) -> str:
        """SHA-256 of the result, gates aside: equal plans over unchanged sources give equal files."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key in sorted(self.sources):
            digest.update(f"{key}\0{self.sources[key].fingerprint}\0".encode())
        for tensor in self.tensors:
            digest.update(f"{tensor.name}\0{tensor.expr!r}\0".encode())
        digest.update("\0".join(self.companions).encode())
        return digest.hexdigest()
