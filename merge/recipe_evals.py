"""The section `evals` of a recipe: what is measured, and results that were measured elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, StringConstraints, Tag

from merge.recipe_types import LIST, Line, Number, Prompt, Section, Web, as_text


class ReportedSource(Section):
    """Who reported the figures, and where."""

    name: Line
    url: Web


class ReportedTask(Section):
    """What the model was asked to do, in the Hub's words."""

    type: Line = "text-generation"
    name: Line | None = None


class ReportedScore(Section):
    """One reported figure: `dataset` is its title, `type` the dataset's name on the Hub."""

    dataset: Line
    type: Line
    config: Line | None = None
    split: Line | None = None
    num_few_shot: int | None = Field(None, ge=0, le=1000)
    metric: Line
    metric_name: Line | None = None
    value: Number


class Reported(Section):
    """A table of results that somebody else measured. It is shown as reported, with its source. `model_name` and `task` may
    stand there, as they do in the Hub's `model-index`; the card has its own."""

    source: ReportedSource
    results: Annotated[tuple[ReportedScore, ...], LIST] = Field(min_length=1, max_length=500)
    model_name: Line | None = None
    details: Web | None = None
    task: ReportedTask = ReportedTask()
    harness: Line | None = None
    date: Annotated[Line, BeforeValidator(as_text)] | None = None


class LocalTask(Section):
    """A multiple-choice task of one's own: a file of JSON lines with `question`, `choices` and `answer` (from 0)."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]
    data: Line = Field(description="the file of questions beside the recipe")
    shots: int = Field(0, ge=0, le=100, description="how many of the first questions stand in the prompt as examples")
    title: Line | None = None


def _kind_of(value: Any) -> str:
    """Which branch of a union a value belongs to, so that its errors are about that branch alone."""
    if isinstance(value, dict | BaseModel):
        return "mapping"
    return "list" if isinstance(value, list | tuple) else "text"


_ReportedOrFile = Annotated[
    Annotated[Line, Tag("text")] | Annotated[Reported, Tag("mapping")],
    Discriminator(lambda value: "mapping" if _kind_of(value) == "mapping" else "text"),
]
_TaskOrName = Annotated[
    Annotated[Line, Tag("text")] | Annotated[LocalTask, Tag("mapping")],
    Discriminator(lambda value: "mapping" if _kind_of(value) == "mapping" else "text"),
]


class Evals(Section):
    """What is measured, and results measured elsewhere."""

    texts: Annotated[tuple[Line, ...], LIST] | dict[Line, Line] | None = Field(
        None,
        max_length=50,
        description="text files beside the recipe, on which perplexity is measured; by name or as a list",
    )
    tasks: Annotated[tuple[_TaskOrName, ...], LIST] | None = Field(
        None,
        max_length=200,
        description="tasks of lm-eval, sets of them (open-llm-leaderboard-v1, nous, eq-bench), or a file of questions",
    )
    results: (
        Annotated[
            Annotated[Line, Tag("text")]
            | Annotated[Reported, Tag("mapping")]
            | Annotated[tuple[_ReportedOrFile, ...], LIST, Tag("list")],
            Discriminator(_kind_of),
        ]
        | None
    ) = Field(None, description="results measured elsewhere: lm-eval's JSON, or a table with its source")
    samples: Annotated[tuple[Prompt, ...], LIST] | None = Field(
        None, max_length=50, description="prompts that the finished model continues, shown in its card"
    )
    worth: bool | None = Field(
        None,
        description="compare each expert's loss as it is, and under the base's attention, with the base's, on its prompts",
    )

    @property
    def result_tables(self) -> tuple[str | Reported, ...]:
        """The results measured elsewhere: files' names and tables."""
        if self.results is None:
            return ()
        return self.results if isinstance(self.results, tuple) else (self.results,)

    @property
    def text_files(self) -> dict[str, str]:
        """The texts' files by name; without names, by their file's."""
        if self.texts is None or isinstance(self.texts, dict):
            return dict(self.texts or {})
        return {Path(name).stem: name for name in self.texts}

    @property
    def files(self) -> tuple[str, ...]:
        """Every file beside the recipe that is read."""
        tasks = [task.data for task in self.tasks or () if isinstance(task, LocalTask)]
        results = [table for table in self.result_tables if isinstance(table, str)]
        return (*self.text_files.values(), *tasks, *results)
