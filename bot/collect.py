"""The end of a run: what became of every recipe, from what the build jobs left; releases, statuses and an answer on GitHub.

A build job has no right to write to the repository on GitHub. It leaves `outcomes.json`, an artifact; the job that runs this
has the rights and touches no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bot.releases import MARKER, Release, release_of, release_request, tag_of, tagged_recipe
from cards.markdown import code, escape, link
from cards.words import billions, size
from merge.errors import DestinationError, JobError, UsageError

if TYPE_CHECKING:
    from bot.events import Event
    from bot.github.client import GitHub
    from bot.summary import Outcome

OUTCOMES = "outcomes.json"
# What `sha256sum` writes, for the step that attests where the files come from.
CHECKSUMS = "checksums.txt"
MAX_BYTES = 4 << 20
NO_RESULT = "no result: the job was cancelled, or its runner was lost"


@dataclass(frozen=True)
class Result:
    """What became of one recipe, as its job left it. `code` is the exit code of its build."""

    recipe: str
    name: str
    said: str
    code: int
    seconds: float
    parameters: int | None
    bytes: int | None
    release: Release | None


def save_outcomes(outcomes: Sequence[Outcome], out: Path) -> None:
    """Leave what became of the recipes of this job, in `out`/outcomes.json, and the SHA-256 of what was published, in
    `out`/checksums.txt. Raises DestinationError."""
    value = [
        {
            "recipe": outcome.change.path,
            "name": outcome.change.name,
            "said": outcome.said,
            "code": outcome.code,
            "seconds": round(outcome.seconds, 1),
            "parameters": outcome.parameters,
            "bytes": outcome.bytes,
            "release": outcome.release.to_json() if outcome.release else None,
        }
        for outcome in outcomes
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / OUTCOMES).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        files = [file for outcome in outcomes if outcome.release for file in outcome.release.files]
        lines = [f"{file.sha256}  {file.repo}/{file.name}\n" for file in files]
        (out / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DestinationError(f"{out / OUTCOMES}: {error.strerror}; input `out` must name a folder") from None


def read_outcomes(folder: Path, expected: str) -> list[Result]:
    """The results in every outcomes.json below `folder`, in the order of the plan's matrix `expected`, with those that are
    missing. Raises UsageError."""
    found: dict[str, Result] = {}
    for path in sorted(folder.rglob(OUTCOMES)):
        try:
            if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                raise ValueError("not a file of ours")
            for value in json.loads(path.read_bytes()):
                release = release_of(value["release"]) if value["release"] else None
                result = Result(**{**value, "release": release})
                found[result.recipe] = result
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: not what a build left ({type(error).__name__})") from None
    try:
        planned = [(entry["recipe"], entry["name"]) for entry in json.loads(expected or '{"include": []}')["include"]]
    except (ValueError, KeyError, TypeError):
        raise UsageError("input `expected` must be the output `matrix` of the plan") from None
    for recipe, name in planned:
        found.setdefault(recipe, Result(recipe, name, NO_RESULT, JobError.exit_code, 0, None, None, None))
    order = {recipe: index for index, (recipe, _) in enumerate(planned)}
    return sorted(found.values(), key=lambda result: (order.get(result.recipe, len(order)), result.recipe))


def table(results: Sequence[Result], releases: Mapping[str, str]) -> str:
    """What became of each recipe, in Markdown; `releases` has the addresses of releases on GitHub, by recipe."""
    lines = ["| Recipe | Result | Parameters | Files | Time | Model | Release |", "|---|---|--:|--:|--:|---|---|"]
    for result in results:
        release = result.release
        cells = [
            code(result.recipe),
            f"{'**failed**: ' if result.code else ''}{escape(result.said)}",
            billions(result.parameters) if result.parameters else "-",
            size(result.bytes) if result.bytes else "-",
            _time(result.seconds),
            link(release.repo, release.url) if release else "-",
            link("on GitHub", releases[result.recipe]) if result.recipe in releases else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def headline(results: Sequence[Result]) -> str:
    """The run in a sentence."""
    if not results:
        return "nothing was built"
    failed = sum(bool(result.code) for result in results)
    released = sum(result.release is not None and result.release.changed for result in results)
    said = [f"{len(results)} recipe{'' if len(results) == 1 else 's'}", f"{released} published"]
    return ", ".join([*said, f"{failed} failed"] if failed else said)


def set_statuses(results: Iterable[Result], github: GitHub, commit: str, run: str | None) -> None:
    """A commit status for each recipe: one request each."""
    for result in results:
        state = "success" if not result.code else "failure" if result.code == 1 else "error"
        about = f": {billions(result.parameters)}, {size(result.bytes or 0)}" if result.parameters else ""
        url = result.release.url if result.release else run
        # GitHub takes addresses of the web alone; a Hub on this machine is one too.
        github.status(commit, state, f"{result.said}{about}", f"moerge/{result.name}"[:100], url)


def publish_releases(results: Iterable[Result], github: GitHub, event: Event, commit: str) -> dict[str, str]:
    """The release on GitHub of each recipe that has a version, or whose tag was pushed. Returns their addresses by recipe.

    One that is there already and is ours gets its text anew; someone else's is left alone. Two requests each.
    """
    made = {}
    for result in results:
        tag = release_tag(result, event)
        if result.release is None or tag is None:
            continue
        made[result.recipe] = github.release(release_request(result.release, tag, commit), MARKER)
    return made


def release_tag(result: Result, event: Event) -> str | None:
    """The tag of a recipe's release on GitHub: the one that was pushed, else its version's; None where it has neither."""
    pushed = event.tag
    if pushed is not None and tagged_recipe(pushed, [result.name]):
        return pushed
    version = result.release.about.version if result.release else None
    return tag_of(result.name, version) if version else None


def answer(results: Sequence[Result], run: str | None) -> str:
    """The reply to a comment that asked for builds."""
    more = f"\n\n{link('The run', run)} has the logs." if run else ""
    return f"moerge: {headline(results)}\n\n{table(results, {})}{more}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s" if seconds else "-"
