"""`moerge card`: the cards of a build again, from what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "render the model card and the GGUF card of a build again, from its report.json alone"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="what `moerge build` left: the folder with report.json"
    )
    parser.add_argument(
        "--preview",
        action="store_true",
        help="also serve them on this machine as the Hub would show them; pages follow changes of templates and report",
    )
    parser.add_argument("--port", type=int, default=8017, help="the port of --preview (default: %(default)s; 0 is any)")


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
    return _preview(args.folder, args.port) if args.preview else 0


def _preview(folder: Path, port: int) -> int:
    from merge.errors import UsageError

    try:
        from bot.card_preview import serve

        serve(folder, port)
    except ImportError as error:
        raise UsageError(f"--preview needs {error.name}; install it with: pip install 'moerge[hub]'") from None
    except (OSError, OverflowError) as error:
        raise UsageError(f"port {port}: {error}; choose another with --port") from None
    return 0


def _first(error: ValueError) -> str:
    """The first thing wrong with the report, in one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
