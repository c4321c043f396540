"""`moerge verify`: is a release on the Hub exactly what its recipe says?"""

from __future__ import annotations

import argparse

from bot.cli.options import add_source_options, hub_options

HELP = "compare a release on the Hub with its recipe and its sources, tensor by tensor, by ranges"
# Something differs: neither the recipe's fault nor the network's, but the one thing that was asked.
DIFFERS = 1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="OWNER/REPO", help="the model's repository")
    parser.add_argument("--revision", metavar="REV", help="a tag, branch or commit of it (default: main)")
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.verify import verify
    from cards.words import size

    found = verify(args.repo, revision=args.revision, models=args.models, **hub_options())
    compared = f"{found.files} files by checksum, {found.tensors} tensors ({size(found.bytes)}) with their sources"
    if found.is_exact:
        print(f"{found.repo} at {found.commit[:8]}: this is exactly what its recipe says\n  compared: {compared}")
        return 0
    print(f"{found.repo} at {found.commit[:8]}: this is not what its recipe says")
    print("\n".join(f"  {difference}" for difference in found.differences))
    return DIFFERS
