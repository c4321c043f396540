"""Scores from lm-eval's result files, whoever ran it: https://github.com/EleutherAI/lm-evaluation-harness.

A run over some of a task's examples is no score, and is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from evals.scores import HARNESS, Origin, Score
from evals.suites import SUITES

MAX_BYTES = 64 << 20
# Of a task with several metrics this is the one that is told, unless a suite names another.
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "em", "eqbench", "pass@1", "rouge1_max", "bleu_max")
# Metrics between 0 and 1, told in percent.
SHARES = frozenset(
    {"acc_norm", "acc", "exact_match", "f1", "em", "mc1", "mc2", "pass@1", "acc_mutual_info", "brier_score"}
)
METRIC_NAMES = {"acc_norm": "normalized accuracy", "acc": "accuracy", "exact_match": "exact match"}


class ResultsError(ValueError):
    """The file holds no results, or results that are no scores; the message says why."""


def read_results(raw: bytes, origin: Origin, *, source_url: str | None = None) -> tuple[Score, ...]:
    """The scores in a `results_*.json` of lm-eval, one for each task or group. Raises ResultsError."""
    if len(raw) > MAX_BYTES:
        raise ResultsError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ResultsError("not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("results"), dict):
        raise ResultsError("not a results file of lm-eval: it has no 'results'")
    return scores_of(value, origin, source_url=source_url)


def scores_of(value: Mapping[str, Any], origin: Origin, *, source_url: str | None = None) -> tuple[Score, ...]:
    """The scores in lm-eval's result object. Raises ResultsError where it was limited or holds none."""
    _refuse_limited(value)
    results = value["results"]
    # What a group sums up is told once: by the outermost group that has a figure.
    summed_up: set[str] = set()
    for group, inside in _dict(value, "group_subtasks").items():
        if isinstance(inside, list) and _metric(group, results.get(group)):
            summed_up.update(map(str, inside))
    scores = [
        score
        for name, figures in results.items()
        if name not in summed_up and (score := _score(value, str(name), figures, origin, source_url)) is not None
    ]
    if not scores:
        raise ResultsError("it holds no figure of a metric that is known here")
    return tuple(scores)


def _refuse_limited(value: Mapping[str, Any]) -> None:
    counts = _dict(value, "n-samples")
    for task, count in counts.items():
        if isinstance(count, dict) and isinstance(count.get("original"), int):
            effective, original = count.get("effective"), count["original"]
            if not isinstance(effective, int) or effective < original:
                raise ResultsError(
                    f"{task} was run on {effective} of {original} examples: a limited run is no score; run it whole"
                )
    config = _dict(value, "config")
    if config.get("limit") is not None or config.get("samples"):
        raise ResultsError("it was run with a limit: a limited run is no score; run it whole")
    if not counts:
        raise ResultsError(
            "it does not say on how many examples it was run (n-samples): an lm-eval before 0.4.3 wrote it"
        )


def _score(value: Mapping[str, Any], name: str, figures: Any, origin: Origin, source_url: str | None) -> Score | None:
    shots = _shots(value, name)
    found = _metric(name, figures, shots)
    if found is None:
        return None
    metric, filtered, number = found
    config = _dict(_dict(value, "configs"), name) or _first_of_group(value, name)
    share = metric in SHARES
    stderr = figures.get(f"{metric}_stderr,{filtered}")
    stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    version = value.get("lm_eval_version")
    return Score(
        title=_title(value, name, shots),
        metric=metric,
        metric_name=METRIC_NAMES.get(metric, metric) + (f", {filtered}" if filtered not in ("none", "") else ""),
        value=100 * number if share else number,
        stderr=None if stderr is None else 100 * stderr if share else stderr,
        origin=origin,
        task=name,
        # A file beside the recipe has no name on the Hub.
        dataset=_dataset(config) or "",
        config=_text(config.get("dataset_name")),
        split=_text(config.get("test_split")) or _text(config.get("validation_split")),
        shots=shots,
        samples=_samples(value, name),
        harness=f"{HARNESS} {version}" if isinstance(version, str) else HARNESS,
        task_version=_version(value, name),
        date=_date(value.get("date")),
        source_url=source_url,
    )


def _metric(name: str, figures: Any, shots: int | None = None) -> tuple[str, str, float] | None:
    """The metric that is told of a task: its name, its filter, its value."""
    if not isinstance(figures, dict):
        return None
    found: dict[str, tuple[str, float]] = {}
    for key, number in figures.items():
        metric, _, filtered = str(key).partition(",")
        if not metric.endswith("_stderr") and isinstance(number, int | float) and not isinstance(number, bool):
            strict = filtered.startswith("strict")
            if math.isfinite(number) and (metric not in found or strict) and "," in str(key):
                found[metric] = filtered, float(number)
    wanted = [
        task.metric
        for suite in SUITES.values()
        for task in suite.tasks
        if task.name == name and (shots is None or task.shots == shots)
    ]
    for metric in (*wanted, *PREFERRED, *found):
        if metric in found:
            return metric, *found[metric]
    return None


def _title(value: Mapping[str, Any], name: str, shots: int | None) -> str:
    for suite in SUITES.values():
        for task in suite.tasks:
            if task.name == name and task.shots == shots and task.title != task.name:
                return task.title
    alias = _text(_dict(_dict(value, "results"), name).get("alias")) or name
    return f"{alias.strip(' -')} ({shots}-shot)" if shots is not None else alias.strip(" -")


def _shots(value: Mapping[str, Any], name: str) -> int | None:
    """Examples in the prompt: of a group those of its tasks, where they are all the same."""
    shots = _dict(value, "n-shot")
    found = {shots[task] for task in (name, *_tasks(value, name)) if isinstance(shots.get(task), int)}
    return found.pop() if len(found) == 1 else None


def _samples(value: Mapping[str, Any], name: str) -> int | None:
    counts = _dict(value, "n-samples")
    found = [_dict(counts, task).get("effective") for task in _tasks(value, name) or [name]]
    known = [count for count in found if isinstance(count, int)]
    return sum(known) if known and len(known) == len(found) else None


def _version(value: Mapping[str, Any], name: str) -> str | None:
    version = _dict(value, "versions").get(name)
    return str(version) if isinstance(version, int | float | str) else None


def _tasks(value: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, through groups inside it; empty for a task."""
    groups, found, seen = _dict(value, "group_subtasks"), list[str](), {name}

    def walk(group: str) -> Iterator[str]:
        inside = groups.get(group)
        for task in inside if isinstance(inside, list) else []:
            if task not in seen:
                seen.add(task)
                yield from walk(task) if groups.get(task) else [task]

    found.extend(walk(name))
    return found


def _first_of_group(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a group's tasks have in common, of which only the dataset is told."""
    paths = {_text(_dict(_dict(value, "configs"), task).get("dataset_path")) for task in _tasks(value, name)}
    path = paths.pop() if len(paths) == 1 else None
    return {"dataset_path": path} if path else {}


def _dataset(config: Mapping[str, Any]) -> str | None:
    path = _text(config.get("dataset_path"))
    return None if path in ("json", "csv", "parquet", "text") else path


def _date(seconds: Any) -> str | None:
    if isinstance(seconds, int | float) and 0 < seconds < 1e11:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    return None


def _dict(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
