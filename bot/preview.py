"""What a recipe would give, from headers alone: parameters, sizes, licence, findings. Loads no weights and no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bot.differences import Difference
from bot.needs import Fit, fit, fit_findings, memory_bytes
from bot.runners import parse_runner, runner_findings
from cards.words import billions, counted, size
from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.errors import MoergeError, RecipeError, SourceError, SourcesUnavailable, UsageError
from merge.gates.prompts import PromptError
from merge.plan import MergePlan, Parameters
from merge.planner import build_plan
from merge.prompt_slices import PromptsRead, read_slice
from merge.recipe import DISCRIMINANT, RANDOM_GATES, LoadedRecipe, load_recipe
from merge.reference import parse_reference
from merge.sources import LocalNotAllowedError, Sources
from quants.layout import Sizes, predict_sizes

DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Preview:
    """One recipe's preview. Everything after `findings` is None or empty where the recipe or its sources have an error; bytes to
    download and of disk also where a source has no weights to build from. `bug` says what went wrong here, if anything."""

    recipe: str
    name: str
    findings: tuple[f.Finding, ...]
    family: str | None = None
    parameters: Parameters | None = None
    checkpoint_bytes: int | None = None
    gguf_bytes: dict[str, int] | None = None
    download_bytes: int | None = None
    build_disk_bytes: int | None = None
    build_memory_bytes: int | None = None
    gguf_tensor_bytes: dict[str, int] | None = None
    license: str | None = None
    plan: MergePlan | None = None
    fit: Fit | None = None
    source_failed: bool = False
    bug: str | None = None
    # What the pull request or the working tree does to it, and how it differs from what was there before.
    change: str | None = None
    against: tuple[Difference, ...] = ()

    @property
    def has_errors(self) -> bool:
        return any(finding.level == f.ERROR for finding in self.findings)

    @property
    def code(self) -> int:
        """The exit code that this preview asks for."""
        if self.bug is not None:
            return MoergeError.exit_code
        if not self.has_errors:
            return 0
        return SourcesUnavailable.exit_code if self.source_failed else RecipeError.exit_code

    def strict(self) -> Preview:
        """The same with every warning an error."""
        return replace(self, findings=tuple(finding.strict() for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """The object that `preview --json` prints."""
        return {
            "recipe": self.recipe,
            "name": self.name,
            "family": self.family,
            "parameters": asdict(self.parameters) if self.parameters else None,
            "checkpoint_bytes": self.checkpoint_bytes,
            "gguf_bytes": self.gguf_bytes,
            "download_bytes": self.download_bytes,
            "build_disk_bytes": self.build_disk_bytes,
            "license": self.license,
            "findings": [
                {
                    "id": finding.id,
                    "level": finding.level,
                    "message": finding.text,
                    "line": finding.line,
                    "fault": finding.fault,
                }
                for finding in self.findings
            ],
            "build_memory_bytes": self.build_memory_bytes,
            "gguf_tensor_bytes": self.gguf_tensor_bytes,
            "runner": asdict(self.fit) if self.fit else None,
            "sources": {source.name: source.commit for source in self.sources},
            "change": self.change,
            "against_base": [asdict(difference) for difference in self.against],
            "bug": self.bug,
        }

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The models it is made of, the base first, each once."""
        return tuple(self.plan.sources.values()) if self.plan else ()

    def to_text(self) -> str:
        """The preview as a person reads it in a terminal."""
        lines = [f"{self.recipe}: {self.name}"]
        lines += [f"  {label:<11} {text}" for label, text in self.rows()]
        lines += [f"  {'changed':<11} {one.what}: {one.before} → {one.after}" for one in self.against]
        lines += [f"  {finding.located(self.recipe)}" for finding in self.findings]
        lines += [f"  a bug in moerge, not in your recipe: {f.printable(self.bug)}"] if self.bug else []
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, str]]:
        """What comes of the recipe, by label; empty where nothing does."""
        plan, parameters = self.plan, self.parameters
        if plan is None or parameters is None:
            return []
        experts = f"{experts_words(plan)}, {plan.experts_per_token} per token"
        if plan.has_shared:
            experts += ", 1 shared"
        count = billions(parameters.total)
        parts = f"{billions(parameters.shared)} shared, {billions(parameters.per_expert)} per expert"
        quants = ", ".join(f"{name} {size(count)}" for name, count in (self.gguf_bytes or {}).items())
        build = "not possible before the sources have weights"
        if self.download_bytes is not None and self.build_disk_bytes is not None:
            build = f"{size(self.download_bytes)} to download, {size(self.build_disk_bytes)} of disk"
            build += f", about {size(self.build_memory_bytes or 0)} of memory"
        rows = [
            ("family", f"{plan.family_title} ({plan.why_family}), {experts}"),
            ("parameters", f"{count} in all, {billions(parameters.active)} active per token ({parts})"),
            ("checkpoint", f"{size(self.checkpoint_bytes or 0)} ({DTYPE_WORDS[plan.dtype]})"),
            ("gguf", quants or "none asked for"),
            ("build", build),
        ]
        if self.fit is not None:
            rows.append(("runner", f"{self.fit.runner}: {_verdict(self)}"))
        rows.append(("licence", self.license or "not known: the sources state none, or different ones"))
        names = dict.fromkeys(plan.sources[key].name for key in (plan.base, *plan.experts))
        return [*rows, ("sources", ", ".join(names))]


