"""Building and publishing several recipes one after the other, as a step of a workflow does it."""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bot.changes import Change
from bot.inputs import Settings
from bot.matrix import is_buildable, runner_of
from bot.preview import plan_recipe
from bot.releases import Release, released_here, released_in_job, tag_on_hub, tagged_recipe
from bot.runners import Runner
from bot.summary import Outcome
from bot.workflow_commands import Annotations, group, untrusted
from merge.errors import DestinationError, MoergeError, RecipeError, UsageError
from merge.recipe import LoadedRecipe


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


def release_json(path: str, release: Release) -> dict[str, Any]:
    """A release as the output `published` has it."""
    kept = ("repo", "url", "commit", "gguf_repo", "changed")
    return {"recipe": path} | {name: getattr(release, name) for name in kept}


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
            made = _built_and_published(change, settings)
            pushed = tagged_recipe(settings.event.tag, [change.name]) if settings.event.tag else None
            if pushed and made.release:
                tag_on_hub(made.release, pushed[1], settings.token, settings.endpoint)
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
        _said(change, made.release, settings, annotations),
        seconds=time.monotonic() - started,
        parameters=made.parameters,
        bytes=made.bytes,
        release=made.release,
        findings=change.file.loaded.findings,
    )


@dataclass(frozen=True)
class _Made:
    """What one build made: parameters in all, bytes of its files, and its release where it was published."""

    parameters: int
    bytes: int
    release: Release | None


def _built_and_published(change: Change, settings: Settings) -> _Made:
    assert change.file is not None and change.file.loaded is not None
    loaded = change.file.loaded
    out = settings.out / PurePosixPath(change.path).with_suffix("")
    runner = runner_of(change, settings.runner)
    if runner.flavor is not None and settings.publish:
        return _in_job(loaded, runner, change, settings, out)
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "this image only previews: it has no torch. Build in a job whose `container` is the build image; "
            "docs/action.md shows how"
        )
    # Torch and what comes with it: a preview does without.
    from bot.pipeline import build, build_and_publish

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{out}: {error.strerror}; input `out` must name a folder") from None
    if settings.publish and loaded.recipe.release.repo is not None:
        report, publication = build_and_publish(
            loaded, settings.sources(change.path), out,
            device=settings.device, token=settings.token, endpoint=settings.endpoint,
        )  # fmt: skip
        release = released_here(report, publication)
    else:
        report, release = build(loaded, settings.sources(change.path), out, device=settings.device), None
    count = sum(file.bytes for file in (*report.files, *report.gguf_files))
    return _Made(report.parameters["total"], count, release)


def _in_job(loaded: LoadedRecipe, runner: Runner, change: Change, settings: Settings, out: Path) -> _Made:
    """Planned here first: what is wrong with a recipe is known before a machine is paid for."""
    from bot.jobs import JobOptions, build_in_job  # and with it all of publishing: a preview does without

    plan = plan_recipe(loaded, settings.sources(change.path))
    options = JobOptions(settings.job_image, settings.job_namespace, settings.token, settings.endpoint)
    release = released_in_job(loaded, plan, build_in_job(loaded, runner, options, out))
    return _Made(plan.parameters.total, sum(file.bytes for file in release.files), release)


def _said(change: Change, release: Release | None, settings: Settings, annotations: Annotations) -> str:
    """In one sentence what became of a recipe that was built."""
    if release is not None:
        return "published" if release.changed else "published already: the Hub has this very model"
    if not settings.publish:
        return "built, and not published because `publish` is false"
    annotations.add(
        "notice",
        "Built, and not published: the recipe names no repository. Add release: {repo: owner/name}.",
        file=settings.shown(settings.folder / change.path),
    )
    return "built, and not published: the recipe names no release.repo"
