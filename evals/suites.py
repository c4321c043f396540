"""Sets of benchmarks that people compare models by. An average is one only over the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from evals.scores import Score


@dataclass(frozen=True)
class Task:
    """A task or group of lm-eval's, with its examples in the prompt and the metric that counts. `datasets` are the names
    under which results of it stand on the Hub."""

    name: str
    shots: int
    metric: str
    title: str
    datasets: tuple[str, ...] = ()

    def matches(self, score: Score) -> bool:
        """Whether `score` is this task's figure, with this many examples in the prompt."""
        same = score.task == self.name or (not score.task and score.dataset in self.datasets)
        return same and score.shots == self.shots and score.metric in (self.metric, METRIC_ALIASES.get(self.metric))


@dataclass(frozen=True)
class Part:
    """A line of a suite's table: one task, or the mean of several."""

    title: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks. Its average is the mean of its parts."""

    title: str
    parts: tuple[Part, ...]
    note: str = ""

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for part in self.parts for task in part.tasks)


# What a metric of the harness is called in leaderboards' tables.
METRIC_ALIASES = MappingProxyType({"acc": "mc2", "exact_match": "acc"})


def _single(*tasks: Task) -> tuple[Part, ...]:
    return tuple(Part(task.title, (task,)) for task in tasks)


def _zero_shot(metric: str, *names: str) -> tuple[Task, ...]:
    return tuple(Task(name, 0, metric, name) for name in names)


_BIGBENCH = (
    "causal_judgment", "date_understanding", "disambiguation_qa", "geometric_shapes", "logical_deduction",
    "movie_recommendation", "navigate", "reasoning_about_colored_objects", "ruin_names",
    "salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences",
    "tracking_shuffled_objects",
)  # fmt: skip

SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "open-llm-leaderboard-v1": Suite(
            "Open LLM Leaderboard v1",
            _single(
                Task("arc_challenge", 25, "acc_norm", "AI2 Reasoning Challenge (25-shot)", ("ai2_arc", "allenai/ai2_arc")),
                Task("hellaswag", 10, "acc_norm", "HellaSwag (10-shot)", ("hellaswag", "Rowan/hellaswag")),
                Task("mmlu", 5, "acc", "MMLU (5-shot)", ("cais/mmlu",)),
                Task("truthfulqa_mc2", 0, "acc", "TruthfulQA (0-shot)", ("truthful_qa", "truthfulqa/truthful_qa")),
                Task("winogrande", 5, "acc", "Winogrande (5-shot)", ("winogrande", "allenai/winogrande")),
                Task("gsm8k", 5, "exact_match", "GSM8k (5-shot)", ("gsm8k", "openai/gsm8k")),
            ),
            "The same six tasks with the same numbers of examples; the leaderboard's own figures came from an older "
            "version of the harness.",
        ),
        "nous": Suite(
            "Nous",
            (
                Part("AGIEval", (Task("agieval_nous", 0, "acc_norm", "AGIEval"),)),
                Part(
                    "GPT4All",
                    (
                        *_zero_shot("acc_norm", "arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa"),
                        *_zero_shot("acc", "boolq", "winogrande"),
                    ),
                ),
                Part("TruthfulQA", (Task("truthfulqa_mc2", 0, "acc", "TruthfulQA"),)),
                Part("BigBench", _zero_shot("acc", *(f"bigbench_{name}_multiple_choice" for name in _BIGBENCH))),
            ),
            "As far as the harness has these tasks: its BigBench has one task for each number of objects together where "
            "the original suite has several.",
        ),
        "eq-bench": Suite("EQ-Bench", _single(Task("eq_bench", 0, "eqbench", "EQ-Bench"))),
    }
)  # fmt: skip


def part_value(part: Part, scores: Sequence[Score]) -> float | None:
    """The mean of a part's tasks; None where one of them is not among `scores`."""
    found = [next((score for score in scores if task.matches(score)), None) for task in part.tasks]
    values = [score.value for score in found if score is not None]
    return sum(values) / len(values) if len(values) == len(part.tasks) else None


def average(suite: Suite, scores: Sequence[Score]) -> float | None:
    """The mean of a suite's parts; None where the set is not complete."""
    values = [part_value(part, scores) for part in suite.parts]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
