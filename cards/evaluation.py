"""Evaluations as the card tells them: tables with the origin of every figure, what they mean in words, and the release before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cards import words
from cards.hub import hub_id
from cards.markdown import Markdown, code, escape, link, one_line
from evals.results import Report
from evals.scores import ModelLosses, Perplexities, Score, TextLoss
from evals.suites import SUITES, Suite, average, part_value

HARNESS_URL = "https://github.com/EleutherAI/lm-evaluation-harness"
# Differences of perplexity smaller than this share are none.
SAME = 0.005


@dataclass(frozen=True)
class Table:
    """A table with the sentence above it and those below."""

    before: Markdown
    columns: tuple[str, ...]
    rows: tuple[tuple[Markdown, ...], ...]
    after: tuple[Markdown, ...] = ()


def evaluation_tables(report: Report) -> tuple[Table, ...]:
    """Perplexities first, then benchmark scores by where they come from."""
    found = [_perplexities(report, report.perplexities)] if report.perplexities else []
    groups: dict[tuple[object, ...], list[Score]] = {}
    for score in report.scores:
        # A build's tasks may take it past midnight, or it is cut off and goes on another day.
        date = None if score.origin == "measured" else score.date
        key = (score.origin, score.source_name, score.source_url, score.harness, date)
        groups.setdefault(key, []).append(score)
    return (*found, *(_scores(scores) for scores in groups.values()))


# --------------------------------------------------------------------------------------------------------------- benchmarks


def _scores(scores: Sequence[Score]) -> Table:
    with_error = any(score.stderr for score in scores)
    rows = []
    for score in scores:
        value = escape(words.number(score.value, 2))
        cells = [escape(score.title), escape(score.metric_name or score.metric), value]
        if with_error:
            cells.insert(3, escape(words.number(score.stderr, 2)) if score.stderr else Markdown("-"))
        rows.append(tuple(cells))
    after: list[Markdown] = []
    for suite in SUITES.values():
        here = sum(any(task.matches(score) for score in scores) for task in suite.tasks)
        mean = average(suite, scores)
        if len(suite.tasks) > 1 and mean is not None:
            rows.append(
                (
                    Markdown(f"**Average** ({suite.title})"),
                    Markdown("-"),
                    Markdown(f"**{mean:.2f}**"),
                    *[Markdown("-")] * with_error,
                )
            )
            after += _parts(suite, scores)
        elif len(suite.tasks) > 1 and here > 1 and here > len(suite.tasks) // 2:
            after.append(
                Markdown(f"No average of {suite.title} is given: {here} of its {len(suite.tasks)} tasks are here.")
            )
    columns = ("Benchmark", "Metric", "Score", *["Standard error"] * with_error)
    return Table(_origin(scores), columns, tuple(rows), tuple(after))


def _parts(suite: Suite, scores: Sequence[Score]) -> list[Markdown]:
    said = [
        f"{part.title} {part_value(part, scores):.2f} (mean of {len(part.tasks)} tasks)"
        for part in suite.parts
        if len(part.tasks) > 1
    ]
    sentences = [f"In {suite.title}: {words.listed(said)}."] if said else []
    # The note is about the harness's version of the set.
    sentences += [suite.note] if suite.note and scores[0].origin != "reported" else []
    return [Markdown(" ".join(sentences))] if sentences else []


def _origin(scores: Sequence[Score]) -> Markdown:
    """Who measured, with what, and when."""
    score = scores[0]
    harness = _harness(score)
    days = sorted({score.date for score in scores if score.date})
    date = (
        f" on {escape(days[0])}" if len(days) == 1 else f" from {escape(days[0])} to {escape(days[-1])}" if days else ""
    )
    match score.origin:
        case "measured":
            return Markdown(
                f"Measured by this build{date} with {harness}, on all examples of each task and without a chat template. A "
                "leaderboard's figures come from other versions and settings."
            )
        case "imported":
            return Markdown(
                f"From a results file of {harness} beside the recipe, run{date} on all examples of each task. This build "
                "did not measure it."
            )
        case _:
            source = link(score.source_name or "its author", score.source_url or "")
            used = f" (with {escape(score.harness)})" if score.harness else ""
            details = f", in {link('detail', score.details_url)}" if score.details_url else ""
            return Markdown(f"Reported by {source}{date}{used}{details}. This build did not measure it.")


def _harness(score: Score) -> Markdown:
    version = f"version {score.harness.rpartition(' ')[2]}" if score.harness and " " in score.harness else ""
    return Markdown(f"{link('lm-evaluation-harness', HARNESS_URL)}{' ' + escape(version) if version else ''}")


# --------------------------------------------------------------------------------------------------------------- perplexity


def _perplexities(report: Report, found: Perplexities) -> Table:
    best = [min((_loss(model, at) for model in found.models), default=math.inf) for at in range(len(found.texts))]
    whole = [mean for model in found.models if (mean := model.mean) is not None]
    rows = []
    for model in found.models:
        cells = [
            _cell(math.exp(loss.loss), loss.loss == best[at]) if loss else Markdown("-")
            for at, loss in enumerate(model.losses)
        ]
        if len(found.texts) > 1:
            mean = model.mean
            cells.append(Markdown("-") if mean is None else _cell(math.exp(mean), mean == min(whole)))
        rows.append((_model_name(report, model), *cells))
    counts = next((model.losses for model in found.models), ())
    tokens = words.listed(
        [f"{escape(text)} {loss.tokens if loss else 0:,}" for text, loss in zip(found.texts, counts, strict=True)]
    )
    before = (
        f"Perplexity on the recipe's texts, lower is better, measured by this build on {escape(found.date)} in windows of 256 "
        "tokens. It can be compared within this table, not with figures measured otherwise. The best of each column is bold."
    )
    after = [Markdown(f"Tokens predicted: {tokens}.")]
    if (worth_it := verdict(report)) is not None:
        after.append(worth_it[1])
    if len(whole) < len(found.models):
        after.append(
            Markdown(
                "A dash stands where a model's own tokenizer cuts the text otherwise, so that it cannot be compared."
            )
        )
    columns = ("Model", *(one_line(text) for text in found.texts), *["All texts"] * (len(found.texts) > 1))
    return Table(Markdown(before), columns, tuple(rows), tuple(after))


def verdict(report: Report) -> tuple[bool, Markdown] | None:
    """Whether the mixture is worth it on the recipe's texts: if it is worse than another model, and in a sentence."""
    found = report.perplexities
    if found is None:
        return None
    ratio, best = found.ratio, found.best_source
    if ratio is None or best is None:
        return None
    means = {model.role: model.mean for model in found.models if model.role != "expert"}
    base, mixture = means.get("base"), means["mixture"]
    share = ratio - 1
    over = "Over all texts together" if len(found.texts) > 1 else "On this text"
    if share < -SAME:
        said = f"{over} the mixture is better than every model it was made from; the best of them, {_plain(report, best)}, has a perplexity {_percent(1 / (1 + share) - 1)} higher."
    elif share <= SAME:
        said = f"{over} the mixture is as good as the best model it was made from, {_plain(report, best)}."
    elif base is not None and mixture is not None and mixture < base:
        said = f"{over} the mixture is better than its base, but not than {_plain(report, best)} alone: its perplexity is {_percent(share)} higher."
    else:
        said = f"{over} the mixture is no gain: its perplexity is {_percent(share)} higher than that of {_plain(report, best)} alone."
    return share > SAME, Markdown(said)


