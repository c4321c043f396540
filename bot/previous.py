"""The release that is on the Hub already: its report, for the comparison in a new card and for the gallery."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.publish.contents import PUBLISHED_REPORT
from bot.publish.lock import tag_name
from bot.publish.small_files import read_small
from cards.render import write_cards
from evals.results import REPORT, Report, parse_report
from evals.scores import PreviousRelease
from merge.files import write_atomically, writing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_BYTES = 64 << 20


def published_report(api: HfApi, repo: str) -> Report | None:
    """The report of the release in `repo`; None where there is none of ours, or one that this moerge cannot read.

    Raises huggingface_hub's errors where the Hub does not answer.
    """
    from huggingface_hub import errors

    try:
        raw = read_small(api, repo, PUBLISHED_REPORT)
    except errors.LocalEntryNotFoundError:  # the Hub did not answer, which says nothing about the file
        raise
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return None
    try:
        return parse_report(raw) if len(raw) <= MAX_BYTES else None
    except ValueError:
        return None


def compare(folder: Path, report: Report, before: Report | None) -> None:
    """Put the comparison with the release `before` into the report and cards of the build in `folder`.

    Raises DestinationError where they cannot be written.
    """
    compared = with_previous(report, before)
    if compared != report:
        with writing(folder):
            write_atomically(folder / REPORT, compared.to_json())
            write_cards(folder, compared)


def with_previous(report: Report, before: Report | None) -> Report:
    """`report` with what the release before it said. A release published again keeps what it was compared with."""
    if before is None:
        return report
    if before.recipe_identity == report.recipe_identity and before.gates_key == report.gates_key:
        return replace(report, previous=before.previous)
    return replace(report, previous=summary(before))


def summary(before: Report) -> PreviousRelease:
    """What a later card compares with."""
    return PreviousRelease(
        label=tag_name(before),
        recipe_identity=before.recipe_identity,
        scores=before.scores,
        perplexities=before.perplexities,
        parameters=before.parameters,
        quants={quant.type: quant.bytes for quant in before.quants},
    )
