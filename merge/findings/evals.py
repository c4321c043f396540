"""What may be wrong with what a recipe wants to have measured, or reports of other measurements."""

from __future__ import annotations

from merge.findings.base import ERROR, NOTICE, WARNING, Finding


class BadEvaluationFile(Finding):
    """A file that `evals` or `card.image` names cannot be used: it is not there, lies outside the recipe's folder, is too
    large, or does not hold what it should. Results of lm-eval that were made on a part of a task's examples (`--limit`) are
    no scores and are refused; run the task whole. A table of reported results names its source (`source: {name, url}`)."""

    id = "bad-evaluation-file"
    level = ERROR
    message = "{file} cannot be used for {key}: {problem}"


class UnknownTask(Finding):
    """lm-eval has no task, group or tag of this name. `lm-eval ls tasks` lists them; sets of several are
    open-llm-leaderboard-v1, nous and eq-bench."""

    id = "unknown-task"
    level = ERROR
    message = "evals.tasks: lm-eval {version} has no task {task!r}{hint}"


class UnknownCardSection(Finding):
    """`card.sections` and `card.order` speak of a section that the card does not have. A section of your own has a text:
    `sections: {My section: "…"}`."""

    id = "unknown-card-section"
    level = ERROR
    message = "{key}: the card has no section {name!r}{hint}; it has {known}"


class ExpertsMeasuredWhole(Finding):
    """Perplexity on `evals.texts` is measured for the mixture, the base and each expert on its own, so that the card can say
    whether the mixture is worth it. An expert on its own is its whole model: all of it is downloaded, not only its MLPs."""

    id = "experts-measured-whole"
    level = NOTICE
    message = "evals.texts measures each expert on its own too, so every expert is downloaded whole"


class NotMeasuredBounded(Finding):
    """Within `build.max_disk` a model is uploaded and deleted piece by piece, so there is no moment at which it could be
    evaluated. Build it on a machine with room for all of it, or measure it afterwards and bring the results along with
    `evals.results`."""

    id = "not-measured-bounded"
    level = WARNING
    message = "{keys} cannot be measured within build.max_disk, where the model is never on the disk as a whole"
