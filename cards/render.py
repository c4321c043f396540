"""The cards: README.md of the model's repository and of its GGUF repository, from a report alone."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cards.hub import hub_id
from cards.markdown import Markdown, code, escape
from cards.metadata import front_matter, gguf_metadata, model_metadata
from cards.view import view_of
from evals.results import Report

CARD = "README.md"
MODEL_FOLDER = "model"
GGUF_FOLDER = "gguf"


def render_model_card(report: Report) -> str:
    """README.md of the model's repository."""
    report = _with_valid_repo(report)
    return _render("model.md.j2", card=view_of(report), front_matter=front_matter(model_metadata(report)))


def render_gguf_card(report: Report) -> str:
    """README.md of the GGUF repository."""
    report = _with_valid_repo(report)
    return _render("gguf.md.j2", card=view_of(report), front_matter=front_matter(gguf_metadata(report)))


def write_cards(folder: Path, report: Report) -> list[Path]:
    """Write a build's cards: `folder/model/README.md`, and `folder/gguf/README.md` where there are GGUF files.

    Each is there whole or as it was before. Returns their paths. Raises OSError.
    """
    cards = {folder / MODEL_FOLDER / CARD: render_model_card(report)}
    if report.quants:
        cards[folder / GGUF_FOLDER / CARD] = render_gguf_card(report)
    for path, text in cards.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, text)
    return list(cards)


def _with_valid_repo(report: Report) -> Report:
    """Commands and links are made with the repository's name; one that the Hub does not allow is as good as none."""
    return report if report.repo is None or hub_id(report.repo) == report.repo else replace(report, repo=None)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values).strip("\n") + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(  # noqa: S701 - for Markdown; `_safe` escapes what is not marked as safe
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
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


def _write(path: Path, text: str) -> None:
    """Write `path` beside its place and rename it there, so that no half of it is ever seen."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp lets only its owner read the file; a card is as readable as any other.
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
