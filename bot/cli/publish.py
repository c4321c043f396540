"""`moerge publish`: what a build left in its folder, to the Hub, as one commit a repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import hub_options

HELP = "publish a build to the Hub: one commit for the GGUF files, one for the model, and a tag"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the build's folder")
    parser.add_argument("--dry-run", action="store_true", help="print the commits that would be made, and make none")


def run(args: argparse.Namespace) -> int:
    from bot.publish import publish
    from merge.errors import NothingToDo

    hub = hub_options()
    publication = publish(args.folder, token=hub["token"], endpoint=hub["endpoint"], dry_run=args.dry_run)
    if args.dry_run:
        print("\n".join(change.to_text() for change in publication.repositories))
        return 0
    if not publication.changed:
        raise NothingToDo(f"{publication.url}: already has this release; nothing was uploaded")
    print(f"{publication.url} at {publication.tag}")
    return 0
