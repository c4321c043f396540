"""`moerge card`: the cards of a build again, from what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "render the model card and the GGUF card of a build again, from its report.json alone"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="what `moerge build` left: the folder with report.json"
    )


def run(args: argparse.Namespace) -> int:
    from cards.render import write_cards
    from evals.results import REPORT, read_report
    from merge.errors import DestinationError, UsageError

    path = args.folder / REPORT
    try:
        report = read_report(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name the folder that `moerge build` wrote to"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not a build's report ({_first(error)}); build again to make it anew") from None
    try:
        for card in write_cards(args.folder, report):
            print(card)
    except OSError as error:
        raise DestinationError(f"{error.filename or args.folder}: cannot be written ({error.strerror})") from None
    return 0


def _first(error: ValueError) -> str:
    """The first thing wrong with the report, in one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
