"""lm-eval's result files become scores, and a limited run does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evals.harness_results import ResultsError, read_results
from evals.suites import SUITES, average, part_value


def results(**changes: Any) -> dict[str, Any]:
    """What lm-eval 0.4 writes for one task, shortened to the keys that are read."""
    value: dict[str, Any] = {
        "results": {
            "arc_challenge": {
                "alias": "arc_challenge",
                "acc,none": 0.6843,
                "acc_stderr,none": 0.0136,
                "acc_norm,none": 0.7201,
                "acc_norm_stderr,none": 0.0131,
            }
        },
        "group_subtasks": {"arc_challenge": []},
        "configs": {
            "arc_challenge": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Challenge", "test_split": "test"}
        },
        "versions": {"arc_challenge": 1.0},
        "n-shot": {"arc_challenge": 25},
        "n-samples": {"arc_challenge": {"original": 1172, "effective": 1172}},
        "config": {"limit": None},
        "date": 1_700_000_000.0,
        "lm_eval_version": "0.4.13",
    }
    return value | changes


def read(value: Any) -> Any:
    return read_results(json.dumps(value).encode(), "imported")


def test_a_score_carries_origin_harness_version_shots_and_date() -> None:
    [score] = read(results())
    assert (score.title, score.metric, score.value) == (
        "AI2 Reasoning Challenge (25-shot)",
        "acc_norm",
        pytest.approx(72.01),
    )
    assert score.stderr == pytest.approx(1.31)
    assert (score.origin, score.harness, score.task_version) == ("imported", "lm-evaluation-harness 0.4.13", "1.0")
    assert (score.shots, score.samples, score.date) == (25, 1172, "2023-11-14")
    assert (score.dataset, score.config, score.split) == ("allenai/ai2_arc", "ARC-Challenge", "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"n-samples": {"arc_challenge": {"original": 1172, "effective": 100}}},
        {"n-samples": {"arc_challenge": {"original": 1172, "effective": None}}},
        {"config": {"limit": 100.0}},
        {"config": {"limit": None, "samples": {"arc_challenge": [0, 1]}}},
        {"n-samples": {}},
    ],
)
def test_a_limited_run_is_no_score(changes: dict[str, Any]) -> None:
    with pytest.raises(ResultsError, match=r"limit|on how many"):
        read(results(**changes))


@pytest.mark.parametrize("value", [[], {}, {"results": 1}, {"results": {}}, "x", {"results": {"a": {"b,none": "x"}}}])
def test_what_is_no_results_file_is_said_to_be_none(value: Any) -> None:
    with pytest.raises(ResultsError):
        read(value)
    with pytest.raises(ResultsError, match="not JSON"):
        read_results(b"{", "imported")


def test_a_group_is_told_once_and_not_its_tasks() -> None:
    leaves = {f"mmlu_{n}": {"alias": f" - {n}", "acc,none": 0.5} for n in range(3)}
    counts = {name: {"original": 10, "effective": 10} for name in leaves}
    [score] = read(
        results(
            results={"mmlu": {"alias": "mmlu", "acc,none": 0.6476}, **leaves},
            group_subtasks={"mmlu": list(leaves)},
            configs={name: {"dataset_path": "cais/mmlu"} for name in leaves},
            **{"n-shot": dict.fromkeys(leaves, 5), "n-samples": counts},
        )
    )
    assert (score.title, score.value, score.shots, score.samples) == ("MMLU (5-shot)", pytest.approx(64.76), 5, 30)
    assert score.dataset == "cais/mmlu"


def test_strict_matching_counts_where_a_task_has_several_filters() -> None:
    [score] = read(
        results(
            results={"gsm8k": {"exact_match,flexible-extract": 0.9, "exact_match,strict-match": 0.7149}},
            **{"n-shot": {"gsm8k": 5}, "n-samples": {"gsm8k": {"original": 5, "effective": 5}}},
        )
    )
    assert score.value == pytest.approx(71.49)
    assert score.metric_name == "exact match, strict-match"


def test_an_average_is_one_over_the_whole_set_with_its_own_shots() -> None:
    suite = SUITES["open-llm-leaderboard-v1"]
    scores = []
    for number, task in enumerate(suite.tasks):
        scores += read(
            results(
                results={task.name: {f"{task.metric},none": number / 10}},
                **{"n-shot": {task.name: task.shots}, "n-samples": {task.name: {"original": 1, "effective": 1}}},
            )
        )
    assert average(suite, scores) == pytest.approx(25)
    assert average(suite, scores[:-1]) is None
    assert part_value(suite.parts[0], scores) == 0
    other = read(results(**{"n-shot": {"arc_challenge": 0}}))
    assert average(suite, [*other, *scores[1:]]) is None