def preview_recipe(path: Path, sources: Sources | None = None, **options: Any) -> Preview:
    """Preview one recipe file. `options` are those of `Sources`, whose folder is the recipe's where none is given."""
    try:
        loaded = load_recipe(path)
    except RecipeError as error:
        return Preview(str(path), path.stem, error.findings)
    return preview_loaded(loaded, sources or Sources(path.parent, **options), str(path))


def preview_loaded(loaded: LoadedRecipe, sources: Sources, path: str, runner: str | None = None) -> Preview:
    """Preview a recipe that was read, shown as `path`. `runner` is where it is built if it names none itself."""
    try:
        return preview_of(plan_recipe(loaded, sources), loaded, path, runner)
    except RecipeError as error:
        return Preview(path, loaded.name, error.findings, source_failed=isinstance(error, SourcesUnavailable))


def preview_of(plan: MergePlan, loaded: LoadedRecipe, path: str, runner: str | None = None) -> Preview:
    """The preview of a plan that has been made."""
    sizes = gguf_sizes(plan, plan.quants)
    gguf = sizes.files
    has_weights = all(source.why_no_headers is None for source in plan.sources.values())
    disk = plan.download_bytes + plan.checkpoint_bytes + sum(gguf.values()) if has_weights else None
    download = plan.download_bytes if has_weights else None
    memory = memory_bytes(plan)
    found = [*plan.findings, *runner_findings(loaded), *_hints(plan)]
    if loaded.recipe.build.max_disk is not None and has_weights:
        from bot.disk import parse_size, plan_bounded  # and with it numpy, which no other preview needs
        from bot.passes import check_expansion

        try:
            bounded = plan_bounded(plan, parse_size(loaded.recipe.build.max_disk))
            prompts = [prompt for expert in plan.gated for prompt in expert.positive_prompts]
            prompts += [prompt for slice_ in plan.slices.values() for prompt in slice_.texts]
            check_expansion(loaded, plan, prompts, bounded.schedule.peak)
            disk, download = bounded.disk_bytes, bounded.download
            if download > plan.download_bytes:
                more, all_of_it = size(download), size(plan.download_bytes)
                found.append(f.ReadAgain(loaded.line("build", "max_disk"), download=more, sources=all_of_it))
        except UsageError as error:
            found.append(f.TooLittleDisk(loaded.line("build", "max_disk"), problem=str(error)))
    fitting = None
    if wanted := loaded.recipe.build.runner or runner:
        # A runner that cannot be meant is a finding already.
        with suppress(ValueError):
            fitting = fit(parse_runner(wanted), disk, memory)
            found += fit_findings(fitting, disk or 0, memory, loaded.line("build", "runner"))
    return Preview(
        recipe=path,
        name=plan.name,
        findings=tuple(found),
        family=plan.family,
        parameters=plan.parameters,
        checkpoint_bytes=plan.checkpoint_bytes,
        gguf_bytes=gguf,
        gguf_tensor_bytes=dict(sizes.tensors),
        download_bytes=download,
        build_disk_bytes=disk,
        build_memory_bytes=memory,
        license=plan.license,
        plan=plan,
        fit=fitting,
    )


