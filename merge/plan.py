"""The plan: a recipe plus the headers of its sources, worked out to every tensor of the result.

A plain value. The preview counts it, the writer evaluates it, the GGUF writer wraps it; none of them decides anything again.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge import findings as f
from merge.checkpoint import TOKENIZER_FILES, Checkpoint, TensorInfo
from merge.dtypes import TORCH_NAME, WEIGHT_DTYPES, from_config
from merge.errors import RecipeError
from merge.expr import Expr, Gate, Noise, Read, Scale, cast, elements, nbytes, reads
from merge.families import FAMILIES, Family, family_for, find_family
from merge.families.dense import MLP_PARTS, ConfigError, DenseModel, dense_model, mlp_tensor
from merge.recipe import RANDOM_GATES, Expert, LoadedRecipe
from merge.reference import ModelReference, parse_reference


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
    config.json, `companions` the files copied from the base. `unused` counts, by source key, the tensors that no output
    reads.
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
    companions: tuple[str, ...]
    parameters: Parameters
    unused: Mapping[str, int]
    findings: tuple[f.Finding, ...]
    license: str | None
    quants: tuple[str, ...]
    gate_mode: str

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(nbytes(tensor.expr) for tensor in self.tensors)

    @property
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
        if self.gate_mode not in RANDOM_GATES:
            base = self.sources[self.base].tensors or {}
            needed[self.base].update(info.file for info in base.values() if info.file is not None)
        return {key: tuple(sorted(files)) for key, files in needed.items()}

    @property
    def download_bytes(self) -> int:
        """Bytes to fetch from the Hub before the merge; what is on this machine already counts nothing."""
        return sum(
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


def build_plan(loaded: LoadedRecipe, checkpoints: Mapping[ModelReference, Checkpoint]) -> MergePlan:
    """Work out the plan of `loaded` over its opened sources.

    Raises RecipeError with all findings where the sources cannot make what the recipe asks for.
    """
    return _Planner(loaded, checkpoints).plan()


class _Planner:
    """One recipe being planned: collects findings until nothing sensible can follow, then stops."""

    def __init__(self, loaded: LoadedRecipe, checkpoints: Mapping[ModelReference, Checkpoint]) -> None:
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.base = checkpoints[parse_reference(self.recipe.base_model)]
        self.experts = [checkpoints[parse_reference(expert.source_model)] for expert in self.recipe.experts]
        self.found: list[f.Finding] = list(loaded.findings)

    def plan(self) -> MergePlan:
        family, why = self.family()
        base, experts = self.dense_models(family)
        self.compare(base, experts)
        dtype = self.dtype()
        base_tensors = self.headers(self.base, base, self.loaded.line("base_model"), dtype)
        expert_tensors = [
            self.headers(checkpoint, model, self.expert_line(index), dtype, mlp_only=True)
            for index, (checkpoint, model) in enumerate(zip(self.experts, experts, strict=True))
        ]
        self.check_places(family, base, base_tensors)
        self.stop_on_errors()
        sources = {checkpoint.key: checkpoint for checkpoint in (self.base, *self.experts)}
        tensors = tuple(self.output(family, base, base_tensors, expert_tensors, dtype))
        if not set(TOKENIZER_FILES[:3:2]) & set(self.base.files) and self.base.why_no_headers is None:
            self.add(f.TokenizerMissing(self.loaded.line("base_model"), model=self.base.name))
        sources = _with_tensors(sources, {self.base.key: base_tensors})
        return MergePlan(
            name=self.loaded.name,
            family=family.NAME,
            family_title=family.TITLE,
            why_family=why,
            dtype=dtype,
            config=family.output_config(base, len(experts), self.recipe.experts_per_token, TORCH_NAME[dtype]),
            tensors=tensors,
            sources=sources,
            base=self.base.key,
            experts=tuple(checkpoint.key for checkpoint in self.experts),
            companions=self.base.companions,
            parameters=_count(tensors, len(experts), self.recipe.experts_per_token, base),
            unused=_unused(sources, tensors),
            findings=tuple(sorted(dict.fromkeys(self.found), key=lambda finding: finding.line or 0)),
            license=self.license(),
            quants=self.recipe.release.quants,
            gate_mode=self.recipe.gate_mode,
        )

    # ------------------------------------------------------------------------------------------------------- findings

    def add(self, finding: f.Finding) -> None:
        self.found.append(finding)

    def stop_on_errors(self) -> None:
        if any(finding.level == f.ERROR for finding in self.found):
            found = sorted(dict.fromkeys(self.found), key=lambda finding: finding.line or 0)
            raise RecipeError(found, str(self.loaded.path))

    def expert_line(self, index: int) -> int | None:
        return self.loaded.line("experts", index, "source_model")

    def places(self) -> Iterator[tuple[Checkpoint, int | None]]:
        """Each source once, with the line that names it first."""
        yield self.base, self.loaded.line("base_model")
        seen = {self.base.key}
        for index, checkpoint in enumerate(self.experts):
            if checkpoint.key not in seen:
                seen.add(checkpoint.key)
                yield checkpoint, self.expert_line(index)

    # ---------------------------------------------------------------------------------------- the models and their headers

    def family(self) -> tuple[Family, str]:
        """The family of the result, and why it is that."""
        asked = self.recipe.architecture
        model_type = self.base.config.get("model_type")
        if asked is not None:
            family, why = find_family(asked), "the recipe says so"
            if family is None:
                names = [known.NAME for known in FAMILIES]
                near = difflib.get_close_matches(asked.lower(), names, n=1)
                hint = f"; perhaps you meant {near[0]!r}" if near else ""
                line = self.loaded.line("architecture")
                self.add(f.UnknownFamily(line, value=asked, hint=hint, choices=", ".join(names)))
        else:
            family, why = family_for(str(model_type)), f"the base is a {model_type} model"
            family = family or FAMILIES[0]
        self.stop_on_errors()
        assert family is not None
        return family, why

    def dense_models(self, family: Family) -> tuple[DenseModel, list[DenseModel]]:
        models: dict[str, DenseModel] = {}
        for checkpoint, line in self.places():
            model_type = checkpoint.config.get("model_type")
            if checkpoint.config.get("auto_map"):
                self.add(f.CustomCode(line, model=checkpoint.name))
            elif model_type not in family.ACCEPTS:
                accepted = " and ".join(family.ACCEPTS)
                shown = str(model_type)
                self.add(
                    f.UnsupportedModel(
                        line, model=checkpoint.name, model_type=shown, family=family.TITLE, accepted=accepted
                    )
                )
            else:
                try:
                    models[checkpoint.key] = dense_model(checkpoint.config)
                except ConfigError as error:
                    self.add(f.BadConfig(line, model=checkpoint.name, problem=str(error)))
            if checkpoint.why_no_headers == "pickle":
                self.add(f.PickleOnly(line, model=checkpoint.name))
            elif checkpoint.why_no_headers is not None:
                self.add(f.HeadersMissing(line, model=checkpoint.name))
        self.stop_on_errors()
        return models[self.base.key], [models[checkpoint.key] for checkpoint in self.experts]

    def compare(self, base: DenseModel, experts: list[DenseModel]) -> None:
        """What an expert must share with the base, and what it should."""
        for index, expert in enumerate(experts):
            line, model = self.expert_line(index), self.experts[index].name
            for key, value, base_value in (
                ("hidden_size", expert.hidden_size, base.hidden_size),
                ("intermediate_size", expert.intermediate_size, base.intermediate_size),
                ("num_hidden_layers", expert.layers, base.layers),
            ):
                if value != base_value:
                    self.add(f.ShapeMismatch(line, model=model, key=key, value=value, base_value=base_value))
            if expert.hidden_act != base.hidden_act:
                self.add(f.ActivationMismatch(line, model=model, value=expert.hidden_act, base_value=base.hidden_act))
            if expert.rope != base.rope:
                self.add(f.RopeMismatch(line, model=model, value=expert.rope, base_value=base.rope))
        self.stop_on_errors()

    def dtype(self) -> str:
        """The result's dtype: the recipe's, else the base's own."""
        if self.recipe.dtype:
            return from_config(self.recipe.dtype) or "BF16"
        stated = from_config(self.base.config.get("torch_dtype") or self.base.config.get("dtype"))
        embedding = (self.base.tensors or {}).get("model.embed_tokens.weight")
        return stated or (embedding.dtype if embedding is not None and embedding.dtype in WEIGHT_DTYPES else "BF16")

    def headers(
        self, checkpoint: Checkpoint, model: DenseModel, line: int | None, dtype: str, mlp_only: bool = False
    ) -> dict[str, TensorInfo]:
        """The tensors of a source that the merge may read: from its headers, or from its config where there are none."""
        expected = dict(model.tensors())
        if checkpoint.tensors is None:
            stored = from_config(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")) or "F32"
            return {name: TensorInfo(stored, shape) for name, shape in expected.items()}
        found: dict[str, TensorInfo] = {}
        for name, shape in expected.items():
            if mlp_only and ".mlp." not in name:
                continue
            info = checkpoint.tensors.get(name)
            if info is None:
                self.add(f.MissingTensor(line, model=checkpoint.name, tensor=name))
            elif info.shape != shape:
                shown, wanted = list(info.shape), list(shape)
                self.add(f.WrongTensorShape(line, model=checkpoint.name, tensor=name, shape=shown, expected=wanted))
            elif info.dtype not in WEIGHT_DTYPES:
                self.add(f.UnsupportedDtype(line, model=checkpoint.name, tensor=name, dtype=info.dtype))
            else:
                found[name] = info
            if len(self.found) > 50:  # a wrong config makes every tensor wrong: enough is said
                break
        self.stop_on_errors()
        stored_as = {info.dtype for info in found.values()}
        if lost := sorted(stored for stored in stored_as if _loses(stored, dtype)):
            self.add(f.PrecisionLost(line, model=checkpoint.name, stored=", ".join(lost), dtype=dtype))
        return found

    def check_places(self, family: Family, base: DenseModel, tensors: dict[str, TensorInfo]) -> None:
        """Every tensor of the base goes somewhere, and no expert has one in its MLP that could not."""
        for checkpoint, line in self.places():
            stored = set(checkpoint.tensors or {})
            if checkpoint is self.base:
                stored |= tensors.keys()  # what its config means, where it has no headers
            else:
                stored = {name for name in stored if ".mlp." in name}
            for name in sorted(stored):
                is_mlp_weight = ".mlp." in name and name.endswith(".weight") and name.split(".")[-2] in MLP_PARTS
                if not (is_mlp_weight or base.is_ignored(name) or (family.keeps(name) and name in tensors)):
                    self.add(f.TensorWithoutPlace(line, tensor=name, model=checkpoint.name, family=family.TITLE))
                    break

    # ------------------------------------------------------------------------------------------------------- the result

    def output(
        self,
        family: Family,
        base: DenseModel,
        tensors: dict[str, TensorInfo],
        experts: list[dict[str, TensorInfo]],
        dtype: str,
    ) -> Iterator[OutputTensor]:
        """The result's tensors, in the order of the base's layers."""
        for name, _ in base.tensors():
            if family.keeps(name):
                info = tensors[name]
                yield OutputTensor(name, cast(Read(self.base.key, name, info.dtype, info.shape), dtype))
                continue
            layer, part = int(name.split(".")[2]), name.split(".")[4]
            if part == MLP_PARTS[0]:
                yield OutputTensor(family.router_tensor(layer), Gate(layer, dtype, (len(experts), base.hidden_size)))
            for index, expert in enumerate(self.recipe.experts):
                output_name = family.expert_tensor(layer, index, part)
                info = experts[index][mlp_tensor(layer, part)]
                read = Read(self.experts[index].key, mlp_tensor(layer, part), info.dtype, info.shape)
                yield OutputTensor(output_name, cast(self.altered(expert, part, read, output_name), dtype))

    def altered(self, expert: Expert, part: str, x: Expr, output_name: str) -> Expr:
        """`noise_scale` adds noise to each matrix of the expert, `residual_scale` then scales the one that writes to the
        residual stream: mergekit's meaning and order."""
        if expert.noise_scale:
            x = Noise(x, expert.noise_scale, f"{self.recipe.identity()}:{self.recipe.build.seed}:{output_name}")
        if expert.residual_scale is not None and part == "down_proj":
            x = Scale(x, expert.residual_scale)
        return x

    def license(self) -> str | None:
        """The recipe's licence, or the one that all sources share."""
        if self.recipe.release.license:
            return self.recipe.release.license
        licenses = {checkpoint.license for checkpoint in (self.base, *self.experts)}
        return licenses.pop() if len(licenses) == 1 else None


def _with_tensors(
    sources: dict[str, Checkpoint], tensors: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, Checkpoint]:
    """Sources without headers take the tensors that follow from their config, so that the plan can be counted."""
    return {
        key: replace(source, tensors=tensors[key]) if source.tensors is None and key in tensors else source
        for key, source in sources.items()
    }


def _count(tensors: tuple[OutputTensor, ...], experts: int, per_token: int, base: DenseModel) -> Parameters:
    total = sum(elements(tensor.expr) for tensor in tensors)
    per_expert = base.layers * 3 * base.hidden_size * base.intermediate_size
    shared = total - experts * per_expert
    return Parameters(total, shared + per_token * per_expert, shared, per_expert)


def _unused(sources: Mapping[str, Checkpoint], tensors: tuple[OutputTensor, ...]) -> dict[str, int]:
    used: dict[str, set[str]] = {key: set() for key in sources}
    for tensor in tensors:
        for read in reads(tensor.expr):
            used[read.source].add(read.tensor)
    return {key: len(set(source.tensors or {}) - used[key]) for key, source in sources.items()}


def _loses(stored: str, dtype: str) -> bool:
    """Whether rounding from `stored` to `dtype` loses something."""
    return stored != dtype and dtype != "F32"
