"""`moerge preview`: what recipes would give, in seconds, without a weight being downloaded."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bot.cli.options import add_source_options, source_options

HELP = "show what recipes would give: parameters, sizes, licence, mistakes; no weights are downloaded"
RECIPES_AT_ONCE = 8


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per recipe")
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.preview import preview_recipe

    with ThreadPoolExecutor(RECIPES_AT_ONCE) as pool:
        previews = list(pool.map(lambda path: preview_recipe(path, **source_options(args)), args.recipes))
    if args.json:
        print(json.dumps([preview.to_json() for preview in previews], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(preview.to_text() for preview in previews))
    if any(preview.has_errors and not preview.source_failed for preview in previews):
        return 1
    return 4 if any(preview.source_failed for preview in previews) else 0
