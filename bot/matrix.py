"""What would be built and why: as plain data, and as the matrix of a GitHub workflow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bot.changes import ADDED, ASKED, CHANGED, Change
from bot.runners import Runner, parse_runner, runner_findings
from merge import findings as f
from merge.errors import UsageError

# GitHub refuses a matrix with more jobs.
JOBS = 256
DEFAULT_RUNNER = "ubuntu-latest"
# Who asked for a build waits for it; a changed recipe's release is out of date; a new one is missed by nobody yet.
URGENCY = (ASKED, CHANGED, ADDED)
KEYS = ("recipe", "name", "runner", "repo", "gpu", "job")


def runner_of(change: Change, default: str = DEFAULT_RUNNER, *, trusted: bool = True) -> Runner:
    """The runner that a recipe asks for. A recipe that nobody has accepted yet does not choose where it runs.

    Raises UsageError where the default is none.
    """
    loaded = change.file.loaded if change.file else None
    wanted = loaded.recipe.build.runner if loaded and trusted else None
    try:
        return parse_runner(wanted or default)
    except ValueError as error:
        if wanted:
            return runner_of(change, default, trusted=False)
        raise UsageError(f"runner {default!r}: {error}") from None


def plan_entries(
    changes: Iterable[Change], runner: str = DEFAULT_RUNNER, *, trusted: bool = True
) -> list[dict[str, Any]]:
    """One object per recipe, in the order they are to be built: what happened to it, whether it is built, where, and why.

    A broken recipe is not built. `gpu` says whether the job may ask for the runner's GPUs, `job` which Hugging Face Job it
    sends the build to. Raises UsageError.
    """
    entries = []
    ordered = by_urgency(changes)
    clashing = clashes(ordered)
    for change in ordered:
        errors = (*errors_of(change), *clashing.get(change.path, ()))
        build = is_buildable(change) and change.path not in clashing
        chosen = runner_of(change, runner, trusted=trusted) if build else None
        loaded = change.file.loaded if change.file else None
        on_cpu = loaded is not None and loaded.recipe.build.device == "cpu"
        entries.append(
            {
                "recipe": change.path,
                "name": change.name,
                "change": change.kind,
                "build": build,
                "why": change.why,
                "runner": chosen.runs_on if chosen else None,
                "repo": loaded.recipe.release.repo if loaded else None,
                "gpu": chosen is not None and not chosen.is_hosted and not on_cpu,
                "job": chosen.text if chosen and chosen.flavor else None,
                "errors": [
                    {"id": finding.id, "level": finding.level, "message": finding.text, "line": finding.line}
                    for finding in errors
                ],
            }
        )
    return entries


def by_urgency(changes: Iterable[Change]) -> list[Change]:
    """What was asked for first, then what changed, then what is new, then what is not built; each by its path."""
    return sorted(
        changes,
        key=lambda change: (URGENCY.index(change.kind) if change.kind in URGENCY else len(URGENCY), change.path),
    )


def clashes(changes: Iterable[Change]) -> dict[str, tuple[f.Finding, ...]]:
    """Recipes that would publish to the repository of one before them, by path: the last build to end would win."""
    owners: dict[str, str] = {}
    found: dict[str, tuple[f.Finding, ...]] = {}
    for change in changes:
        if not is_buildable(change):
            continue
        loaded = change.file.loaded if change.file else None
        if loaded is None or loaded.recipe.release.repo is None:
            continue
        repo = loaded.recipe.release.repo
        other = owners.setdefault(repo.lower(), change.path)
        if other != change.path:
            found[change.path] = (f.SharedRepository(loaded.line("release", "repo"), repo=repo, other=other),)
    return found


def errors_of(change: Change) -> tuple[f.Finding, ...]:
    """Why a recipe that can be seen cannot be built, as far as its text tells; with the warnings of one that is broken."""
    if change.file is None:
        return ()
    if change.file.loaded is None:
        return tuple(change.file.error.findings) if change.file.error else ()
    return tuple(finding for finding in runner_findings(change.file.loaded) if finding.level == f.ERROR)


def is_buildable(change: Change) -> bool:
    """Whether a recipe is to be built and can be read."""
    return change.to_build and change.file is not None and not errors_of(change)


def matrix(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The `strategy.matrix` of a job per recipe to build, the 256 most urgent of them."""
    wanted = [entry for entry in entries if entry["build"]][:JOBS]
    # What is missing is empty: a workflow's expression has no null.
    return {
        "include": [{key: entry[key] or "" if entry[key] is None else entry[key] for key in KEYS} for entry in wanted]
    }
