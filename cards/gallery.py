"""The gallery: one static page of all recipes of a repository. Everything is in the page; scripts only sort and search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from cards import words
from cards.render import TEMPLATES

PUBLISHED, CHANGED, UNPUBLISHED, BROKEN, UNKNOWN = "published", "recipe changed", "not published", "error", "unknown"
STATUSES = {
    PUBLISHED: "The release on the Hub is what this recipe says.",
    CHANGED: "There is a release, but the recipe has changed since.",
    UNPUBLISHED: "No release of it is on the Hub.",
    BROKEN: "The recipe has an error.",
    UNKNOWN: "Whether there is a release could not be found out.",
}


@dataclass(frozen=True)
class Source:
    """An expert: what it is for and which model it is, with its page where it has one."""

    role: str
    name: str
    url: str | None


@dataclass(frozen=True)
class Entry:
    """One recipe as a row. `accuracy` is the share of held-out tokens whose best expert is the right one (0 to 1) and
    `chance` what chance gives, `average` an average over a whole set of benchmarks with its name, `gain` by how much the
    mixture's perplexity is below (or, negative, above) that of the best model it was made from (0 to 1)."""

    path: str
    name: str
    status: str
    summary: str = ""
    url: str | None = None
    gguf_url: str | None = None
    recipe_url: str | None = None
    family: str = ""
    total: int | None = None
    active: int | None = None
    experts: tuple[Source, ...] = ()
    licence: str = ""
    accuracy: float | None = None
    chance: float | None = None
    average: float | None = None
    average_of: str = ""
    gain: float | None = None
    quants: tuple[str, ...] = ()
    version: str = ""
    problem: str = ""


def render_gallery(title: str, entries: Sequence[Entry], made: str) -> str:
    """The page. `made` says when and with what."""
    counts = {status: sum(entry.status == status for entry in entries) for status in STATUSES}
    return (
        _environment()
        .get_template("gallery.html.j2")
        .render(
            title=title, entries=entries, made=made, statuses=STATUSES, counts={k: n for k, n in counts.items() if n}
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(billions=words.billions, percent=lambda share: f"{100 * share:.0f} %")
    return environment
