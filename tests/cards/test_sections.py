"""What a recipe says about its card's sections is done, and it stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cards.render import render_model_card
from cards.sections import HEADINGS
from evals.results import CardText, ExpertWorth, Report
from merge.errors import RecipeError
from merge.recipe import CARD_SECTIONS
from tests.cards.page import body, page
from tests.cards.reports import measured_report, release_report
from tests.cards.test_cards import HOSTILE
from tests.dense import loaded_recipe, recipe_text


def headings(report: Report) -> list[str]:
    text = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body(render_model_card(report)))
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def with_card(**text: object) -> Report:
    return replace(measured_report(), card=CardText(**text))  # type: ignore[arg-type]


def test_without_a_word_in_the_recipe_all_sections_but_the_optional_stand_in_their_order() -> None:
    assert headings(with_card()) == [text for name, text in HEADINGS.items() if name not in ("explainer", "sponsor")]


def test_a_recipe_and_the_card_know_the_same_sections() -> None:
    assert tuple(HEADINGS) == CARD_SECTIONS
    templates = Path(__file__).parents[2] / "cards/templates/sections"
    assert {path.name.split(".")[0] for path in templates.iterdir()} == set(HEADINGS) - {"sponsor"}


def test_sections_are_switched_off_and_on_filled_added_and_ordered() -> None:
    report = with_card(
        sections={"samples": False, "explainer": True, "router": "How **I** set it.", "My tests": "They all passed."},
        order=("My tests", "limitations"),
        sponsor="Thanks to [them](https://example.org).",
    )
    found = headings(report)
    assert found[:3] == ["My tests", "Limitations", "How to use"]
    assert "Samples" not in found
    assert "What is a mixture of experts?" in found
    assert found[-1] == "Sponsor"
    text = body(render_model_card(report))
    assert text.split("\n## Router\n")[1].split("\n## ")[0].strip() == "How **I** set it."
    assert "https://example.org" in page(text).links


def test_a_section_of_nothing_leaves_no_heading() -> None:
    assert "Empty" not in headings(with_card(sections={"Empty": " \n"}, sponsor="  "))
    assert "Evaluation" not in headings(release_report())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_section_is_harmless_and_leaves_the_others_alone(text: str) -> None:
    plain = with_card(sections={"Mine": "harmless", "sponsor": False}, order=("Mine",))
    hostile = with_card(sections={"Mine": text, text: text, "sponsor": False}, order=("Mine",), sponsor=text)
    card, expected = body(render_model_card(hostile)), body(render_model_card(plain))
    rest = expected.split("\n## How to use\n")[1]
    assert rest.rstrip("\n") in card
    seen = page(card)
    assert not {tag[0] for tag in seen.tags} & {"script", "b", "comment", "iframe"}
    assert not re.search(r"(?<!\w)@\w", seen.prose)  # an e-mail address may stay one
    assert not [link for link in seen.links if link.startswith(("javascript:", "data:"))]


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (
            {"sections": {"evaluaton": False}},
            "card.sections: the card has no section 'evaluaton'; perhaps you meant 'evaluation'",
        ),
        ({"order": ["routers"]}, "card.order: the card has no section 'routers'; perhaps you meant 'router'"),
        ({"sections": {"Mine": True}}, "card.sections: the card has no section 'Mine'"),
    ],
)
def test_a_section_that_is_not_there_is_an_error_with_the_nearest(
    tmp_path: Path, card: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError) as error:
        loaded_recipe(recipe_text("a/b", ["a/b", "a/c"], card=card), tmp_path)
    assert any(said in finding.text for finding in error.value.findings)
    loaded_recipe(recipe_text("a/b", ["a/b", "a/c"], card={"sections": {"Mine": "text"}, "order": ["Mine"]}), tmp_path)


def test_nothing_is_said_of_a_skill_that_is_no_more_than_rounding() -> None:
    report = measured_report()
    others = [number for number, expert in enumerate(report.experts) if expert.source != report.base]
    sizes = {0.4: True, 0.01: False}
    for gain, is_said in sizes.items():
        worth = ExpertWorth(expert=others[0], tokens=100, base=2.0, own=2.0 - gain, shared=2.0)
        assert ("loses most of its skill" in render_model_card(replace(report, worth=(worth,)))) == is_said
    # An expert that is the base itself has no skill of its own to lose.
    same = tuple(replace(expert, source=report.base) for expert in report.experts)
    worth = ExpertWorth(expert=others[0], tokens=100, base=2.0, own=1.6, shared=2.0)
    assert "loses most" not in render_model_card(replace(report, experts=same, worth=(worth,)))
