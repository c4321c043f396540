"""Works out a plan: opens nothing and writes nothing, but checks that the sources can make what the recipe asks for.

Everything that can be wrong between a recipe and its sources' headers is found here, with the line of the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from merge import findings as f
from merge.adapters import Delta, mlp_deltas
from merge.checkpoint import TOKENIZER_FILES, Checkpoint
from merge.dtypes import TORCH_NAME, WEIGHT_DTYPES, from_config
from merge.errors import RecipeError
from merge.expr import Expr, Gate, LowRank, Noise, Read, Scale, cast, elements, reads
from merge.families import FAMILIES, families_for, families_named
from merge.families.dense import ConfigError, DenseModel, dense_model, mlp_tensor
from merge.families.family import GATED_SHARED, NO_SHARED, PLAIN_SHARED, Block, Family, Mixture, Mlp
from merge.families.model_types import MLP_PARTS
from merge.licenses import derived, license_findings, source_terms
from merge.plan import MergePlan, OutputTensor, Parameters
from merge.recipe import DISCRIMINANT, Expert, LoadedRecipe
from merge.reference import ModelReference, parse_reference
from merge.tensors import TensorInfo


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
        self.shared_experts = self.recipe.shared_experts or ()
        self.shared = [checkpoints[parse_reference(expert.source_model)] for expert in self.shared_experts]
        self.found: list[f.Finding] = list(loaded.findings)
        if self.base.adapter is not None:
            self.add(f.AdapterOnBase(loaded.line("base_model"), model=self.recipe.base_model))
        # By source key and adapter key, what the adapter changes in the source's MLPs.
        self.deltas: dict[tuple[str, str], dict[str, Delta]] = {}

    def plan(self) -> MergePlan:
        family, why = self.family()
        models = self.dense_models(family)
        base = models[self.base.key]
        self.compare(base, models)
        dtype = self.dtype()
        base_tensors = self.headers(self.base, base, self.loaded.line("base_model"), dtype)
        tensors_of = {self.base.key: base_tensors}
        for checkpoint, line in self.places():
            if checkpoint is not self.base:
                model = models[checkpoint.key]
                tensors_of[checkpoint.key] = self.headers(checkpoint, model, line, dtype, mlp_only=True)
        self.check_places(family, base, base_tensors)
        mixture = Mixture(len(self.experts), self.recipe.experts_per_token, bool(self.shared), TORCH_NAME[dtype])
        self.check_family(family, base)
        why_no_gguf = family.why_no_gguf(base, mixture)
        if why_no_gguf is None and base.hidden_act != "silu":
            why_no_gguf = f"llama.cpp computes such models with silu, not with {base.hidden_act}"
        if why_no_gguf and self.recipe.release.quants:
            line = self.loaded.line("architecture") or self.loaded.line("base_model")
            self.add(f.NoGguf(line, family=family.TITLE, why=why_no_gguf))
        self.read_adapters(tensors_of)
        self.stop_on_errors()
        named = [self.base, *self.experts, *self.shared]
        sources = {checkpoint.key: checkpoint for checkpoint in (*named, *_adapters(named))}
        tensors = tuple(self.output(family, base, tensors_of, dtype))
        if not set(TOKENIZER_FILES[:3:2]) & set(self.base.files) and self.base.why_no_headers is None:
            self.add(f.TokenizerMissing(self.loaded.line("base_model"), model=self.base.name))
        sources = _with_tensors(sources, {self.base.key: base_tensors})
        experts_write, license = self.experts_write(), self.license()
        self.stop_on_errors()
        return MergePlan(
            name=self.loaded.name,
            family=family.NAME,
            family_title=family.TITLE,
            why_family=why,
            dtype=dtype,
            config=family.output_config(base, mixture),
            tensors=tensors,
            sources=sources,
            base=self.base.key,
            experts=tuple(_part(checkpoint).key for checkpoint in self.experts),
            experts_per_token=self.recipe.experts_per_token,
            shared_experts=tuple(_part(checkpoint).key for checkpoint in self.shared),
            gated=self.gated(family),
            companions=self.base.companions,
            parameters=_count(tensors, mixture, base),
            unused=_unused(sources, tensors),
            findings=tuple(sorted(dict.fromkeys(self.found), key=lambda finding: finding.line or 0)),
            license=license,
            quants=() if why_no_gguf else self.recipe.release.quants,
            gate_mode=self.recipe.gate_mode,
            experts_write=experts_write,
            why_no_gguf=why_no_gguf,
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

    def shared_line(self, *path: str | int) -> int | None:
        return self.loaded.line("shared_experts", *path)

    def places(self) -> Iterator[tuple[Checkpoint, int | None]]:
        """Each source once, with the line that names it first."""
        yield self.base, self.loaded.line("base_model")
        seen = {self.base.key}
        for checkpoint, line in self.expert_places():
            if checkpoint.key not in seen:
                seen.add(checkpoint.key)
                yield checkpoint, line

    def expert_places(self) -> Iterator[tuple[Checkpoint, int | None]]:
        """The source of every expert, with the line that names it."""
        for index, checkpoint in enumerate(self.experts):
            yield checkpoint, self.expert_line(index)
        for index, checkpoint in enumerate(self.shared):
            yield checkpoint, self.shared_line(index, "source_model")

    # ---------------------------------------------------------------------------------------- the models and their headers

    def family(self) -> tuple[Family, str]:
        """The family of the result, and why it is that: what `architecture` names, or else the first that takes the base and
        the recipe's shared experts, as mergekit chooses."""
        asked = self.recipe.architecture
        model_type = str(self.base.config.get("model_type"))
        known, why = list(FAMILIES), f"the base is a {model_type} model"
        if asked is not None:
            known, why = families_named(asked), "the recipe says so"
            if not known:
                names = [family.NAME for family in FAMILIES]
                near = difflib.get_close_matches(asked.lower(), names, n=1)
                hint = f"; perhaps you meant {near[0]!r}" if near else ""
                line = self.loaded.line("architecture")
                self.add(f.UnknownFamily(line, value=asked, hint=hint, choices=", ".join(names)))
                self.stop_on_errors()
        taking = [family for family in known if family in families_for(model_type)] or known
        fitting = [family for family in taking if not self.shared_findings(family)]
        if not fitting:
            family = next((family for family in taking if self.shared and family.SHARED != NO_SHARED), taking[0])
            self.found += self.shared_findings(family)
            return family, why
        if fitting[0] is not taking[0] and asked is None:
            prompts = "with" if self.shared_experts[0].positive_prompts else "without"
            why += f" and the recipe has a shared expert {prompts} prompts"
        return fitting[0], why

    def shared_findings(self, family: Family) -> list[f.Finding]:
        """What a family cannot do with the recipe's shared experts: mergekit's rules."""
        experts, limit = self.shared_experts, int(family.SHARED != NO_SHARED)
        if len(experts) > limit:
            shown = ("no shared expert", "one shared expert at most")[limit]
            return [f.TooManySharedExperts(self.shared_line(), count=len(experts), family=family.TITLE, limit=shown)]
        found: list[f.Finding] = []
        for index, expert in enumerate(experts):
            if family.SHARED == GATED_SHARED and self.recipe.needs_prompts and not expert.positive_prompts:
                mode = self.recipe.gate_mode
                found.append(f.SharedPromptsMissing(self.shared_line(index), family=family.TITLE, mode=mode))
            if family.SHARED == PLAIN_SHARED and (expert.positive_prompts or expert.negative_prompts):
                found.append(f.SharedPromptsUnused(self.shared_line(index), family=family.TITLE))
        return found

    def gated(self, family: Family) -> tuple[Expert, ...]:
        """The experts that the gates have a row of."""
        return (*self.recipe.experts, *(self.shared_experts if family.SHARED == GATED_SHARED else ()))

    def dense_models(self, family: Family) -> dict[str, DenseModel]:
        """By source key, what each config.json says."""
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
        return models

    def compare(self, base: DenseModel, models: Mapping[str, DenseModel]) -> None:
        """What an expert must share with the base, and what it should."""
        for checkpoint, line in self.places():
            expert, model = models[checkpoint.key], checkpoint.name
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
            if expert.vocab_size != base.vocab_size:
                self.add(f.OtherVocabulary(line, model=model, value=expert.vocab_size, base_value=base.vocab_size))
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

    def read_adapters(self, tensors: Mapping[str, Mapping[str, TensorInfo]]) -> None:
        """What each expert's adapter changes. `tensors` are the headers, by source key."""
        models = {checkpoint.key for checkpoint, _ in self.places()}
        for checkpoint, line in self.expert_places():
            adapter = checkpoint.adapter
            if adapter is None or (checkpoint.key, adapter.key) in self.deltas:
                continue
            if adapter.key in models:
                problem = "the recipe also names it as a model of its own"
                self.add(f.AdapterUnusable(line, adapter=adapter.name, problem=problem))
            self.deltas[checkpoint.key, adapter.key], found = mlp_deltas(checkpoint, tensors[checkpoint.key], line)
            self.found += found

    def check_family(self, family: Family, base: DenseModel) -> None:
        """What the result cannot do as the base did, tensors aside."""
        line, model, title = self.loaded.line("base_model"), self.base.name, family.TITLE
        for what in family.lacks(base):
            self.add(f.SettingWithoutPlace(line, model=model, what=what, family=title))
        per_token, count = self.recipe.experts_per_token, len(self.experts)
        if not family.NORMALISES and per_token < count:
            others = [
                other.NAME
                for other in families_for(base.model_type)
                if other.NORMALISES and _holds(other, base) and not self.shared_findings(other)
            ]
            hint = f", or use architecture {others[0]!r}" if others else ""
            self.add(
                f.WeightsNotNormalised(
                    self.loaded.line("experts_per_token"), family=title, per_token=per_token, experts=count, hint=hint
                )
            )
        for index, expert in enumerate(self.shared_experts):
            if expert.residual_scale is None:
                self.add(f.SharedAtFullStrength(self.shared_line(index)))
        window = base.sliding_window
        if window is not None and window < base.max_position_embeddings and not family.WINDOW:
            self.add(f.WindowLost(line, model=model, family=title, window=window))

    # ------------------------------------------------------------------------------------------------------- the result

    def output(
        self, family: Family, base: DenseModel, tensors: Mapping[str, Mapping[str, TensorInfo]], dtype: str
    ) -> Iterator[OutputTensor]:
        """The result's tensors, in the order of the base's layers. `tensors` are the headers, by source key."""
        for name, _ in base.tensors():
            if family.keeps(name):
                info = tensors[self.base.key][name]
                yield OutputTensor(name, cast(Read(self.base.key, name, info.dtype, info.shape), dtype))
            elif name.split(".")[4] == MLP_PARTS[0]:
                block = self.block(int(name.split(".")[2]), family, base, tensors, dtype)
                for output_name, x in family.block_tensors(block):
                    yield OutputTensor(output_name, x)

    def block(
        self,
        layer: int,
        family: Family,
        base: DenseModel,
        tensors: Mapping[str, Mapping[str, TensorInfo]],
        dtype: str,
    ) -> Block:
        """The mixture of one layer."""

        def mlp(checkpoint: Checkpoint, expert: Expert, name: str) -> Mlp:
            found: dict[str, Expr] = {}
            for part in MLP_PARTS:
                info = tensors[checkpoint.key][mlp_tensor(layer, part)]
                read = Read(checkpoint.key, mlp_tensor(layer, part), info.dtype, info.shape)
                adapted = self.adapted(checkpoint, read)
                found[part] = cast(self.altered(expert, part, adapted, f"layers.{layer}.{name}.{part}"), dtype)
            return found

        pairs = zip(self.experts, self.recipe.experts, strict=True)
        shared = [mlp(x, expert, "shared") for x, expert in zip(self.shared, self.shared_experts, strict=True)]
        gate = Gate(layer, dtype, (1, base.hidden_size), first=len(self.experts))
        return Block(
            layer=layer,
            base=base,
            dtype=dtype,
            router=Gate(layer, dtype, (len(self.experts), base.hidden_size)),
            experts=tuple(mlp(x, expert, f"experts.{index}") for index, (x, expert) in enumerate(pairs)),
            shared=shared[0] if shared else None,
            shared_gate=gate if shared and family.SHARED == GATED_SHARED else None,
        )

    def adapted(self, checkpoint: Checkpoint, read: Read) -> Expr:
        """A matrix of a source with the delta that the source's adapter has for it."""
        adapter = checkpoint.adapter
        delta = self.deltas[checkpoint.key, adapter.key].get(read.tensor) if adapter is not None else None
        if adapter is None or delta is None:
            return read
        infos = adapter.tensors or {}
        b, a = (Read(adapter.key, name, infos[name].dtype, infos[name].shape) for name in (delta.b, delta.a))
        return LowRank(read, b, a, delta.scale)

    def altered(self, expert: Expert, part: str, x: Expr, place: str) -> Expr:
        """`noise_scale` adds noise to each matrix of the expert, `residual_scale` then scales the one that writes to the
        residual stream: mergekit's meaning and order."""
        if expert.noise_scale:
            x = Noise(x, expert.noise_scale, f"{self.recipe.identity()}:{self.recipe.build.seed}:{place}")
        if expert.residual_scale is not None and part == "down_proj":
            x = Scale(x, expert.residual_scale)
        return x

    def experts_write(self) -> bool:
        """Whether each expert writes text from its own prompts."""
        asked = self.recipe.gate_mode == DISCRIMINANT and self.recipe.router.expand == "experts"
        if asked:
            self.add(f.ExpertsWriteTheirOwn(self.loaded.line("router", "expand")))
        return asked

    def license(self) -> str | None:
        """The recipe's licence, or the one that fits all sources."""
        terms, release = source_terms(self.all_places()), self.recipe.release
        line = self.loaded.line("release", "license")
        self.found += license_findings(terms, release.license, line, release.repo, self.loaded.line("release", "repo"))
        return release.license or derived(terms)

    def all_places(self) -> Iterator[tuple[Checkpoint, int | None]]:
        """The base and every expert, each with the line that names it."""
        yield self.base, self.loaded.line("base_model")
        yield from self.expert_places()


