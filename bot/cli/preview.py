"""`moerge preview`: what recipes would give, in seconds, without a weight being downloaded."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bot.cli.options import add_source_options, source_options

if TYPE_CHECKING:
    from bot.changes import Change

HELP = "show what recipes would give: parameters, sizes, licence, mistakes; no weights are downloaded"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE", help="a recipe, or a folder of recipes")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per recipe")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument(
        "--base",
        metavar="REF",
        help="a commit, branch or tag: only recipes that say something else since then, and what differs",
    )
    parser.add_argument(
        "--runner", metavar="LABEL", help="where recipes are built that name no runner: does the build fit?"
    )
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.previews import preview_changes
    from merge.hub import Hub, header_cache
    from merge.sources import Sources

    options = source_options(args)
    hub = Hub(options["endpoint"], options["token"], header_cache())
    changes = _changes(args.recipes, args.base)
    bugs: list[Exception] = []
    previews = preview_changes(
        changes, lambda path: Sources(Path(path).parent, hub=hub, **options), runner=args.runner, on_bug=bugs.append
    )
    if bugs and args.debug:
        raise bugs[0]
    for preview in previews:
        if preview.bug is not None:
            print(
                f"moerge: a bug in moerge, not in {preview.recipe}: {preview.bug}\n"
                "moerge: run again with --debug for the traceback, and please report it",
                file=sys.stderr,
            )
    if args.strict:
        previews = [preview.strict() for preview in previews]
    if args.json:
        print(json.dumps([preview.to_json() for preview in previews], indent=2, ensure_ascii=False))
    else:
        texts = [preview.to_text() for preview in previews]
        texts += [f"{change.path}: {change.kind}: {change.why}" for change in changes if not change.to_build]
        print("\n\n".join(texts))
    codes = [preview.code for preview in previews]
    # A mistake in a recipe can be mended here and now; a source that does not answer cannot.
    return next((code for code in (5, 1, 4) if code in codes), 0)


def _changes(paths: list[Path], base: str | None) -> list[Change]:
    """What happened to each recipe named. Raises UsageError where there is no such commit."""
    from bot.changes import ASKED, Change, changed_on_disk, recipe_on_disk, recipes_below

    if base is not None:
        return [changed_on_disk(path, base, shown=str(path)) for path in recipes_below(paths)]
    return [Change(str(path), ASKED, "it was asked for", recipe_on_disk(path)) for path in recipes_below(paths)]
