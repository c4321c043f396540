"""Works out a plan: opens nothing and writes nothing, but checks that the sources can make what the recipe asks for.

Everything that can be wrong between a recipe and its sources' headers is found here, with the line of the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge import findings as f
from merge.adapters import Delta, mlp_deltas
from merge.checkpoint import TOKENIZER_FILES, Checkpoint
from merge.dtypes import TORCH_NAME, WEIGHT_DTYPES, from_config
from merge.errors import RecipeError
from merge.expr import elements, reads
from merge.families import (
    FAMILIES,
    LEAST_EXPERTS,
    NORM_IN_GGUF,
    WINDOW_IN_GGUF,
    WITHOUT_CLASS,
    families_for,
    families_named,
)
from merge.families.dense import DenseModel
from merge.families.family import GATED_SHARED, NO_SHARED, PLAIN_SHARED, Family, Mixture
from merge.families.mixture import MoeModel, mixed_config
from merge.licenses import derived, license_findings, source_terms
from merge.mixing import Mixing
from merge.plan import MergePlan, OutputTensor, Parameters
from merge.recipe import DISCRIMINANT, RANDOM_GATES, Expert, LoadedRecipe
from merge.reference import ModelReference, parse_reference
from merge.source_models import SourceModel, check_expert, headers, mixture_family, read_model
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
        models = self.models(family)
        base = models[self.base.key]
        self.compare(base.dense, models)
        mixture = self.mixture(family, base.mixture)
        dtype = self.dtype()
        self.read_headers(family, models, dtype)
        base = models[self.base.key]
        self.check_places(family, models)
        self.check_family(family, base, mixture)
        why_no_gguf = self.why_no_gguf(family, base.dense, mixture)
        self.read_adapters(models)
        self.stop_on_errors()
        named = [self.base, *self.experts, *self.shared]
        sources = {checkpoint.key: checkpoint for checkpoint in (*named, *_adapters(named))}
        seed = f"{self.recipe.identity()}:{self.recipe.build.seed}"
        pairs = list(zip(self.recipe.experts, self.experts, strict=True))
        shared = list(zip(self.shared_experts, self.shared, strict=True))
        mixing = Mixing(family, models, self.base.key, pairs, shared, self.deltas, dtype, seed)
        tensors = tuple(mixing.tensors())
        if not set(TOKENIZER_FILES[:3:2]) & set(self.base.files) and self.base.why_no_headers is None:
            self.add(f.TokenizerMissing(self.loaded.line("base_model"), model=self.base.name))
        sources = _with_tensors(sources, {self.base.key: base.tensors or {}})
        experts_whole, license = self.experts_whole() | self.experts_are_measured(), self.license()
        self.stop_on_errors()
        return MergePlan(
            name=self.loaded.name,
            family=family.NAME,
            family_title=family.TITLE,
            why_family=why,
            dtype=dtype,
            config=self.config(family, base, mixture),
            tensors=tensors,
            sources=sources,
            base=self.base.key,
            kept_experts=base.mixture.experts if base.mixture else 0,
            has_shared=mixture.has_shared,
            experts=tuple(_part(checkpoint).key for checkpoint in self.experts),
            experts_per_token=mixture.per_token,
            shared_experts=tuple(_part(checkpoint).key for checkpoint in self.shared),
            gated=self.gated(family),
            companions=self.base.companions,
            parameters=_count(tensors, mixture, base.dense),
            unused=_unused(sources, tensors),
            findings=tuple(sorted(dict.fromkeys(self.found), key=lambda finding: finding.line or 0)),
            license=license,
            quants=() if why_no_gguf else self.recipe.release.quants,
            gate_mode=self.recipe.gate_mode,
            models=tuple((x.key, x.adapter.key if x.adapter else None) for x in (*self.experts, *self.shared)),
            experts_whole=experts_whole,
            measures_worth=self.recipe.needs_prompts and self.recipe.evals.worth is True,
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
        mixed = mixture_family(self.base)
        if asked is not None:
            known, why = families_named(asked), "the recipe says so"
            if not known:
                names = [family.NAME for family in FAMILIES]
                near = difflib.get_close_matches(asked.lower(), names, n=1)
                hint = f"; perhaps you meant {near[0]!r}" if near else ""
                line = self.loaded.line("architecture")
                self.add(f.UnknownFamily(line, value=asked, hint=hint, choices=", ".join(names)))
                self.stop_on_errors()
        if mixed is not None:  # experts are added to it
            if mixed not in known:
                what = "experts can be added to it only as what it is"
                line = self.loaded.line("architecture")
                self.add(
                    f.OtherFamily(line, model=self.base.name, family=mixed.TITLE, result=known[0].TITLE, what=what)
                )
                self.stop_on_errors()
            self.found += self.shared_findings(mixed)
            return mixed, "the base is one already"
        taking = [family for family in known if family in families_for(model_type)] or known
        fitting = [family for family in taking if not self.shared_findings(family)]
        if not fitting:
            family = next((family for family in taking if self.shared and family.SHARED != NO_SHARED), taking[0])
            self.found += self.shared_findings(family)
            return family, why
        if fitting[0] is not taking[0] and asked is None:
            prompts = "with" if self.shared_experts[0].has_prompts else "without"
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
            if (
                family.SHARED == GATED_SHARED
                and self.recipe.needs_prompts
                and not (expert.has_prompts or self.recipe.router.prompts_file)
            ):
                mode = self.recipe.gate_mode
                found.append(f.SharedPromptsMissing(self.shared_line(index), family=family.TITLE, mode=mode))
            if family.SHARED == PLAIN_SHARED and (expert.has_prompts or expert.negative_prompts):
                found.append(f.SharedPromptsUnused(self.shared_line(index), family=family.TITLE))
        return found

    def gated(self, family: Family) -> tuple[Expert, ...]:
        """The experts that the gates have a row of."""
        return (*self.recipe.experts, *(self.shared_experts if family.SHARED == GATED_SHARED else ()))

    def models(self, family: Family) -> dict[str, SourceModel]:
        """By source key, what each config.json says."""
        models: dict[str, SourceModel] = {}
        for checkpoint, line in self.places():
            model, found = read_model(checkpoint, family, line)
            self.found += found
            if model is not None:
                models[checkpoint.key] = model
        for section, index, expert, checkpoint in self.chosen():
            if checkpoint.key in models:
                lines = self.loaded.line(section, index, "source_model"), self.loaded.line(section, index, "expert")
                if wrong := check_expert(models[checkpoint.key], expert.expert, *lines):
                    self.add(wrong)
        self.stop_on_errors()
        return models

    def chosen(self) -> Iterator[tuple[str, int, Expert, Checkpoint]]:
        """Every expert of the recipe: its section, its place there, and its source."""
        for section, experts, sources in (
            ("experts", self.recipe.experts, self.experts),
            ("shared_experts", self.shared_experts, self.shared),
        ):
            for index, (expert, checkpoint) in enumerate(zip(experts, sources, strict=True)):
                yield section, index, expert, checkpoint

    def mixture(self, family: Family, base: MoeModel | None) -> Mixture:
        """What the recipe asks for, on top of what a base that is a mixture has; and what there is to say about the numbers."""
        count, per_token = len(self.experts), self.recipe.experts_per_token
        if base is not None:
            count += base.experts
            if "experts_per_token" not in self.recipe.model_fields_set:
                per_token = base.per_token
        line = self.loaded.line("experts_per_token")
        if count < (least := LEAST_EXPERTS.get(family.NAME, 1)):
            problem = f"a {family.TITLE} model needs {least} experts at least"
            self.add(
                f.OutOfRange(self.loaded.line("experts"), key="the number of experts", value=count, problem=problem)
            )
        if count < per_token:
            self.add(f.TooFewExperts(line, per_token=per_token, experts=count))
        elif count == per_token:
            self.add(f.ManyExpertsPerToken(line, experts=count))
        self.found += self.same_experts(added=base is not None)
        self.stop_on_errors()
        has_shared = bool(self.shared) or bool(base and base.shared_size)
        return Mixture(count, per_token, has_shared, TORCH_NAME[self.dtype()])

    def same_experts(self, added: bool) -> Iterator[f.Finding]:
        """Experts that are the same model, and the same MLPs."""
        experts = self.recipe.experts
        models = [
            (source.key, source.adapter.key if source.adapter else None, expert.expert)
            for expert, source in zip(experts, self.experts, strict=True)
        ]
        if not added and len(models) > 1 and len(set(models)) == 1:
            line, model = self.loaded.line("experts"), experts[0].source_model
            yield f.AllExpertsSame(line, experts=len(models), model=model)
            return
        first_with: dict[Any, int] = {}
        for index, (expert, source) in enumerate(zip(experts, models, strict=True)):
            if expert.noise_scale:  # drawn for each expert anew
                continue
            what = (source, 1.0 if expert.residual_scale is None else expert.residual_scale)
            if what in first_with:
                line, first = self.expert_line(index), first_with[what] + 1
                yield f.SameExpertTwice(line, first=first, second=index + 1, model=expert.source_model)
            first_with.setdefault(what, index)

    def compare(self, base: DenseModel, models: Mapping[str, SourceModel]) -> None:
        """What an expert must share with the base, and what it should."""
        for checkpoint, line in self.places():
            expert, model = models[checkpoint.key].dense, checkpoint.name
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

    def read_headers(self, family: Family, models: dict[str, SourceModel], dtype: str) -> None:
        """Give each of `models` the tensors that the merge may read."""
        for checkpoint, line in self.places():
            model = models[checkpoint.key]
            chosen = {one.expert for _, _, one, source in self.chosen() if source.key == checkpoint.key}
            experts = [expert for expert in chosen if expert is not None]
            expected = model.expected(family, checkpoint is self.base, experts)
            tensors, found = headers(checkpoint, expected, line)
            self.found += found
            self.stop_on_errors()
            models[checkpoint.key] = replace(model, tensors=tensors)
            stored_as = {info.dtype for info in tensors.values()}
            if lost := sorted(stored for stored in stored_as if _loses(stored, dtype)):
                self.add(f.PrecisionLost(line, model=checkpoint.name, stored=", ".join(lost), dtype=dtype))

    def check_places(self, family: Family, models: Mapping[str, SourceModel]) -> None:
        """Every tensor of the base goes somewhere, and no expert has one in its MLP that could not."""
        for checkpoint, line in self.places():
            model, stored = models[checkpoint.key], set(checkpoint.tensors or {})
            used = model.tensors or {}
            if checkpoint is self.base:
                stored |= used.keys()  # what its config means, where it has no headers
            else:
                stored = {name for name in stored if ".mlp." in name or ".block_sparse_moe." in name}
            for name in sorted(stored):
                kept = family.keeps(name) and name in used
                if not (model.is_known(name) or model.dense.is_ignored(name) or kept):
                    self.add(f.TensorWithoutPlace(line, tensor=name, model=checkpoint.name, family=family.TITLE))
                    break

    def read_adapters(self, models: Mapping[str, SourceModel]) -> None:
        """What each expert's adapter changes."""
        for checkpoint, line in self.expert_places():
            adapter = checkpoint.adapter
            if adapter is None or (checkpoint.key, adapter.key) in self.deltas:
                continue
            if adapter.key in models:
                problem = "the recipe also names it as a model of its own"
                self.add(f.AdapterUnusable(line, adapter=adapter.name, problem=problem))
            if models[checkpoint.key].mixture is not None:
                problem = f"{checkpoint.name} is a mixture of experts, and only adapters of dense models can be merged"
                self.add(f.AdapterUnusable(line, adapter=adapter.name, problem=problem))
                continue
            matrices = models[checkpoint.key].tensors or {}
            self.deltas[checkpoint.key, adapter.key], found = mlp_deltas(checkpoint, matrices, line)
            self.found += found

    def check_family(self, family: Family, base: SourceModel, mixture: Mixture) -> None:
        """What the result cannot do as the base did, tensors aside."""
        for index, expert in enumerate(self.shared_experts):
            if expert.residual_scale is None:
                self.add(f.SharedAtFullStrength(self.shared_line(index)))
        mode, runs_result = self.recipe.gate_mode, self.recipe.gate_mode == DISCRIMINANT
        if family.NAME in WITHOUT_CLASS and (runs_result or (base.mixture is not None and mode not in RANDOM_GATES)):
            model = "the merged model" if runs_result else "the base"
            others = "gate_mode: random" if base.mixture is not None else "gate_mode: hidden, for example"
            line = self.loaded.line("gate_mode") or self.loaded.line("base_model")
            self.add(f.GateModeImpossible(line, mode=mode, model=model, family=family.TITLE, others=others))
        if base.mixture is not None:
            self.check_mixed_base(family, base.mixture, mixture)
        else:
            self.check_dense_base(family, base.dense, mixture)

    def check_mixed_base(self, family: Family, base: MoeModel, mixture: Mixture) -> None:
        """What there is to say about a base that is a mixture already."""
        line, model = self.loaded.line("base_model"), self.base.name
        if base.shared_size and self.shared_experts:
            self.add(f.SharedExpertKept(self.shared_line(), model=model, family=family.TITLE))
        if self.base.config.get("n_group", family.KEYS.defaults.get("n_group", 1)) not in (None, 1):
            problem = "its experts are chosen in groups (n_group), to which none can be added"
            self.add(f.BadConfig(line, model=model, problem=problem))
        scaled = self.base.config.get("norm_topk_prob", family.KEYS.defaults.get("norm_topk_prob", family.NORMALISES))
        fixed = family.NAME not in NORM_IN_GGUF and family.why_no_gguf(base.dense, mixture) is None
        if fixed and bool(scaled) != family.NORMALISES and mixture.per_token < mixture.experts:
            self.add(f.ReadersDisagree(line, model=model, value=str(bool(scaled)).lower(), family=family.TITLE))

    def check_dense_base(self, family: Family, base: DenseModel, mixture: Mixture) -> None:
        """What a mixture of this family cannot do as the dense base did."""
        line, model, title = self.loaded.line("base_model"), self.base.name, family.TITLE
        for what in family.lacks(base):
            self.add(f.SettingWithoutPlace(line, model=model, what=what, family=title))
        per_token, count = mixture.per_token, mixture.experts
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
        window = base.sliding_window
        if window is not None and window < base.max_position_embeddings and not family.WINDOW:
            self.add(f.WindowLost(line, model=model, family=title, window=window))

    def why_no_gguf(self, family: Family, base: DenseModel, mixture: Mixture) -> str | None:
        """Why no GGUF can be made; and where one can, what it cannot have."""
        why = family.why_no_gguf(base, mixture)
        if why is None and base.hidden_act != "silu":
            why = f"llama.cpp computes such models with silu, not with {base.hidden_act}"
        line, window = self.loaded.line("base_model"), base.sliding_window
        if not self.recipe.release.quants:
            return why
        if why is not None:
            self.add(f.NoGguf(self.loaded.line("architecture") or line, family=family.TITLE, why=why))
        elif family.WINDOW and family.NAME not in WINDOW_IN_GGUF and window and window < base.max_position_embeddings:
            self.add(f.GgufWithoutWindow(line, model=self.base.name, family=family.TITLE, window=window))
        return why

    # ------------------------------------------------------------------------------------------------------- the result

    def config(self, family: Family, base: SourceModel, mixture: Mixture) -> dict[str, Any]:
        """config.json of the result: a mixture's own, with more experts, or the family's."""
        if base.mixture is None:
            return family.output_config(base.dense, mixture)
        config = mixed_config(self.base.config, mixture.experts, mixture.per_token, mixture.torch_dtype)
        if self.shared_experts and (key := family.KEYS.shared_count):
            config[key] = 1  # the base has none: a shared expert beside its own is refused
        return config

    def experts_whole(self) -> bool:
        """Whether all of each expert is read: it writes text from its own prompts, or is measured as it is."""
        writes = self.recipe.gate_mode == DISCRIMINANT and self.recipe.router.expand == "experts"
        if writes:
            self.add(f.ExpertsWriteTheirOwn(self.loaded.line("router", "expand")))
        return writes or (self.recipe.needs_prompts and self.recipe.evals.worth is True)

    def experts_are_measured(self) -> bool:
        """Whether each expert is run on texts on its own."""
        asked = bool(self.recipe.evals.texts)
        if asked:
            self.add(f.ExpertsMeasuredWhole(self.loaded.line("evals", "texts")))
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


def _unused(sources: Mapping[str, Checkpoint], tensors: tuple[OutputTensor, ...]) -> dict[str, tuple[str, ...]]:
    used: dict[str, set[str]] = {key: set() for key in sources}
    for tensor in tensors:
        for read in reads(tensor.expr):
            used[read.source].add(read.tensor)
    return {key: tuple(sorted(set(source.tensors or {}) - used[key])) for key, source in sources.items()}


def _loses(stored: str, dtype: str) -> bool:
    """Whether rounding from `stored` to `dtype` loses something."""
    return stored != dtype and dtype != "F32"
