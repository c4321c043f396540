"""`moerge merge`: the checkpoint alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import add_device_option, add_source_options, source_options

HELP = "merge a recipe into a checkpoint, without GGUF files or card"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder of the checkpoint")
    add_device_option(parser)
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.merging import merge
    from cards.words import billions, size
    from merge.recipe import load_recipe
    from merge.sources import Sources

    loaded = load_recipe(args.recipe)
    sources = Sources(loaded.folder, **source_options(args))
    plan = merge(loaded, sources, args.out, device=args.device)
    print(f"{args.out}: {plan.name}, {billions(plan.parameters.total)} parameters, {size(plan.checkpoint_bytes)}")
    return 0
