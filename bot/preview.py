"""What a recipe would give, from headers alone: parameters, sizes, licence, findings. Loads no weights and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bot.runners import runner_findings
from merge import findings as f
from merge.errors import RecipeError, SourcesUnavailable
from merge.plan import MergePlan, Parameters
from merge.planner import build_plan
from merge.recipe import DISCRIMINANT, RANDOM_GATES, LoadedRecipe, load_recipe
from merge.reference import parse_reference
from merge.sources import LocalNotAllowedError, Sources
from quants.layout import predict_sizes

DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Preview:
    """One recipe's preview. Everything after `name` is None where the recipe or its sources have an error; bytes to download
    and of disk also where a source has no weights to build from."""

    recipe: str
    name: str
    family: str | None
    parameters: Parameters | None
    checkpoint_bytes: int | None
    gguf_bytes: dict[str, int] | None
    download_bytes: int | None
    build_disk_bytes: int | None
    license: str | None
    findings: tuple[f.Finding, ...]
    plan: MergePlan | None = None
    source_failed: bool = False

    @property
    def has_errors(self) -> bool:
        return any(finding.level == f.ERROR for finding in self.findings)

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
                {"id": finding.id, "level": finding.level, "message": finding.text, "line": finding.line}
                for finding in self.findings
            ],
        }

    def to_text(self) -> str:
        """The preview as a person reads it in a terminal."""
        lines = [f"{self.recipe}: {self.name}"]
        if self.plan is not None and self.parameters is not None:
            lines += [f"  {label:<11} {text}" for label, text in self._rows(self.plan, self.parameters)]
        lines += [f"  {finding.located(self.recipe)}" for finding in self.findings]
        return "\n".join(lines)

    def _rows(self, plan: MergePlan, parameters: Parameters) -> list[tuple[str, str]]:
        experts = f"{plan.expert_count} experts, {plan.experts_per_token} per token"
        if plan.kept_experts:
            experts = (
                f"{plan.kept_experts} experts kept and {len(plan.experts)} added, {plan.experts_per_token} per token"
            )
        if plan.has_shared:
            experts += ", 1 shared"
        count = billions(parameters.total)
        parts = f"{billions(parameters.shared)} shared, {billions(parameters.per_expert)} per expert"
        quants = ", ".join(f"{name} {size(count)}" for name, count in (self.gguf_bytes or {}).items())
        build = "not possible before the sources have weights"
        if self.download_bytes is not None and self.build_disk_bytes is not None:
            build = f"{size(self.download_bytes)} to download, {size(self.build_disk_bytes)} of disk"
        rows = [
            ("family", f"{plan.family_title} ({plan.why_family}), {experts}"),
            ("parameters", f"{count} in all, {billions(parameters.active)} active per token ({parts})"),
            ("checkpoint", f"{size(self.checkpoint_bytes or 0)} ({DTYPE_WORDS[plan.dtype]})"),
            ("gguf", quants or "none asked for"),
            ("build", build),
            ("licence", self.license or "not known: the sources state none, or different ones"),
        ]
        names = dict.fromkeys(plan.sources[key].name for key in (plan.base, *plan.experts))
        return [*rows, ("sources", ", ".join(names))]


def preview_recipe(path: Path, sources: Sources | None = None, **options: Any) -> Preview:
    """Preview one recipe file. `options` are those of `Sources`, whose folder is the recipe's where none is given."""
    try:
        loaded = load_recipe(path)
        plan = plan_recipe(loaded, sources or Sources(path.parent, **options))
    except RecipeError as error:
        return _failed(path, error.findings, source_failed=isinstance(error, SourcesUnavailable))
    return preview_of(plan, str(path), runner_findings(loaded))


def preview_of(plan: MergePlan, path: str, more: Sequence[f.Finding] = ()) -> Preview:
    """The preview of a plan that has been made, with what else was found in its recipe."""
    gguf = gguf_sizes(plan, plan.quants)
    disk = plan.download_bytes + plan.checkpoint_bytes + sum(gguf.values())
    has_weights = all(source.why_no_headers is None for source in plan.sources.values())
    return Preview(
        recipe=path,
        name=plan.name,
        family=plan.family,
        parameters=plan.parameters,
        checkpoint_bytes=plan.checkpoint_bytes,
        gguf_bytes=gguf,
        download_bytes=plan.download_bytes if has_weights else None,
        build_disk_bytes=disk if has_weights else None,
        license=plan.license,
        findings=(*plan.findings, *more, *_hints(plan)),
        plan=plan,
    )


def _hints(plan: MergePlan) -> tuple[f.Finding, ...]:
    """What could be better and is not wrong."""
    if plan.gate_mode in (DISCRIMINANT, *RANDOM_GATES):
        return ()
    return (f.DiscriminantHint(None, mode=plan.gate_mode),)


def gguf_sizes(plan: MergePlan, types: Sequence[str]) -> dict[str, int]:
    """Bytes of each GGUF file, by type. Of a family that GGUF has not, none is asked for."""
    if not types:
        return {}
    return predict_sizes(plan.config, {tensor.name: tensor.expr for tensor in plan.tensors}, types)


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
    return build_plan(loaded, opened)


def _failed(path: Path, found: Sequence[f.Finding], source_failed: bool) -> Preview:
    return Preview(
        recipe=str(path),
        name=path.stem,
        family=None,
        parameters=None,
        checkpoint_bytes=None,
        gguf_bytes=None,
        download_bytes=None,
        build_disk_bytes=None,
        license=None,
        findings=tuple(found),
        source_failed=source_failed,
    )


def billions(count: int) -> str:
    """A parameter count as people write it: `24.15 B`, `135.2 M`."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def size(count: int) -> str:
    """Bytes as people read them, decimal as the Hub shows them: `48.3 GB`, `270 MB`."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 or count == 0 else f"{count / 1e3:.0f} kB"
