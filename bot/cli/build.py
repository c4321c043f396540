"""`moerge build`: merge, measure, quantise and describe; goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import add_device_option, add_source_options, hub_options, source_options

HELP = "build a recipe: checkpoint, GGUF files, report and cards; a killed build goes on where it was"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the build's folder")
    parser.add_argument("--publish", action="store_true", help="publish it to the Hub when it is built")
    parser.add_argument(
        "--max-disk",
        metavar="SIZE",
        help="with --publish: take at most so much disk (14GB); files are uploaded and deleted as they are made",
    )
    parser.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="a release's moerge.lock.json: take its sources at the commits it names",
    )
    add_device_option(parser)
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot import pipeline
    from cards.words import billions, size
    from merge.errors import NothingToDo, UsageError
    from merge.recipe import load_recipe
    from merge.sources import Sources

    if args.max_disk and not args.publish:
        raise UsageError("--max-disk needs --publish: files are uploaded to make room for the next")
    loaded = load_recipe(args.recipe)
    sources = Sources(loaded.folder, **source_options(args), pins=_pins(args.lock))
    if args.publish:
        _, publication = pipeline.build_and_publish(
            loaded, sources, args.out, device=args.device, max_disk=args.max_disk, **hub_options()
        )
        if not publication.changed:
            raise NothingToDo(f"{publication.url}: already has this release; nothing was built or uploaded")
        print(f"{publication.url} at {publication.tag}")
        return 0
    report = pipeline.build(loaded, sources, args.out, device=args.device)
    model = sum(file.bytes for file in report.files)
    print(f"{report.name}: {billions(report.parameters['total'])} parameters, {report.gate_mode} gates")
    print(f"  {args.out / pipeline.MODEL}  {size(model)}")
    for quant in report.quants:
        print(f"  {args.out / pipeline.GGUF / quant.file.name}  {size(quant.file.bytes)}")
    return 0


def _pins(path: Path | None) -> dict[str, str]:
    from bot.publish.lock import read_lock
    from bot.verify import pins_of
    from merge.errors import DestinationError, UsageError

    if path is None:
        return {}
    try:
        return pins_of(read_lock(path.read_bytes(), str(path)))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except DestinationError:
        raise UsageError(f"{path}: not a moerge.lock.json") from None
