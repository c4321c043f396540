"""The step's summary in Markdown: the plan, the previews, what was built and published.

All that comes from recipes, models and errors goes through cards.markdown: it reads as it was written and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bot.changes import DELETED, RENAMED, Change
from bot.github.comment import section
from bot.preview import Preview
from cards.markdown import code, escape, link
from cards.words import billions, size
from merge import findings as f

if TYPE_CHECKING:
    from bot.releases import Release

LEVELS = (f.ERROR, f.WARNING, f.NOTICE)
# Findings of one recipe in the summary; the annotations, the log and previews.json have the rest.
FINDINGS_SHOWN = 50
LEFT_OUT_SHOWN = 200


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe that was to be built: one sentence and an exit code, 0 where it went well."""

    change: Change
    said: str
    code: int = 0
    seconds: float = 0.0
    parameters: int | None = None
    bytes: int | None = None
    release: Release | None = None
    findings: tuple[f.Finding, ...] = ()


def heading(title: str, comparison: str) -> str:
    """The summary's first lines."""
    return f"## moerge: {escape(title)}\n\nRecipes {escape(comparison)}."


def nothing_to_do() -> str:
    """What a job says that was right to do nothing."""
    return "**Nothing to do.** No recipe says anything new: comments, formatting and file names do not change a model."


def plan_section(changes: Sequence[Change], runners: Sequence[str | None]) -> str:
    """Each recipe, what happened to it, and where it is built."""
    lines = ["| Recipe | Change | Why | Built on |", "|---|---|---|---|"]
    for change, runner in zip(changes, runners, strict=True):
        built = code(runner) if runner else "*broken*" if change.to_build else "not built"
        lines.append(f"| {code(change.path)} | {change.kind} | {escape(change.why)} | {built} |")
    return "\n".join(lines)


def left_out(paths: Sequence[str], jobs: int) -> str:
    """Recipes that had no room in the matrix."""
    shown = [f"- {code(path)}" for path in paths[:LEFT_OUT_SHOWN]]
    if len(paths) > LEFT_OUT_SHOWN:
        shown.append(f"- and {len(paths) - LEFT_OUT_SHOWN} more")
    said = f"**{len(paths)} recipes are left for another run**, since a matrix has at most {jobs} jobs:"
    return "\n".join([said, "", *shown])


def quiet_section(changes: Iterable[Change]) -> str | None:
    """Recipes that were renamed or deleted: nothing is built for them, and it is said why."""
    lines = [
        f"- {code(change.path)}: {change.kind}; {escape(change.why)}"
        for change in changes
        if change.kind in (RENAMED, DELETED)
    ]
    return "\n".join(lines) or None


def preview_sections(previews: Sequence[Preview]) -> Iterator[str]:
    """A table of all previews and all there is to say of each, in parts that can be left out one by one."""
    for start in range(0, len(previews), 100):
        yield "\n".join(
            [
                "| Recipe | Model | Parameters | Active | Checkpoint | GGUF | Download | Build disk | Licence |",
                "|---|---|--:|--:|--:|---|--:|--:|---|",
                *(_preview_row(preview) for preview in previews[start : start + 100]),
            ]
        )
    for preview in previews:
        yield section(preview, is_open=preview.code != 0, findings=FINDINGS_SHOWN)


def findings_section(recipe: str, findings: Sequence[f.Finding]) -> str:
    """What was found in one recipe, errors first."""
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    lines = [f"#### {code(recipe)}", ""]
    for finding in ordered[:FINDINGS_SHOWN]:
        place = f"line {finding.line}: " if finding.line else ""
        lines.append(f"- **{finding.level}** {place}{escape(finding.text)} ({code(finding.id)})")
    if len(ordered) > FINDINGS_SHOWN:
        lines.append(f"- and {len(ordered) - FINDINGS_SHOWN} more")
    return "\n".join(lines)


def build_section(outcomes: Sequence[Outcome]) -> str:
    """What became of each recipe."""
    lines = ["| Recipe | Result | Parameters | Files | Time | Model |", "|---|---|--:|--:|--:|---|"]
    for outcome in outcomes:
        model = "-"
        if outcome.release is not None:
            model = link(outcome.release.repo, outcome.release.url)
            if outcome.release.commit:
                model += f" at {code(outcome.release.commit[:9])}"
        cells = [
            code(outcome.change.path),
            f"{'**failed**: ' if outcome.code else ''}{escape(outcome.said)}",
            billions(outcome.parameters) if outcome.parameters else "-",
            size(outcome.bytes) if outcome.bytes else "-",
            f"{outcome.seconds:.0f} s",
            model,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _preview_row(preview: Preview) -> str:
    parameters, gguf = preview.parameters, preview.gguf_bytes or {}
    cells = [
        code(preview.recipe),
        escape(preview.name),
        billions(parameters.total) if parameters else "-",
        billions(parameters.active) if parameters else "-",
        _size(preview.checkpoint_bytes),
        "<br>".join(f"{escape(name)} {size(count)}" for name, count in gguf.items()) or "-",
        _size(preview.download_bytes),
        _size(preview.build_disk_bytes),
        escape(preview.license or "-"),
    ]
    return f"| {' | '.join(cells)} |"


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
