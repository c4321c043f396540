"""Tasks of lm-eval on a merged checkpoint, one at a time: https://github.com/EleutherAI/lm-evaluation-harness.

Comes with the extra `moerge[eval]`. A run is always over all of a task's examples; code that a task's data set would bring
along is never trusted, and tasks that run what the model wrote are not confirmed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evals.questions import Question
from evals.suites import SUITES
from merge.errors import SourceError, UsageError

# Examples that are run at once on a CPU; on a GPU the harness finds out how many fit.
CPU_BATCH = 8
KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "date")


@dataclass(frozen=True)
class HarnessTask:
    """One run: the harness's name of a task, examples in its prompt (None: the task's own number), or questions of one's own."""

    name: str
    shots: int | None = None
    questions: tuple[Question, ...] = ()
    title: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.shots is None else f"{self.name}, {self.shots}-shot"


def is_installed() -> bool:
    return find_spec("lm_eval") is not None


def version() -> str:
    return metadata.version("lm_eval")


def runs_of(names: Sequence[str]) -> list[HarnessTask]:
    """The runs that names of tasks and of suites mean, each once."""
    runs: list[HarnessTask] = []
    for name in names:
        suite = SUITES.get(name)
        runs += [HarnessTask(task.name, task.shots) for task in suite.tasks] if suite else [HarnessTask(name)]
    return list(dict.fromkeys(runs))


class Harness:
    """lm-eval with one model, loaded at the first run.

    Raises UsageError where lm-eval is not installed.
    """

    def __init__(self, model: Path, device: str, cache: Path) -> None:
        """`model` is a checkpoint's folder, `cache` one for the questions of tasks of one's own."""
        if not is_installed():
            raise UsageError("evals.tasks needs lm-eval; install it with: pip install 'moerge[eval]'")
        from lm_eval.tasks import TaskManager

        self._folder, self._device, self._cache = model, device, cache
        self._manager = TaskManager()
        self._model: Any = None

    def unknown(self, name: str) -> str | None:
        """None where there is a task, group or tag of this name; else a hint, which may be empty."""
        known = self._manager.all_tasks
        if name in known:
            return None
        near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
        return f"; perhaps you meant {near[0]!r}" if near else ""

    def run(self, task: HarnessTask) -> dict[str, Any]:
        """lm-eval's results of a task, over all its examples. Raises SourceError where its data cannot be had."""
        from lm_eval import simple_evaluate

        asked: str | dict[str, Any] = self._config(task) if task.questions else task.name
        try:
            found = simple_evaluate(
                model=self._loaded(),
                tasks=[asked],
                num_fewshot=None if task.questions else task.shots,
                task_manager=self._manager,
                log_samples=False,
                batch_size=self._batch(),
            )
        except (OSError, ValueError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise SourceError(f"lm-eval could not run {task.label}: {said}") from None
        assert found is not None
        # Through JSON, as the harness writes it: what cannot be written (functions in configurations) as text.
        kept = {key: found[key] for key in KEPT if key in found}
        value: dict[str, Any] = json.loads(json.dumps(kept, default=str))
        return value | {"lm_eval_version": version(), "date": datetime.now(UTC).timestamp()}

    def _loaded(self) -> Any:
        if self._model is None:
            from lm_eval.models.huggingface import HFLM

            self._model = HFLM(
                pretrained=str(self._folder), device=self._torch_device(), batch_size=self._batch(), dtype="auto"
            )
        return self._model

    def _torch_device(self) -> str:
        from merge.forward import resolve_device

        return str(resolve_device(self._device))

    def _batch(self) -> int | str:
        return "auto" if self._torch_device().startswith("cuda") else CPU_BATCH

    def _config(self, task: HarnessTask) -> dict[str, Any]:
        """A task of one's own for the harness; its few-shot examples are the first questions, which are not asked."""
        shots = task.shots or 0
        files = {"test": self._lines(f"{task.name}.test", task.questions[shots:])}
        config: dict[str, Any] = {
            "task": task.name,
            "dataset_path": "json",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "num_fewshot": shots,
            "metadata": {"version": 1},
        }
        if shots:
            files["shots"] = self._lines(f"{task.name}.shots", task.questions[:shots])
            config |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
        return config | {"dataset_kwargs": {"data_files": files}}

    def _lines(self, name: str, questions: Sequence[Question]) -> str:
        self._cache.mkdir(parents=True, exist_ok=True)
        path = self._cache / f"{name}.jsonl"
        path.write_text("".join(json.dumps(asdict(question)) + "\n" for question in questions), encoding="utf-8")
        return str(path.resolve())
