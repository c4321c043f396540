"""What a pull request's preview leaves on GitHub: one comment, edited in place, and a check run with annotations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bot.changes import UNCHANGED, Change
from bot.github.client import Comment, GitHub
from bot.github.comment import all_levels, nothing_comment, preview_comment
from bot.preview import Preview
from bot.summary import preview_sections
from merge import findings as f
from merge.findings import printable

CHECK = "moerge preview"
# Of a check run: GitHub takes fifty annotations a request, and 65,535 characters of summary.
ANNOTATIONS = 250
SUMMARY = 60_000
LEVELS = {f.ERROR: "failure", f.WARNING: "warning", f.NOTICE: "notice"}


def say_comment(
    github: GitHub,
    number: int,
    known: Comment | None,
    previews: Sequence[Preview],
    changes: Sequence[Change],
    why: str,
    *,
    head: str,
    run_url: str | None,
    scope: Sequence[str] = (),
) -> bool:
    """Write the comment of a pull request, or edit the `known` one of ours. Where no recipe changed and there is none, nothing is
    said: False. One request.
    """
    changed = [change for change in changes if change.kind != UNCHANGED]
    if changed:
        body = preview_comment(previews, changed, why, head=head, run_url=run_url, scope=scope)
    elif known is not None:
        body = nothing_comment(why, head=head, run_url=run_url, scope=scope)
    else:
        return False
    if known is None:
        github.write_comment(number, body)
    else:
        github.edit_comment(known, body)
    return True


def say_check(github: GitHub, head: str, previews: Sequence[Preview], inside: str = "") -> None:
    """A check run on the pull request's newest commit: every finding at its line, as far as GitHub takes them.

    `inside` is the folder of the repository that the recipes' paths begin at. One request for fifty annotations, at most five.
    """
    found = list(_annotations(previews, inside))
    found.sort(key=lambda one: list(LEVELS.values()).index(one["annotation_level"]))
    summary, shown = "", found[:ANNOTATIONS]
    for section in preview_sections(previews):
        if len(summary) + len(section) + 2 > SUMMARY:
            summary += "\n\n*More does not fit here; the summary of the run has all.*"
            break
        summary += f"{section}\n\n"
    if len(found) > len(shown):
        summary = f"{len(found) - len(shown)} more findings have no annotation.\n\n{summary}"
    conclusion = "failure" if any(preview.code for preview in previews) else "success"
    github.check_run(CHECK, head, conclusion, _title(previews), summary or "No recipe changed.", shown)


def _title(previews: Sequence[Preview]) -> str:
    """Whose mistakes there are, in a line."""
    if not previews:
        return "no recipe to build"
    faults = {
        "with errors": sum(preview.has_errors and not preview.source_failed for preview in previews),
        "whose sources cannot be read": sum(preview.source_failed for preview in previews),
        "that moerge failed on (a bug)": sum(preview.bug is not None for preview in previews),
    }
    said = [f"{count} {what}" for what, count in faults.items() if count]
    warnings = all_levels(previews)[f.WARNING]
    if warnings:
        said.append(f"{warnings} warning{'' if warnings == 1 else 's'}")
    return f"{len(previews)} recipe{'' if len(previews) == 1 else 's'}: {', '.join(said) or 'all fine'}"


def _annotations(previews: Iterable[Preview], inside: str) -> Iterable[dict[str, Any]]:
    start = f"{inside.strip('/')}/" if inside.strip("./") else ""
    for preview in previews:
        if preview.bug is not None:
            yield _annotation(
                start + preview.recipe, 1, "failure", f"A bug in moerge, not in this recipe: {preview.bug}", "bug"
            )
        for finding in preview.findings:
            # A finding of the whole file stands at its first line: GitHub wants one.
            line = finding.line or 1
            yield _annotation(start + preview.recipe, line, LEVELS[finding.level], finding.text, finding.id)


def _annotation(path: str, line: int, level: str, message: str, title: str) -> dict[str, Any]:
    shown = {"path": path, "start_line": line, "end_line": line, "annotation_level": level}
    return shown | {"message": printable(message)[:4000], "title": title}
