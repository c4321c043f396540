"""Scores in the Hub's own forms: `model-index` in the card's metadata, and `.eval_results/*.yaml` for registered benchmarks.

https://huggingface.co/docs/hub/model-cards#evaluation-results and https://huggingface.co/docs/hub/eval-results. Only where the
data set is a registered benchmark does the Hub show a result of the second kind; what is none is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from cards.evaluation import HARNESS_URL
from cards.markdown import is_web, one_line
from evals.results import Report
from evals.scores import Score

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FOLDER = ".eval_results"
# Benchmarks that the Hub's documentation names as registered: the names of their data sets in scores, with the one of its
# configurations that is the benchmark where it has others, and the data set's id on the Hub and the id of its task.
REGISTERED: Mapping[tuple[str, str | None], tuple[str, str]] = MappingProxyType(
    {
        ("gsm8k", None): ("openai/gsm8k", "gsm8k"),
        ("openai/gsm8k", None): ("openai/gsm8k", "gsm8k"),
        ("TIGER-Lab/MMLU-Pro", None): ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
        ("Idavidrein/gpqa", "gpqa_diamond"): ("Idavidrein/gpqa", "diamond"),
        ("cais/hle", None): ("cais/hle", "hle"),
    }
)
# The harness's tasks with a part of such a data set: `mmlu_pro_math` is not MMLU-Pro.
PARTS = ("mmlu_pro_",)


def model_index(report: Report) -> list[EvalResult]:
    """The report's scores, each with its source."""
    from huggingface_hub import EvalResult

    found = []
    for score in report.scores:
        source = _source(score)
        found.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=one_line(score.dataset) or one_line(score.title),
                dataset_name=one_line(score.title),
                dataset_config=_line(score.config),
                dataset_split=_line(score.split),
                dataset_args={"num_few_shot": score.shots} if score.shots is not None else None,
                metric_type=one_line(score.metric),
                metric_value=round(score.value, 2),
                metric_name=_line(score.metric_name),
                source_name=source[0] if source else None,
                source_url=source[1] if source else None,
            )
        )
    return found


def result_files(report: Report) -> dict[str, bytes]:
    """`.eval_results/*.yaml`, by path in the repository."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for score in report.scores:
        registered = REGISTERED.get((score.dataset, score.config)) or REGISTERED.get((score.dataset, None))
        if registered is None or score.task.startswith(PARTS):
            continue
        dataset, task = registered
        source = _source(score)
        how = [f"{score.shots}-shot"] if score.shots is not None else []
        how += [one_line(score.harness)] if score.harness else []
        how += {
            "measured": ["measured when the model was built"],
            "reported": ["reported, not measured by the model's build"],
        }.get(score.origin, ["run beside the model's build"])
        entries.setdefault(dataset.rpartition("/")[2].lower(), []).append(
            EvalResultEntry(
                dataset_id=dataset,
                task_id=task,
                value=round(score.value, 2),
                date=_line(score.date),
                source_name=source[0] if source else None,
                source_url=source[1] if source else None,
                notes=", ".join(how),
            )
        )
    return {
        f"{FOLDER}/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(listed), sort_keys=False).encode()
        for name, listed in entries.items()
    }


def _source(score: Score) -> tuple[str, str] | None:
    if score.source_url and is_web(score.source_url):
        return one_line(score.source_name or score.source_url), one_line(score.source_url)
    return (one_line(score.harness), HARNESS_URL) if score.harness and score.origin != "reported" else None


def _line(text: str | None) -> str | None:
    return one_line(text) or None if text else None
