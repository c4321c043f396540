"""The sections of a model card: which there are, what the recipe puts in their place, and in which order they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from cards.markdown import Markdown, description, escape
from evals.results import CardText

# By the name that recipes use: the heading. In this order; the templates are templates/sections/NAME.md.j2. A recipe's `card`
# is checked against the same names (merge/recipe.py, CARD_SECTIONS).
HEADINGS = MappingProxyType(
    {
        "quickstart": "How to use",
        "experts": "Experts",
        "architecture": "Architecture",
        "evaluation": "Evaluation",
        "comparison": "Against the release before",
        "samples": "Samples",
        "gguf": "GGUF files",
        "router": "Router",
        "explainer": "What is a mixture of experts?",
        "limitations": "Limitations",
        "licence": "Licence",
        "recipe": "Recipe",
        "provenance": "Provenance",
        "sponsor": "Sponsor",
    }
)
# In the card only where the recipe asks for it.
ASKED_FOR = frozenset({"explainer"})


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: Markdown
    text: Markdown


def sections(card: CardText, render: Callable[[str], str]) -> tuple[Section, ...]:
    """The sections of a card: `render` makes the text of one of ours; one without text is left out.

    The recipe's text for a section of ours takes its place; a name that is not one of ours is a new section, after them.
    """
    own = {name: text for name, text in card.sections.items() if isinstance(text, str) and name not in HEADINGS}
    names = [name for name in card.order if name in HEADINGS or name in own]
    names += [name for name in (*HEADINGS, *own) if name not in names]
    found = []
    for name in names:
        asked = card.sections.get(name, name not in ASKED_FOR)
        if asked is False:
            continue
        if isinstance(asked, str):
            text = description(asked)
        elif name == "sponsor":
            text = description(card.sponsor or "")
        else:
            text = Markdown(render(name).strip("\n"))
        if text.strip():
            heading = Markdown(HEADINGS[name]) if name in HEADINGS else escape(name)
            found.append(Section(heading, text))
    return tuple(found)