def _verdict(preview: Preview) -> str:
    found = preview.fit
    assert found is not None
    if found.fits is None:
        return "how much disk and memory it has is not known here" if found.disk is None else "it cannot be told"
    has = f"{size(found.disk or 0)} of disk, {size(found.memory or 0)} of memory"
    return f"the build fits ({has})" if found.fits else f"the build does not fit ({has})"


def _hints(plan: MergePlan) -> tuple[f.Finding, ...]:
    """What could be better and is not wrong."""
    if plan.gate_mode in (DISCRIMINANT, *RANDOM_GATES):
        return ()
    return (f.DiscriminantHint(None, mode=plan.gate_mode),)


def gguf_sizes(plan: MergePlan, types: Sequence[str]) -> Sizes:
    """Bytes of each GGUF file. Of a family that GGUF has not, none is asked for.

    They follow from the config and the tensors' names, dtypes and shapes, which recipes of one repository often share.
    """
    if not types:
        return Sizes({}, 0)
    shapes = tuple((tensor.name, tensor.expr.dtype, tensor.expr.shape) for tensor in plan.tensors)
    key = (json.dumps(plan.config, sort_keys=True), shapes, tuple(types))
    if key not in _SIZES:
        _SIZES[key] = predict_sizes(plan.config, {tensor.name: tensor.expr for tensor in plan.tensors}, types)
    return _SIZES[key]


_SIZES: dict[object, Sizes] = {}


def plan_recipe(loaded: LoadedRecipe, sources: Sources) -> MergePlan:
    """Open a recipe's sources and plan it. What cannot be opened becomes a finding at the line that names it."""
    opened, failed = sources.open_all(loaded.recipe.references)
    if failed:
        found = list(loaded.findings)
        named: list[tuple[tuple[str | int, ...], str]] = [(("base_model",), loaded.recipe.base_model)]
        named += [
            ((section, index, "source_model"), expert.source_model)
            for section in ("experts", "shared_experts")
            for index, expert in enumerate(getattr(loaded.recipe, section) or ())
        ]
        said: set[object] = set()
        for place, text in named:
            reference = parse_reference(text)
            if reference in failed and reference not in said:
                said.add(reference)
                error, line = failed[reference], loaded.line(*place)
                found.append(
                    f.LocalNotAllowed(line, model=text)
                    if isinstance(error, LocalNotAllowedError)
                    else f.SourceUnavailable(line, problem=str(error))
                )
        refused = any(isinstance(finding, f.LocalNotAllowed) for finding in found)
        raise (RecipeError if refused else SourcesUnavailable)(found, str(loaded.path))
    plan = build_plan(loaded, opened)
    return replace(plan, slices=_slices(loaded, sources)) if loaded.recipe.needs_prompts else plan


def _slices(loaded: LoadedRecipe, sources: Sources) -> dict[tuple[str, int], PromptsRead]:
    """The prompts that the recipe takes from datasets: kilobytes, read now so that what is wrong with them is said now."""
    found: dict[tuple[str, int], PromptsRead] = {}
    for section in ("experts", "shared_experts"):
        for index, expert in enumerate(getattr(loaded.recipe, section) or ()):
            if expert.prompts is not None:
                try:
                    found[section, index] = read_slice(sources.hub, expert.prompts)
                except (SourceError, PromptError) as error:
                    line = loaded.line(section, index, "prompts")
                    problem = f.BadPromptsDataset(line, dataset=expert.prompts.dataset, problem=str(error))
                    kind = SourcesUnavailable if isinstance(error, SourceError) else RecipeError
                    raise kind([*loaded.findings, problem], str(loaded.path)) from None
    return found


def experts_words(plan: MergePlan) -> str:
    """How many experts the result has, and where they are from if its base is a mixture already."""
    if plan.kept_experts:
        return f"{counted(plan.kept_experts, 'expert')} kept and {len(plan.experts)} added"
    return counted(plan.expert_count, "expert")
