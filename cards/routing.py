"""The router as the card tells it: how it was set, how well it tells the experts apart, and where the model's limits are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cards import words
from cards.evaluation import Table, verdict
from cards.figures import MAX_NUMBERED
from cards.markdown import Markdown, code, escape, html, one_line
from evals.results import ExpertUsed, ExpertWorth, LayerGroup, LayerRouting, Report, RouterMeasured

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
    """How well the experts are told apart: in words, as a table of figures, and as tables that stand folded."""

    text: str
    figures: Table | None = None
    folded: tuple[Table, ...] = ()


def gates(report: Report) -> Markdown | None:
    vector = words.GATE_VECTORS.get(report.gate_mode)
    if vector is None:
        return None
    if any(expert.kept for expert in report.experts):
        vector = Markdown(f"that of the base for each expert kept from it, and for an added one {vector}")
    return Markdown(f"In each layer the router has one vector for each expert. Here it is {vector}.")


def routing(report: Report) -> Routing | None:
    """What held-out text shows of a router; where there is none, what the router's vectors show."""
    if report.routers:
        return _measured(report)
    if not report.routing:
        return None
    # The vectors of a discriminant router sum to zero in every layer, those of a base that is a mixture may, so that their
    # condition number says nothing.
    unknown = "How often a token finds the right expert was not measured: "
    if any(expert.kept for expert in report.experts):
        return Routing(unknown + "what the experts kept from the base are for is not known.")
    if report.gate_mode == "discriminant":
        return Routing(unknown + "the prompts left no text to hold out.")
    return _of_vectors(report)


def _measured(report: Report) -> Routing:
    """The figures of held-out text by group of layers, and where each expert's text goes, of every router measured."""
    count = len(report.experts)
    text = (
        "By group of layers, on held-out text, each expert's counting the same: how much of it finds its own expert; what the "
        f"most loaded expert gets (even: {100 / count:.0f} %); the entropy of the experts' weights, in nats (of even weights: "
        f"{math.log(count):.2f}); and the mean weight of the best expert."
    )
    if len(report.routers) > 1:
        text += " The first router is this model's; the others, on the same tokens, are for comparison."
    columns = ("Router", "Layers", "Right", "Most loaded expert", "Entropy", "Best expert's weight")
    rows = tuple(_figures(router, group) for router in report.routers for group in router.groups)
    return Routing(text, Table(Markdown(), columns, rows), tuple(_goes_to(report, router) for router in report.routers))


def _figures(router: RouterMeasured, group: LayerGroup) -> tuple[Markdown, ...]:
    layers = slice(group.first, group.last + 1)
    load = [_mean(shares) for shares in zip(*router.load[layers], strict=True)]
    most = max(range(len(load)), key=load.__getitem__)
    cells = (
        f"{100 * _mean(router.accuracy[layers]):.1f} %",
        f"{100 * load[most]:.1f} % (expert {most + 1})",
        f"{_mean(router.entropy[layers]):.2f}",
        f"{_mean(router.top_weight[layers]):.2f}",
    )
    return (code(router.router), Markdown(_layers(group)), *map(Markdown, cells))


def _goes_to(report: Report, router: RouterMeasured) -> Table:
    """The confusion matrix of each group of layers; where it would be too wide to read, its diagonal."""
    count, name = len(report.experts), html(router.router)
    experts = [_capital(_named(report, index)) for index in range(count)]
    if count > MAX_NUMBERED:
        title = Markdown(f"{name}: the share of each expert's held-out text that finds it, in %")
        columns = ("Text of", *(f"Layers {_layers(group)}" for group in router.groups))
        cells = [(who, *(_percent(group.goes_to[i][i]) for group in router.groups)) for i, who in enumerate(experts)]
    else:
        title = Markdown(f"{name}: where each expert's held-out text goes, in %")
        columns = ("Layers", "Text of", *(f"To {number}" for number in range(1, count + 1)))
        cells = [
            (_layers(group), who, *map(_percent, shares))
            for group in router.groups
            for who, shares in zip(experts, group.goes_to, strict=True)
        ]
    return Table(title, columns, tuple(tuple(map(escape, row)) for row in cells))


def _layers(group: LayerGroup) -> str:
    return f"{group.first}" if group.first == group.last else f"{group.first} to {group.last}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _of_vectors(report: Report) -> Routing:
    layers = report.routing
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
            Markdown(layer.layer),
            Markdown(words.number(layer.condition, 2)),
            Markdown(words.number(layer.cosine, 3)),
            Markdown(f"{layer.pair[0] + 1} and {layer.pair[1] + 1}") if layer.pair else NOTHING,
        )
        for layer in layers
    )
    columns = ("Layer", "Condition number", "Largest cosine", "Closest experts")
    return Routing(said, folded=(Table(Markdown("Every layer"), columns, rows),))


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
