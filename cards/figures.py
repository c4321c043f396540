"""Figures of a card, drawn from the report alone. matplotlib is imported where a figure is drawn, and only there."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from evals.results import Report, RouterMeasured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The file beside the model's card.
ROUTING_FIGURE = "routing.png"
# Above so many experts the numbers of a matrix could not be read.
MAX_NUMBERED = 8
TITLES = {"discriminant": "this model", "hidden": "gate_mode hidden", "random": "gate_mode random"}


def routing_figure(report: Report) -> bytes:
    """A PNG: for the model's router and each one it is compared with, the confusion matrix over all layers (which expert's
    held-out tokens go where), and below each expert's load by layer. The same bytes for the same report."""
    # Not pyplot, whose figures are the process's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [expert.role or str(number) for number, expert in enumerate(report.experts, 1)]
    names = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    columns = len(report.routers)
    figure = Figure(figsize=(0.6 + 3.4 * columns, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False, height_ratios=(3, 2))
    for column, router in enumerate(report.routers):
        _confusion(axes[0][column], router, names, first=column == 0)
        _load(axes[1][column], router, names, first=column == 0)
    out = BytesIO()
    # Without the name and version of what drew it.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _confusion(axes: Axes, router: RouterMeasured, names: list[str], first: bool) -> None:
    matrix = _mean_confusion(router)
    count = len(matrix)
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    axes.set_title(
        f"{TITLES.get(router.router, router.router)}: {100 * _mean(router.accuracy):.0f} % right", fontsize=10
    )
    axes.set_xticks(range(count), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(count), names if first else [""] * count, fontsize=8)
    axes.set_xlabel("goes to", fontsize=8)
    if first:
        axes.set_ylabel("held-out text of", fontsize=8)
    for i, row in enumerate(matrix if count <= MAX_NUMBERED else []):
        for j, share in enumerate(row):
            color = "white" if share > 0.6 else "black"
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


def _load(axes: Axes, router: RouterMeasured, names: list[str], first: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(len(router.load))
    shares = list(zip(*router.load, strict=True))
    axes.stackplot(layers, *shares, labels=names, step="mid", linewidth=0)
    axes.set_xlim(0, max(1, len(layers) - 1))
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(labelsize=8)
    if first:
        axes.set_ylabel("share of tokens", fontsize=8)
        if len(names) <= MAX_NUMBERED:
            axes.legend(fontsize=7, loc="lower left")


def _mean_confusion(router: RouterMeasured) -> list[list[float]]:
    """The confusion matrix over all layers: the groups' own, each weighing as many layers as it has."""
    layers = [group.last - group.first + 1 for group in router.groups]
    count = len(router.groups[0].goes_to)
    return [
        [
            sum(n * group.goes_to[i][j] for n, group in zip(layers, router.groups, strict=True)) / sum(layers)
            for j in range(count)
        ]
        for i in range(count)
    ]


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
