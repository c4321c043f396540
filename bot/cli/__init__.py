"""`moerge`: one file per subcommand. This one finds the subcommand and turns errors into sentences and exit codes.

A subcommand's module has HELP, `configure(parser)` and `run(args) -> exit code`; what is heavy it imports inside `run`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from merge import __version__
from merge.errors import MoergeError, RecipeError

COMMANDS = (
    "preview",
    "build",
    "publish",
    "verify",
    "card",
    "site",
    "merge",
    "gates",
    "quantize",
    "plan",
    "action",
    "schema",
    "hub",
    "init",
    "watch",
)
CRASH = 5
NEW_OBJECTS = 50_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moerge ARGV` and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(arguments)
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    # Plans are many small objects that live to the end: by default Python looks through all of them at every 700 new ones.
    gc.set_threshold(NEW_OBJECTS)
    try:
        code: int = args.run(args)
    except MoergeError as error:
        if args.debug:
            raise
        print(error if isinstance(error, RecipeError) else f"moerge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("moerge: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`moerge preview … | head`): nothing to tell anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        print(
            f"moerge: a bug in moerge, not in your recipe: {type(error).__name__}: {error}\n"
            "moerge: run again with --debug for the traceback, and please report it",
            file=sys.stderr,
        )
        return CRASH
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the subcommand that `arguments` name, the others left unimported; with all of them otherwise."""
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="moerge", description="From a YAML recipe to a mixture-of-experts model on the Hugging Face Hub."
    )
    parser.add_argument("--version", action="version", version=f"moerge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in (first,) if first in COMMANDS else COMMANDS:
        module = importlib.import_module(f"bot.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser
