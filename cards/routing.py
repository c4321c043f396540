"""The router as the card tells it: how it was set, how well it tells the experts apart, and where the model's limits are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cards import words
from cards.evaluation import verdict
from cards.markdown import Markdown, escape, one_line
from evals.results import ExpertUsed, ExpertWorth, LayerRouting, Report, RouterMeasured

# Above this condition number of a layer's gate matrix some experts' vectors are nearly a mixture of the others': the ratio
# at which mergekit calls a router degenerate.
MAX_CONDITION = 5.0
# An expert that gets less than this part of its even share of the tokens is hardly used.
HARDLY_USED = 0.25
# A gain of less than this, in nats per token, is no more than what rounding in bfloat16 makes of one and the same model.
NOTICEABLE = 0.02
NOTHING = Markdown("-")


@dataclass(frozen=True)
class Routing:
    """How well the experts can be told apart: in words, and as the rows of a table."""

    text: str
    rows: tuple[tuple[str, ...], ...]


def gates(report: Report) -> Markdown | None:
    vector = words.GATE_VECTORS.get(report.gate_mode)
    return (
        Markdown(f"In each layer the router has one vector for each expert. Here it is {vector}.") if vector else None
    )


def routing(report: Report) -> Routing | None:
    layers = report.routing
    if not layers:
        return None
    hard = [layer for layer in layers if layer.condition is None or layer.condition > MAX_CONDITION]
    worst = max(hard or layers, key=lambda layer: math.inf if layer.condition is None else layer.condition)
    limit = f"(condition number above {MAX_CONDITION:g})"
    if hard:
        said = (
            f"In {_which(hard, len(layers))}, some experts are hard to tell apart: their vectors are nearly a mixture of "
            f"the others' {limit}, so which of them a token goes to says little."
        )
    else:
        said = (
            f"In none of the {words.counted(len(layers), 'layer')} are the experts' vectors nearly a mixture of one "
            f"another {limit}."
        )
    if worst.pair is not None:
        first, second = (_named(report, index) for index in worst.pair)
        cosine = words.number(worst.cosine, 2)
        said += (
            f" They are least distinct in layer {worst.layer}, where {first} and {second} are the closest, with a cosine "
            f"of {cosine}."
        )
    if report.gate_mode in words.RANDOM_MODES:
        said += " As the vectors are random, the router knows nothing of what the experts are good at."
    rows = tuple(
        (
            str(layer.layer),
            words.number(layer.condition, 2),
            words.number(layer.cosine, 3),
            f"{layer.pair[0] + 1} and {layer.pair[1] + 1}" if layer.pair else NOTHING,
        )
        for layer in layers
    )
    return Routing(said, rows)


def _which(hard: Sequence[LayerRouting], count: int) -> str:
    """`every layer`, `layer 7 of 32`, `5 of 32 layers (0 to 3 and 31)`."""
    if len(hard) == count:
        return "every layer"
    if len(hard) == 1:
        return f"layer {hard[0].layer} of {count}"
    return f"{len(hard)} of {count} layers ({words.spans([layer.layer for layer in hard])})"


def _named(report: Report, index: int) -> str:
    role = report.experts[index].role if index < len(report.experts) else None
    return f"expert {index + 1} ({one_line(role)})" if role else f"expert {index + 1}"


def limitations(report: Report, licensed: bool) -> tuple[Markdown, ...]:
    said = [
        "The router was not trained together with the experts: it was set at random, so which expert a token goes to is "
        "chance."
        if report.gate_mode in words.RANDOM_MODES
        else "The router was not trained together with the experts: it was set from prompts, and a token may go "
        "to an expert that suits it badly."
    ]
    if _all_are_the_base(report):
        said.append(
            "All experts are the base model's own MLP, so without further training it answers as the base does."
        )
    else:
        said.append(
            "Each expert was trained inside its own dense model. Here it works with the attention of the base model, "
            "which may cost it some of its skill."
        )
    said += _measured_limits(report)
    if not report.scores:
        said.append("No benchmark has been run on it for this card.")
    elif not any(score.origin == "measured" for score in report.scores):
        said.append("This build ran no benchmark; the figures above were measured by others.")
    said.append("It inherits the limits and biases of the models it was made from; their cards describe them.")
    if not licensed:
        said.append("No licence is stated for it; those of the models it was made from have to be looked up there.")
    warnings = [finding.message for finding in report.findings if finding.level == "warning"]
    warned = [Markdown(f"A warning given at the build: {escape(text)}") for text in warnings]
    return (*map(Markdown, said), *warned)


def _all_are_the_base(report: Report) -> bool:
    return all(
        expert.source == report.base and expert.number is None and not changes(expert) for expert in report.experts
    )


def changes(expert: ExpertUsed) -> Markdown:
    """What was done to an expert's weights."""
    parts = []
    if expert.noise_scale:
        parts.append(f"noise of standard deviation {expert.noise_scale:g}")
    if expert.residual_scale is not None and expert.residual_scale != 1:
        parts.append(f"output times {expert.residual_scale:g}")
    return Markdown(", ".join(parts))


def held_out(report: Report) -> str | None:
    """How often the router finds the right expert, beside chance and beside other routers, in words."""
    if not report.routers:
        return None
    own, *others = report.routers
    experts = len(report.experts)
    right = _mean(own.accuracy)
    said = (
        f"On held-out text of each expert's kind, the best expert is the right one for {100 * right:.0f} % of the tokens, on "
        f"average over the layers; by chance it would be {100 / experts:.0f} %."
    )
    beside = [f"{_called(other)} {100 * _mean(other.accuracy):.0f} %" for other in others]
    return said + (f" Other routers on the same tokens: {words.listed(beside)}." if beside else "")


def _called(router: RouterMeasured) -> str:
    return f"gate mode {one_line(router.router)}"


def _measured_limits(report: Report) -> list[Markdown]:
    """What the routing report, the experts' worth and the perplexities say against the model."""
    said: list[str] = []
    for router in report.routers[:1]:
        experts = len(report.experts)
        right = _mean(router.accuracy)
        if right < 1.5 / experts:
            said.append(
                f"The router finds the right expert for only {100 * right:.0f} % of held-out tokens, hardly more than by chance."
            )
        load = [_mean(tuple(layer[index] for layer in router.load)) for index in range(experts)] if router.load else []
        for index, share in enumerate(load):
            if share < HARDLY_USED / experts:
                said.append(
                    f"{_capital(_named(report, index))} is hardly used: it is the best one for {100 * share:.1f} % of held-out tokens."
                )
    for worth in report.worth:
        said += _worth_limit(report, worth)
    worth_it = verdict(report)
    return [*map(escape, said), *([worth_it[1]] if worth_it and worth_it[0] else [])]


def _worth_limit(report: Report, worth: ExpertWorth) -> list[str]:
    """An expert whose skill does not survive in the merge, or that has none over the base."""
    who = _capital(_named(report, worth.expert))
    # An expert of a mixture is no model of its own, and one that is the base itself has nothing over it.
    if worth.own is None or report.experts[worth.expert].source == report.base:
        return []
    if worth.own >= worth.base:
        alone = (
            f"{who} predicts its own kind of text no better than the base does (loss {worth.own:.2f} against "
            f"{worth.base:.2f} nats per token)."
        )
        return [alone]
    gain, kept = worth.base - worth.own, worth.base - worth.shared
    if gain < NOTICEABLE or kept >= gain / 2:
        return []
    lost = (
        f"{who} loses most of its skill here: of its {gain:.2f} nats per token over the base on its own kind of text, "
        f"{max(0.0, kept):.2f} remain with the base's attention."
    )
    return [lost]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
