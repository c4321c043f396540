"""The routing figure is drawn from the report alone: the same report gives the same picture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cards.figures import routing_figure
from evals.results import LayerGroup, Report, RouterMeasured
from tests.cards.reports import demo_report

pytest.importorskip("matplotlib")


def measured(router: str, experts: int, right: float) -> RouterMeasured:
    wrong = (1 - right) / max(1, experts - 1)
    matrix = tuple(tuple(right if i == j else wrong for j in range(experts)) for i in range(experts))
    groups = (LayerGroup(0, 1, matrix), LayerGroup(2, 2, matrix))
    even = (1 / experts,) * experts
    return RouterMeasured(router, (right,) * 3, (even,) * 3, (0.5,) * 3, (0.8,) * 3, groups)


def with_routers(experts: int) -> Report:
    report = demo_report()
    return replace(
        report,
        experts=(report.experts * experts)[:experts],
        routers=(measured("discriminant", experts, 0.9), measured("hidden", experts, 0.5)),
    )


@pytest.mark.parametrize("experts", [1, 4, 16])
def test_the_same_report_gives_the_same_picture(experts: int) -> None:
    report = with_routers(experts)
    picture = routing_figure(report)
    assert picture.startswith(b"\x89PNG")
    assert picture == routing_figure(report)
    assert picture != routing_figure(replace(report, routers=report.routers[::-1]))
    assert b"matplotlib" not in picture.lower()
