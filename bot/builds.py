"""Building and publishing several recipes one after the other, as a step of a workflow does it."""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from bot.changes import Change
from bot.inputs import Settings
from bot.matrix import is_buildable
from bot.summary import Outcome
from bot.workflow_commands import Annotations, group, untrusted
from merge.errors import DestinationError, MoergeError, RecipeError, UsageError

if TYPE_CHECKING:
    from bot.publish import Publication
    from evals.results import Report


def build_all(changes: Sequence[Change], settings: Settings, annotations: Annotations) -> list[Outcome]:
    """Build and publish each recipe. One that fails does not keep the others from it."""
    outcomes = []
    for change in changes:
        if is_buildable(change):
            with group(f"{change.path}: {change.why}"):
                outcomes.append(_build_one(change, settings, annotations))
        else:
            outcomes.append(Outcome(change, "the recipe has errors", RecipeError.exit_code))
    return outcomes


def release_json(path: str, publication: Publication) -> dict[str, Any]:
    """A release as the output `published` has it."""
    return {
        "recipe": path,
        "repo": publication.repo,
        "url": publication.url,
        "commit": publication.commit,
        "gguf_repo": publication.gguf_repo,
        "changed": publication.changed,
    }


def say_bug(annotations: Annotations, error: Exception, debug: bool) -> None:
    """Say that something here is broken, and that it is not the user's fault."""
    if debug:
        with untrusted():
            traceback.print_exception(error)
            sys.stderr.flush()
    annotations.add(
        "error",
        f"A bug in moerge, not in your recipe: {type(error).__name__}: {error}\n"
        "Run the job again with debug logging for the traceback, and please report it.",
        title="moerge",
    )


def _build_one(change: Change, settings: Settings, annotations: Annotations) -> Outcome:
    started = time.monotonic()
    try:
        with untrusted():
            report, publication = _built_and_published(change, settings)
    except RecipeError as error:
        return Outcome(change, "the recipe has errors", error.exit_code, findings=tuple(error.findings))
    except MoergeError as error:
        shown = settings.shown(settings.folder / change.path)
        annotations.add("error", str(error), file=shown, title=f"{change.name} was not built and published")
        return Outcome(change, str(error), error.exit_code, seconds=time.monotonic() - started)
    except Exception as error:
        say_bug(annotations, error, settings.debug)
        return Outcome(change, "a bug in moerge", MoergeError.exit_code, seconds=time.monotonic() - started)
    assert change.file is not None and change.file.loaded is not None
    return Outcome(
        change,
        _said(change, publication, settings, annotations),
        seconds=time.monotonic() - started,
        parameters=report.parameters["total"],
        bytes=sum(file.bytes for file in (*report.files, *report.gguf_files)),
        publication=publication,
        findings=change.file.loaded.findings,
    )


def _built_and_published(change: Change, settings: Settings) -> tuple[Report, Publication | None]:
    assert change.file is not None and change.file.loaded is not None
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "this image only previews: it has no torch. Build in a job whose `container` is the build image; "
            "docs/action.md shows how"
        )
    # Torch and what comes with it: a preview does without.
    from bot.pipeline import build
    from bot.publish import publish

    loaded = change.file.loaded
    out = settings.out / PurePosixPath(change.path).with_suffix("")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{out}: {error.strerror}; input `out` must name a folder") from None
    report = build(loaded, settings.sources(change.path), out, device=settings.device)
    if not settings.publish or loaded.recipe.release.repo is None:
        return report, None
    return report, publish(out, token=settings.token, endpoint=settings.endpoint)


def _said(change: Change, publication: Publication | None, settings: Settings, annotations: Annotations) -> str:
    """In one sentence what became of a recipe that was built."""
    if publication is not None:
        return "published" if publication.changed else "published already: the Hub has this very model"
    if not settings.publish:
        return "built, and not published because `publish` is false"
    annotations.add(
        "notice",
        "Built, and not published: the recipe names no repository. Add release: {repo: owner/name}.",
        file=settings.shown(settings.folder / change.path),
    )
    return "built, and not published: the recipe names no release.repo"
