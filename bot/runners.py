"""Where a recipe is built: labels of GitHub runners, or a Hugging Face Job.

ubuntu-latest               a hosted runner
self-hosted, gpu            a runner that has every one of these labels
hf-jobs:a10g-large:4h       a Hugging Face Job of that flavor, ended after four hours
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from merge import findings as f
from merge.recipe import LoadedRecipe

HF_JOBS = "hf-jobs"
# 8 cores and 32 GB of memory: enough for a merge; the Hub's own default has 2 cores and 16 GB.
DEFAULT_FLAVOR = "cpu-upgrade"
# The Hub's own default ends a job after 30 minutes, in which few models are even downloaded.
DEFAULT_SECONDS = 6 * 3600
MAX_SECONDS = 7 * 24 * 3600
# The step that sends a job off and shows its log needs no more than a free hosted runner.
DISPATCHER = "ubuntu-latest"
HOSTED = re.compile(r"(ubuntu|windows|macos)-[a-z0-9.-]+")

_FLAVOR = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
_TIME = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Runner:
    """Where a build runs: on a GitHub runner with all of `labels`; with `flavor` in a Hugging Face Job of at most `seconds`,
    which a runner with `labels` sends off and watches."""

    labels: tuple[str, ...]
    flavor: str | None = None
    seconds: int = DEFAULT_SECONDS

    @property
    def text(self) -> str:
        """As a person writes it."""
        if self.flavor is None:
            return ", ".join(self.labels)
        unit, seconds = next((unit, size) for unit, size in reversed(_UNITS.items()) if self.seconds % size == 0)
        return f"{HF_JOBS}:{self.flavor}:{self.seconds // seconds}{unit}"

    @property
    def runs_on(self) -> str | list[str]:
        """The value of a job's `runs-on`."""
        return self.labels[0] if len(self.labels) == 1 else list(self.labels)

    @property
    def is_hosted(self) -> bool:
        """Whether it is one of GitHub's standard runners, none of which has a GPU."""
        return any(HOSTED.fullmatch(label) for label in self.labels)


def parse_runner(text: str) -> Runner:
    """A runner from `build.runner` or the input `runner`. Raises ValueError with what is wrong in words."""
    word, *rest = (part.strip() for part in text.split(":"))
    if word != HF_JOBS:
        labels = tuple(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
        if not labels:
            raise ValueError("it names no label")
        return Runner(labels)
    if len(rest) > 2:
        raise ValueError(f"it is written {HF_JOBS}, {HF_JOBS}:FLAVOR or {HF_JOBS}:FLAVOR:TIME")
    flavor = rest[0] if rest and rest[0] else DEFAULT_FLAVOR
    if not _FLAVOR.fullmatch(flavor):
        raise ValueError(f"{flavor!r} is no flavor of a Job, such as a10g-large")
    return Runner((DISPATCHER,), flavor, _seconds(rest[1]) if len(rest) == 2 else DEFAULT_SECONDS)


def runner_findings(loaded: LoadedRecipe) -> tuple[f.Finding, ...]:
    """What is wrong with the runner that a recipe asks for."""
    text, line = loaded.recipe.build.runner, loaded.line("build", "runner")
    if text is None:
        return ()
    try:
        runner = parse_runner(text)
    except ValueError as error:
        return (f.BadRunner(line, runner=text, problem=str(error)),)
    if runner.flavor is None:
        return ()
    found: list[f.Finding] = []
    if (flavors := known_flavors()) and runner.flavor not in flavors:
        near = difflib.get_close_matches(runner.flavor, flavors, 1, 0.5)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        found.append(f.UnknownFlavor(line, flavor=runner.flavor, hint=hint, known=", ".join(flavors)))
    if loaded.recipe.release.repo is None:
        found.append(f.JobWithoutRepository(line))
    local = [reference for reference in loaded.recipe.references if any(part.is_local for part in reference.parts)]
    if local:
        found.append(f.JobWithLocalSource(line, model=local[0].parts[0].path))
    return tuple(found)


def known_flavors() -> tuple[str, ...]:
    """The flavors of Jobs that the Hub's client knows. The Hub may have newer ones."""
    from huggingface_hub import JobHardware

    return tuple(flavor.value for flavor in JobHardware)


def _seconds(text: str) -> int:
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no time; it is a number and one of s, m, h and d, such as 4h")
    seconds = int(found[1]) * _UNITS[found[2]]
    if not 60 <= seconds <= MAX_SECONDS:
        raise ValueError(f"{text} is not between 1m and {MAX_SECONDS // 86400}d")
    return seconds
