"""The cards: README.md of the model's repository and of its GGUF repository, from a report alone."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cards.architecture import ARCHITECTURE_FIGURE, architecture_figure
from cards.figures import ROUTING_FIGURE, routing_figure
from cards.hub import hub_id
from cards.hub_results import result_files
from cards.markdown import Markdown, code, escape
from cards.metadata import front_matter, gguf_metadata, model_metadata
from cards.sections import sections
from cards.view import view_of
from evals.results import Report

CARD = "README.md"
MODEL_FOLDER = "model"
GGUF_FOLDER = "gguf"
TEMPLATES = Path(__file__).with_name("templates")


def render_model_card(report: Report) -> str:
    """README.md of the model's repository."""
    report = _with_valid_repo(report)
    card = view_of(report)
    return _render(
        "model.md.j2",
        card=card,
        front_matter=front_matter(model_metadata(report)),
        sections=sections(report.card, lambda name: _render(f"sections/{name}.md.j2", card=card)),
    )


def render_gguf_card(report: Report) -> str:
    """README.md of the GGUF repository."""
    report = _with_valid_repo(report)
    return _render("gguf.md.j2", card=view_of(report), front_matter=front_matter(gguf_metadata(report)))


def model_files(report: Report) -> tuple[str, ...]:
    """The files that stand beside the model because of its card, by path in the repository: the card first."""
    drawn = [ARCHITECTURE_FIGURE] * bool(report.shape) + [ROUTING_FIGURE] * bool(report.routers)
    given = [report.card.image] if report.card.image else []
    return (CARD, *drawn, *given, *result_files(report))


def write_cards(folder: Path, report: Report) -> list[Path]:
    """Write a build's cards with their figures: `folder/model/README.md` and what stands beside it, and
    `folder/gguf/README.md` where there are GGUF files.

    Each is there whole or as it was before. Returns the cards' paths. Raises OSError.
    """
    model, gguf = folder / MODEL_FOLDER, folder / GGUF_FOLDER
    cards = {model / CARD: render_model_card(report)}
    if report.quants:
        cards[gguf / CARD] = render_gguf_card(report)
    files = {model / name: content for name, content in result_files(report).items()}
    if report.shape:
        files[model / ARCHITECTURE_FIGURE] = architecture_figure(report)
    if report.routers:
        files[model / ROUTING_FIGURE] = routing_figure(report)
    files |= {path: text.encode() for path, text in cards.items()}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
    return list(cards)


def _with_valid_repo(report: Report) -> Report:
    """Commands and links are made with the repository's name; one that the Hub does not allow is as good as none."""
    return report if report.repo is None or hub_id(report.repo) == report.repo else replace(report, repo=None)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values).strip("\n") + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(  # noqa: S701 - for Markdown; `_safe` escapes what is not marked as safe
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(block=_block, code=code)
    return environment


def _safe(value: Any) -> Markdown:
    """What a template puts out: Markdown as it is, all else escaped. None is a mistake of the template's."""
    if value is None:
        raise TypeError("a card's template puts out a value that is not there")
    return value if isinstance(value, Markdown) else escape(str(value))


def _block(text: str) -> Markdown:
    """What a macro of the templates made, whose parts were escaped as they were put out."""
    return Markdown(text.strip("\n"))


def _write(path: Path, content: bytes) -> None:
    """Write `path` beside its place and rename it there, so that no half of it is ever seen."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp lets only its owner read the file; a card is as readable as any other.
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
