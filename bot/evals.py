"""The evaluation stages of a build: what the recipe wants measured, results measured elsewhere, and samples.

Each figure is a stage of its own: it is kept as long as the model and its own inputs are the same, so a run that was cut
off goes on at the task where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from bot.state import stage_key
from bot.work import Work
from evals.harness_results import ResultsError, read_results, scores_of
from evals.questions import QuestionsError, read_questions
from evals.results import Report
from evals.scores import ModelLosses, ModelSample, Perplexities, Score
from merge import __version__
from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.errors import RecipeError, UsageError
from merge.progress import progress, say
from merge.recipe import LoadedRecipe
from merge.recipe_evals import LocalTask, Reported
from merge.yaml_file import load as load_yaml

MAX_TEXT = 64 << 20
_PERPLEXITIES = TypeAdapter(Perplexities)
_SAMPLES = TypeAdapter(tuple[ModelSample, ...])


@dataclass(frozen=True)
class Inputs:
    """What a recipe's evaluations read beside it, all of it checked: texts by name, the harness's runs, others' scores."""

    texts: Mapping[str, str]
    tasks: tuple[Any, ...]
    scores: tuple[Score, ...]


def read_inputs(loaded: LoadedRecipe) -> Inputs:
    """Read and check the files that the recipe's `evals` name, before anything is built. Raises RecipeError for the first
    that cannot be used, UsageError where lm-eval is needed and not installed."""
    evals = loaded.recipe.evals
    texts = {name: _text(loaded, file) for name, file in evals.text_files.items()}
    return Inputs(texts, _tasks(loaded), others_scores(loaded))


def others_scores(loaded: LoadedRecipe) -> tuple[Score, ...]:
    """The scores that the recipe brings along: imported from lm-eval's files, or reported. Raises RecipeError."""
    return tuple(score for table in loaded.recipe.evals.result_tables for score in _scores(loaded, table))


def evaluated(work: Work, inputs: Inputs, report: Report) -> Report:
    """`report` with everything that the recipe wants to know of the finished model."""
    return replace(
        report,
        perplexities=_perplexities(work, inputs.texts),
        scores=(*_measured(work, inputs.tasks), *inputs.scores),
        samples=_samples(work),
    )


# ---------------------------------------------------------------------------------------------------- files beside the recipe


def _text(loaded: LoadedRecipe, file: str) -> str:
    raw = read_beside(loaded, file, "evals.texts", ("evals", "texts"), MAX_TEXT)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise bad_file(loaded, file, "evals.texts", ("evals", "texts"), "it is not UTF-8 text") from None
    if not text.strip():
        raise bad_file(loaded, file, "evals.texts", ("evals", "texts"), "it is empty")
    return text


def _scores(loaded: LoadedRecipe, table: str | Reported) -> tuple[Score, ...]:
    from evals.reported import reported_scores

    if isinstance(table, Reported):
        return reported_scores(table)
    place = ("evals", "results")
    raw = read_beside(loaded, table, "evals.results", place, MAX_TEXT)
    if table.endswith((".yaml", ".yml")):
        try:
            value = load_yaml(raw, table).value
            return reported_scores(Reported.model_validate(value))
        except RecipeError as error:
            raise bad_file(loaded, table, "evals.results", place, error.findings[0].text) from None
        except ValueError as error:
            raise bad_file(loaded, table, "evals.results", place, _first(error)) from None
    try:
        return read_results(raw, "imported")
    except ResultsError as error:
        raise bad_file(loaded, table, "evals.results", place, str(error)) from None


def _tasks(loaded: LoadedRecipe) -> tuple[Any, ...]:
    asked = loaded.recipe.evals.tasks or ()
    if not asked:
        return ()
    from evals.harness import HarnessTask, is_installed, runs_of

    if not is_installed():
        raise UsageError("evals.tasks needs lm-eval; install it with: pip install 'moerge[eval]'")
    runs: list[HarnessTask] = []
    for task in asked:
        if isinstance(task, LocalTask):
            raw = read_beside(loaded, task.data, "evals.tasks", ("evals", "tasks"), MAX_TEXT)
            try:
                questions = read_questions(raw)
            except QuestionsError as error:
                raise bad_file(loaded, task.data, "evals.tasks", ("evals", "tasks"), str(error)) from None
            if len(questions) <= task.shots:
                problem = f"it has {len(questions)} questions, of which {task.shots} are to stand in the prompt"
                raise bad_file(loaded, task.data, "evals.tasks", ("evals", "tasks"), problem)
            runs.append(HarnessTask(task.name, task.shots, questions, task.title))
        else:
            runs += runs_of([task])
    return tuple(dict.fromkeys(runs))


