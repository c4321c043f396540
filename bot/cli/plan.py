"""`moerge plan`: what would be built and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bot.changes import Change

HELP = "say what would be built and why: JSON, or a GitHub matrix"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE", help="a recipe, or a folder of recipes")
    parser.add_argument("--matrix", action="store_true", help="print a matrix for a job per recipe to build")
    parser.add_argument(
        "--base", metavar="REF", help="a commit, branch or tag: only recipes that say something else since then"
    )
    parser.add_argument(
        "--runner",
        default="ubuntu-latest",
        metavar="LABEL",
        help="runner of recipes that name none (default: ubuntu-latest)",
    )


def run(args: argparse.Namespace) -> int:
    from bot.matrix import matrix, plan_entries

    entries = plan_entries(_changes(args.recipes, args.base), args.runner)
    print(json.dumps(matrix(entries) if args.matrix else entries, indent=None if args.matrix else 2))
    return 1 if any(entry["errors"] for entry in entries) else 0


def _changes(paths: list[Path], base: str | None) -> list[Change]:
    """What happened to each recipe named, in the order they were named. Raises UsageError, SourceError or RecipeError."""
    from bot.changes import ASKED, Change, changed_on_disk, read_recipe, recipes_below
    from merge.errors import UsageError

    if base is not None:
        return [changed_on_disk(path, base, shown=str(path)) for path in recipes_below(paths)]
    found = []
    for path in recipes_below(paths):
        if not path.is_file():
            raise UsageError(f"{path}: no such recipe")
        file = read_recipe(path.read_bytes(), path.name, path.parent)
        found.append(Change(str(path), ASKED, "it was asked for", file))
    return found