def _adapters(sources: Iterable[Checkpoint]) -> list[Checkpoint]:
    return [source.adapter for source in sources if source.adapter is not None]


def _part(source: Checkpoint) -> Checkpoint:
    """What makes a source this expert: its adapter where it has one."""
    return source.adapter or source


def _with_tensors(
    sources: dict[str, Checkpoint], tensors: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, Checkpoint]:
    """Sources without headers take the tensors that follow from their config, so that the plan can be counted."""
    return {
        key: replace(source, tensors=tensors[key]) if source.tensors is None and key in tensors else source
        for key, source in sources.items()
    }


def _holds(family: Family, base: DenseModel) -> bool:
    """Whether a family has a place for all that the base has."""
    return not any(family.lacks(base)) and all(
        family.keeps(name) or (".mlp." in name and name.endswith(".weight")) for name, _ in base.tensors()
    )


def _count(tensors: tuple[OutputTensor, ...], mixture: Mixture, base: DenseModel) -> Parameters:
    total = sum(elements(tensor.expr) for tensor in tensors)
    per_expert = base.layers * 3 * base.hidden_size * base.intermediate_size
    shared = total - mixture.experts * per_expert
    return Parameters(total, shared + mixture.per_token * per_expert, shared, per_expert)


def _unused(sources: Mapping[str, Checkpoint], tensors: tuple[OutputTensor, ...]) -> dict[str, int]:
    used: dict[str, set[str]] = {key: set() for key in sources}
    for tensor in tensors:
        for read in reads(tensor.expr):
            used[read.source].add(read.tensor)
    return {key: len(set(source.tensors or {}) - used[key]) for key, source in sources.items()}


def _loses(stored: str, dtype: str) -> bool:
    """Whether rounding from `stored` to `dtype` loses something."""
    return stored != dtype and dtype != "F32"