def read_beside(loaded: LoadedRecipe, file: str, key: str, place: tuple[str | int, ...], limit: int) -> bytes:
    """The bytes of a file in the recipe's folder. Raises RecipeError where it is elsewhere, missing or too large."""
    path = (loaded.folder / file).resolve()
    try:
        if not path.is_relative_to(loaded.folder.resolve()):
            raise bad_file(loaded, file, key, place, "it lies outside the recipe's folder")
        if path.stat().st_size > limit:
            raise bad_file(loaded, file, key, place, f"it is larger than {limit >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise bad_file(loaded, file, key, place, problem) from None


def bad_file(loaded: LoadedRecipe, file: str, key: str, place: tuple[str | int, ...], problem: str) -> RecipeError:
    """A file beside the recipe that cannot be used."""
    finding = f.BadEvaluationFile(loaded.line(*place), file=file, key=key, problem=problem)
    return RecipeError([finding], str(loaded.path))


def _first(error: ValueError) -> str:
    """The first thing that pydantic says is wrong with a table."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


# ------------------------------------------------------------------------------------------------------------------ measuring


def _perplexities(work: Work, texts: Mapping[str, str]) -> Perplexities | None:
    """The mixture, the base and each expert on every text."""
    if not texts:
        return None
    key = stage_key("perplexity", work.merge_key, sorted(texts.items()), __version__)
    result = work.state.result("perplexity", key)
    if result is None:
        result = {"found": _PERPLEXITIES.dump_python(_measure_texts(work, texts), mode="json")}
        work.state.finish("perplexity", key, [], result)
    return _PERPLEXITIES.validate_python(result["found"])


def _measure_texts(work: Work, texts: Mapping[str, str]) -> Perplexities:
    from bot.gates import dense_model
    from evals.perplexity import text_losses, token_ids
    from merge.evaluate import checkpoint_expressions

    tensors, config, evaluator = checkpoint_expressions(work.model)
    ids = token_ids(work.model, list(texts.values()))
    # The base, and every expert's model with its adapter where it has one, each once.
    dense = dict.fromkeys([(work.plan.base, None), *work.plan.models[: len(work.plan.experts)]])
    total = (1 + len(dense)) * work.plan.config["num_hidden_layers"]
    with progress(f"perplexity on {len(texts)} texts", total, unit="layer") as shown:
        losses = text_losses(config, tensors, evaluator, ids, device=work.on_device, progress=shown.advance)
        models = [ModelLosses(work.plan.name, "mixture", tuple(losses))]
        for number, (source, adapter) in enumerate(dense):
            model = work.local[source]
            same = _same_tokens(model, texts, ids)
            alike = [ids[i] for i in range(len(ids)) if same[i]]
            measured = iter(
                text_losses(
                    *dense_model(work.local, source, adapter), alike, device=work.on_device, progress=shown.advance
                )
                if alike
                else ()
            )
            found = tuple(next(measured) if is_same else None for is_same in same)
            name = f"{model.name} with {work.local[adapter].name}" if adapter else model.name
            models.append(ModelLosses(name, "base" if number == 0 else "expert", found))
    return Perplexities(tuple(texts), tuple(models), datetime.now(UTC).date().isoformat())


def _same_tokens(checkpoint: Checkpoint, texts: Mapping[str, str], ids: Sequence[tuple[int, ...]]) -> list[bool]:
    """Which texts a source's own tokenizer cuts as the mixture's does: only those figures can be compared."""
    from evals.perplexity import token_ids
    from merge.checkpoint import TOKENIZER_FILES

    if not any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES if checkpoint.folder):
        return [True] * len(ids)
    assert checkpoint.folder is not None
    own = token_ids(checkpoint.folder, list(texts.values()))
    return [one == other for one, other in zip(own, ids, strict=True)]


def _measured(work: Work, tasks: Sequence[Any]) -> tuple[Score, ...]:
    """The harness's scores, task after task; those that an earlier run finished are kept."""
    if not tasks:
        return ()
    from evals.harness import Harness, HarnessTask, version

    runs: list[HarnessTask] = list(tasks)
    keys = {run: stage_key("task", work.merge_key, run, version()) for run in runs}
    harness: Harness | None = None
    scores: list[Score] = []
    for number, run in enumerate(runs, 1):
        stage = f"task/{run.label}"
        result = work.state.result(stage, keys[run])
        if result is None:
            if harness is None:
                harness = Harness(work.model, work.on_device, work.out / "evals")
                _check_names(work, harness, runs)
            say(f"lm-eval: {run.label} ({number} of {len(runs)})")
            result = harness.run(run)
            work.state.finish(stage, keys[run], [], result)
        found = scores_of(result, "measured")
        scores += [replace(score, title=run.title) if run.title else score for score in found]
    return tuple(scores)


def _check_names(work: Work, harness: Any, runs: Sequence[Any]) -> None:
    from evals.harness import version

    found = [
        f.UnknownTask(work.loaded.line("evals", "tasks"), task=run.name, version=version(), hint=hint)
        for run in runs
        if not run.questions and (hint := harness.unknown(run.name)) is not None
    ]
    if found:
        raise RecipeError(found, str(work.loaded.path))


def _samples(work: Work) -> tuple[ModelSample, ...]:
    """What the merged model writes after the recipe's prompts."""
    prompts = work.loaded.recipe.evals.samples or ()
    if not prompts:
        return ()
    seed = work.loaded.recipe.build.seed
    key = stage_key("samples", work.merge_key, prompts, seed, __version__)
    result = work.state.result("samples", key)
    if result is None:
        from evals.samples import TOKENS, write_samples

        with progress("samples", TOKENS, unit="token") as shown:
            made = write_samples(work.model, prompts, seed, device=work.on_device, progress=shown.advance)
        result = {"found": _SAMPLES.dump_python(made, mode="json")}
        work.state.finish("samples", key, [], result)
    return _SAMPLES.validate_python(result["found"])