def _loss(model: ModelLosses, at: int) -> float:
    found: TextLoss | None = model.losses[at]
    return math.inf if found is None else found.loss


def _cell(value: float, best: bool) -> Markdown:
    text = escape(words.number(value, 2))
    return Markdown(f"**{text}**") if best else text


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _model_name(report: Report, model: ModelLosses) -> Markdown:
    if model.role == "mixture":
        return Markdown(f"**{escape(report.name)}** (the mixture)")
    return Markdown(f"{_plain(report, model)}{' (the base)' if model.role == 'base' else ''}")


def _plain(report: Report, model: ModelLosses) -> Markdown:
    name = hub_id(model.name)
    return escape(name) if name else code(model.name)


# -------------------------------------------------------------------------------------------------- the release before this


def comparison(report: Report) -> Table | None:
    """What is better and what is worse than in the release before; None where nothing can be compared."""
    old = report.previous
    if old is None:
        return None
    rows = [*_score_changes(report, old.scores), *_perplexity_changes(report, old.perplexities), *_size_changes(report)]
    label = code(old.label)
    if not rows:
        same = (
            "It was built from the same recipe"
            if old.recipe_identity == report.recipe_identity
            else "Its recipe was another"
        )
        return Table(Markdown(f"The release before was {label}. {same}; there is no figure that both have."), (), ())
    count = {kind: sum(row[-1] == kind for row in rows) for kind in ("better", "worse")}
    said = f"The release before was {label}. Of the figures that both have, {count['better']} became better and {count['worse']} worse."
    return Table(
        Markdown(said), ("Figure", "Before", "Now", "Change"), tuple((*row[:3], Markdown(row[3])) for row in rows)
    )


