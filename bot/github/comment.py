"""The one comment on a pull request: what its recipes would give, in as many details as fit.

All that comes from recipes, models and errors goes through cards.markdown. Text between `<summary>` tags is HTML to GitHub, the
rest Markdown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from bot.changes import ADDED, DELETED, RENAMED, Change
from bot.preview import DTYPE_WORDS, Preview, experts_words
from cards.hub import model_url
from cards.markdown import code, code_link, escape, html, link
from cards.words import billions, size
from merge import findings as f

# GitHub takes 65,536 characters.
LIMIT = 60_000
FINDINGS_SHOWN = 30
SOURCES_SHOWN = 12
ICONS = {f.ERROR: "❌", f.WARNING: "⚠️", f.NOTICE: "ℹ️"}  # noqa: RUF001
LEVELS = (f.ERROR, f.WARNING, f.NOTICE)
FAULTS = {
    f.RECIPE: "In the recipe",
    f.SOURCE: "In a source model (the recipe may be right)",
}


def marker(scope: Sequence[str] = ()) -> str:
    """What our comment begins with, unseen. `scope` tells apart several previews of one repository, by their globs."""
    if not scope:
        return "<!-- moerge preview -->"
    return f"<!-- moerge preview {hashlib.sha256(chr(0).join(scope).encode()).hexdigest()[:12]} -->"


def preview_comment(
    previews: Sequence[Preview],
    changes: Sequence[Change],
    why: str,
    *,
    head: str,
    run_url: str | None = None,
    scope: Sequence[str] = (),
    limit: int = LIMIT,
) -> str:
    """The comment. What is over `limit` characters is shortened recipe by recipe, those without mistakes first, and what is left
    out is said."""
    quiet = [change for change in changes if change.kind in (RENAMED, DELETED)]
    foot = _foot(why, head, run_url)
    top = [marker(scope), f"### moerge: {_title(previews)}"]
    fixed = len("\n\n".join([*top, foot])) + 600
    blocks = [_table(previews, limit // 2)] if len(previews) > 1 else []
    if quiet:
        blocks.append(_quiet(quiet, limit // 8))
    fixed += sum(len(block) + 2 for block in blocks)
    sections, left = _sections(previews, limit - fixed)
    if left:
        more = (
            f" They are in [the summary of the run]({run_url})." if run_url else " They are in the summary of the run."
        )
        sections.append(f"*The details of {left} more recipes do not fit into a comment.{more}*")
    return "\n\n".join([*top, *blocks, *sections, foot])


def nothing_comment(why: str, *, head: str, run_url: str | None = None, scope: Sequence[str] = ()) -> str:
    """What a comment becomes when the pull request does not change a recipe any more."""
    said = "This pull request changes no recipe any more: comments, formatting and file names do not change a model."
    return "\n\n".join([marker(scope), "### moerge: nothing to preview", said, _foot(why, head, run_url)])


def _title(previews: Sequence[Preview]) -> str:
    count = len(previews)
    said = f"preview of {count} recipe{'' if count == 1 else 's'}" if count else "no recipe to build"
    failed = sum(preview.code != 0 for preview in previews)
    if failed:
        said += f", {failed} with errors" if count > 1 else ", which has errors"
    return said


def _foot(why: str, head: str, run_url: str | None) -> str:
    run = f" · {link('run', run_url)}" if run_url else ""
    return f"<sub>Recipes of {code(head[:9])}, {escape(why)}. No weights were downloaded{run}.</sub>"


# ------------------------------------------------------------------------------------------------------------ the overview


def _table(previews: Sequence[Preview], limit: int) -> str:
    """A row for each recipe, as many as fit."""
    lines = [
        "| | Recipe | Model | Parameters | Active | Checkpoint | GGUF | Runner | Licence |",
        "|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    count = sum(len(line) + 1 for line in lines)
    rows = [_row(preview) for preview in previews]
    shown = 0
    for row in rows:
        count += len(row) + 1
        if count > limit:
            break
        lines.append(row)
        shown += 1
    if shown < len(rows):
        lines.append(f"| | *and {len(rows) - shown} more* | | | | | | | |")
    return "\n".join(lines)


def _row(preview: Preview) -> str:
    parameters, gguf = preview.parameters, preview.gguf_bytes or {}
    sizes = sorted(gguf.values())
    span = size(sizes[0]) if len(sizes) == 1 else f"{size(sizes[0])} to {size(sizes[-1])}" if sizes else "-"
    cells = [
        _icon(preview),
        code(preview.recipe),
        escape(preview.name),
        billions(parameters.total) if parameters else "-",
        billions(parameters.active) if parameters else "-",
        "-" if preview.checkpoint_bytes is None else size(preview.checkpoint_bytes),
        span,
        _fits_word(preview),
        escape(preview.license or "-"),
    ]
    return f"| {' | '.join(cells)} |"


def _icon(preview: Preview) -> str:
    if preview.bug is not None:
        return "🐞"
    levels = {finding.level for finding in preview.findings}
    return next((ICONS[level] for level in (f.ERROR, f.WARNING) if level in levels), "✅")


def _fits_word(preview: Preview) -> str:
    fits = preview.fit.fits if preview.fit else None
    return {True: "fits", False: "**too small**", None: "-"}[fits]


def _quiet(changes: Sequence[Change], limit: int) -> str:
    lines: list[str] = []
    for change in changes:
        line = f"- {code(change.path)}: {change.kind}; {escape(change.why)}"
        if sum(map(len, lines)) + len(line) > limit:
            return "\n".join([*lines, f"- and {len(changes) - len(lines)} more"])
        lines.append(line)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ the sections


def _sections(previews: Sequence[Preview], room: int) -> tuple[list[str], int]:
    """A section for each recipe in the order given, and how many have none for want of room. First each recipe with findings
    gets a brief one, then as many as fit get all there is; those with errors come first."""
    is_open = len(previews) == 1
    urgent = sorted(range(len(previews)), key=lambda number: previews[number].code == 0)
    chosen: dict[int, str] = {}
    for number in urgent:
        text = _brief(previews[number])
        if (previews[number].findings or previews[number].bug) and len(text) + 2 <= room:
            room -= len(text) + 2
            chosen[number] = text
    for number in urgent:
        text = section(previews[number], is_open=is_open)
        more = len(text) - len(chosen.get(number, ""))
        if more + 2 <= room:
            room -= more + 2
            chosen[number] = text
    return [chosen[number] for number in sorted(chosen)], len(previews) - len(chosen)


def _brief(preview: Preview) -> str:
    """The heading and the first errors."""
    return _details(preview, [*_bug(preview), *_findings(preview, 3)], is_open=False)


def section(preview: Preview, *, is_open: bool = False, findings: int = FINDINGS_SHOWN) -> str:
    """All there is to say of one recipe, folded away unless `is_open`, with at most so many findings."""
    parts = [*_bug(preview), *_figures(preview), *_against(preview), *_findings(preview, findings)]
    return _details(preview, parts, is_open=is_open)


def _details(preview: Preview, parts: Sequence[str], *, is_open: bool) -> str:
    title = f"{_icon(preview)} <code>{html(preview.recipe)}</code>: <b>{html(preview.name)}</b>"
    if preview.parameters is not None:
        title += f", {billions(preview.parameters.total)}"
    if preview.change == ADDED:
        title += ", new"
    for level in (f.ERROR, f.WARNING):
        if count := sum(finding.level == level for finding in preview.findings):
            title += f", {count} {level}{'' if count == 1 else 's'}"
    opening = "<details open>" if is_open else "<details>"
    return "\n\n".join([f"{opening}<summary>{title}</summary>", *parts, "</details>"])


def _figures(preview: Preview) -> Iterator[str]:
    """The table of what comes of the recipe and what the build needs."""
    plan, parameters = preview.plan, preview.parameters
    if plan is None or parameters is None:
        return
    shared = ", 1 shared" if plan.has_shared else ""
    of_expert = f"{billions(parameters.shared)} shared, {billions(parameters.per_expert)} per expert"
    gguf = "<br>".join(f"{escape(name)} {size(count)}" for name, count in (preview.gguf_bytes or {}).items())
    rows = [
        ("Family", f"{escape(plan.family_title)} ({escape(plan.why_family)})"),
        ("Experts", f"{experts_words(plan)}, {plan.experts_per_token} per token{shared}"),
        (
            "Parameters",
            f"**{billions(parameters.total)}**, {billions(parameters.active)} active per token ({of_expert})",
        ),
        ("Checkpoint", f"{size(preview.checkpoint_bytes or 0)} ({DTYPE_WORDS[plan.dtype]})"),
        ("GGUF", gguf or "none"),
        ("Download", _bytes(preview.download_bytes)),
        ("Disk for the build", _bytes(preview.build_disk_bytes)),
        ("Memory for the build", f"about {_bytes(preview.build_memory_bytes)}"),
        ("Runner", _runner(preview)),
        (
            "Licence",
            escape(preview.license) if preview.license else "not known: the sources state none, or different ones",
        ),
        ("Sources", _sources(preview)),
    ]
    lines = ["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows if text)]
    yield "\n".join(lines)


def _bytes(count: int | None) -> str:
    return "not known before the sources have weights" if count is None else size(count)


def _runner(preview: Preview) -> str:
    found = preview.fit
    if found is None:
        return ""
    if found.disk is None or found.memory is None:
        return f"{code(found.runner)}: its disk and memory are not known here"
    has = f"{size(found.disk)} of disk and {size(found.memory)} of memory"
    verdict = {True: "the build fits", False: "**the build does not fit**", None: "it cannot be told yet"}[found.fits]
    return f"{code(found.runner)}: {verdict} ({has})"


def _sources(preview: Preview) -> str:
    shown = []
    for source in preview.sources[:SOURCES_SHOWN]:
        pinned = f" at {code(source.commit[:9])}" if source.commit else ""
        stated = f", {escape(source.license)}" if source.license else ""
        url = model_url(source.name) if source.is_hub else None
        shown.append(f"{code_link(source.name, url)}{pinned}{stated}")
    if len(preview.sources) > SOURCES_SHOWN:
        shown.append(f"and {len(preview.sources) - SOURCES_SHOWN} more")
    return "<br>".join(shown)


def _against(preview: Preview) -> Iterator[str]:
    if preview.against:
        rows = [f"| {one.what} | {_cut(one.before)} | {_cut(one.after)} |" for one in preview.against]
        yield "\n".join(["| Changed | Base branch | Here |", "|---|---|---|", *rows])


def _findings(preview: Preview, limit: int) -> Iterator[str]:
    """The findings by whose mistake they are, errors first."""
    left = limit
    for fault, title in FAULTS.items():
        mine = [finding for finding in preview.findings if finding.fault == fault]
        ordered = sorted(mine, key=lambda finding: LEVELS.index(finding.level))[:left]
        if not mine or not left:
            continue
        left -= len(ordered)
        lines = [f"**{title}**", ""]
        for finding in ordered:
            place = f"line {finding.line}: " if finding.line else ""
            lines.append(f"- {ICONS[finding.level]} {place}{escape(finding.text)} ({code(finding.id)})")
        if len(mine) > len(ordered):
            lines.append(f"- and {len(mine) - len(ordered)} more")
        yield "\n".join(lines)


def _bug(preview: Preview) -> Iterator[str]:
    if preview.bug is not None:
        yield f"**In moerge** (not in your recipe): a bug, please report it: {code(preview.bug[:300])}"


def _cut(text: str, limit: int = 200) -> str:
    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")


def all_levels(previews: Iterable[Preview]) -> dict[str, int]:
    """How many findings of each level there are."""
    found = [finding.level for preview in previews for finding in preview.findings]
    return {level: found.count(level) for level in LEVELS}
