"""What would be built and why: as plain data, and as the matrix of a GitHub workflow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bot.changes import Change

# GitHub refuses a matrix with more jobs.
JOBS = 256
DEFAULT_RUNNER = "ubuntu-latest"


def runner_of(change: Change, default: str = DEFAULT_RUNNER, *, trusted: bool = True) -> str:
    """The runner that a recipe asks for. A recipe that nobody has accepted yet does not choose where it runs."""
    loaded = change.file.loaded if change.file else None
    return (loaded.recipe.build.runner if loaded and trusted else None) or default


def plan_entries(
    changes: Iterable[Change], runner: str = DEFAULT_RUNNER, *, trusted: bool = True
) -> list[dict[str, Any]]:
    """One object per recipe: what happened to it, whether it is built, and why. A broken recipe is not built."""
    return [
        {
            "recipe": change.path,
            "name": change.name,
            "change": change.kind,
            "build": is_buildable(change),
            "why": change.why,
            "runner": runner_of(change, runner, trusted=trusted) if is_buildable(change) else None,
            "errors": [
                {"id": finding.id, "level": finding.level, "message": finding.text, "line": finding.line}
                for finding in (change.file.error.findings if change.file and change.file.error else ())
            ],
        }
        for change in changes
    ]


def is_buildable(change: Change) -> bool:
    """Whether a recipe is to be built and can be read."""
    return change.to_build and change.file is not None and change.file.error is None


def matrix(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The `strategy.matrix` of a job per recipe to build, the first 256 of them."""
    wanted = [entry for entry in entries if entry["build"]][:JOBS]
    return {"include": [{key: entry[key] for key in ("recipe", "name", "runner")} for entry in wanted]}
