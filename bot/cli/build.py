"""`moerge build`: merge, measure, quantise and describe; goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import add_device_option, add_source_options, source_options

HELP = "build a recipe: checkpoint, GGUF files, report and cards; a killed build goes on where it was"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the build's folder")
    add_device_option(parser)
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot import pipeline
    from bot.preview import billions, size
    from merge.recipe import load_recipe
    from merge.sources import Sources

    loaded = load_recipe(args.recipe)
    report = pipeline.build(loaded, Sources(loaded.folder, **source_options(args)), args.out, device=args.device)
    model = sum(file.bytes for file in report.files)
    print(f"{report.name}: {billions(report.parameters['total'])} parameters, {report.gate_mode} gates")
    print(f"  {args.out / pipeline.MODEL}  {size(model)}")
    for quant in report.quants:
        print(f"  {args.out / pipeline.GGUF / quant.file.name}  {size(quant.file.bytes)}")
    return 0