Row = tuple[Markdown, Markdown, Markdown, str]


def _score_changes(report: Report, before: Sequence[Score]) -> list[Row]:
    rows: list[Row] = []
    for now in report.scores:
        then = next((score for score in before if _comparable(score, now)), None)
        if then is not None:
            noise = math.hypot(now.stderr or 0, then.stderr or 0)
            change = now.value - then.value
            kind = (
                "not clear"
                if abs(change) <= noise and change
                else "better"
                if change > 0
                else "worse"
                if change
                else "same"
            )
            rows.append((escape(now.title), _number(then.value), _number(now.value), kind))
    return rows


def _comparable(one: Score, other: Score) -> bool:
    """The same benchmark, asked in the same way by the same version of the same program."""
    keys = ("title", "metric", "shots", "harness", "task_version", "origin", "source_url", "split", "config")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _perplexity_changes(report: Report, before: Perplexities | None) -> list[Row]:
    now = _mixture(report.perplexities)
    then = _mixture(before)
    rows: list[Row] = []
    for text in now.keys() & then.keys():
        new, old = now[text], then[text]
        if new.tokens == old.tokens:
            share = math.exp(new.loss - old.loss) - 1
            kind = "same" if abs(share) < SAME else "better" if share < 0 else "worse"
            rows.append(
                (
                    Markdown(f"Perplexity, {escape(text)}"),
                    _number(math.exp(old.loss)),
                    _number(math.exp(new.loss)),
                    kind,
                )
            )
    return sorted(rows)


def _mixture(found: Perplexities | None) -> dict[str, TextLoss]:
    if found is None:
        return {}
    model = next((model for model in found.models if model.role == "mixture"), None)
    losses = model.losses if model else ()
    return {text: loss for text, loss in zip(found.texts, losses, strict=False) if loss is not None}


def _size_changes(report: Report) -> list[Row]:
    """Sizes are neither better nor worse: they are told where they changed."""
    assert report.previous is not None
    rows: list[Row] = []
    old, new = report.previous.parameters.get("total"), report.parameters.get("total")
    if old and new and old != new:
        rows.append(
            (Markdown("Parameters"), Markdown(words.billions(old)), Markdown(words.billions(new)), "other size")
        )
    for quant in report.quants:
        was = report.previous.quants.get(quant.type)
        if was and abs(was - quant.bytes) > 0.01 * was:
            rows.append((code(quant.type), escape(words.size(was)), escape(words.size(quant.bytes)), "other size"))
    return rows


def _number(value: float) -> Markdown:
    return escape(words.number(value, 2))
