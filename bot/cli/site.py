"""`moerge site`: a static gallery of a recipe repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import add_source_options, hub_options

HELP = "write a static gallery of all recipes of a repository, ready for GitHub Pages"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the recipe repository's checkout")
    parser.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="where to (default: site)")
    parser.add_argument("--title", help="the page's title (default: the folder's name)")
    parser.add_argument("--url", help="where the recipes can be seen, e.g. https://github.com/OWNER/NAME/blob/main")
    parser.add_argument("--builds", type=Path, metavar="DIR", help="builds that are not on the Hub, as DIR/NAME")
    parser.add_argument("--offline", action="store_true", help="ask the Hub for no release")
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.site import INDEX, Places, write_site
    from merge.errors import UsageError

    if not args.folder.is_dir():
        raise UsageError(f"{args.folder}: no such folder")
    if args.url and not args.url.startswith(("https://", "http://")):
        raise UsageError(f"--url {args.url}: not a web address")
    places = Places(models=args.models, builds=args.builds, ask_hub=not args.offline, **hub_options())
    count = write_site(args.folder, args.out, places, title=args.title, url=args.url)
    print(f"{args.out / INDEX}: {count} recipe{'' if count == 1 else 's'}")
    return 0
