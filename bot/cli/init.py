"""`moerge init`: a new recipe repository, ready to be pushed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

HELP = "start a recipe repository: an example recipe, previews on pull requests, builds on push"
_OWNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that is empty or not there yet")
    parser.add_argument(
        "--owner", default="your-name", metavar="NAME", help="your user or organisation on the Hub (default: your-name)"
    )
    parser.add_argument(
        "--runner",
        default="ubuntu-latest",
        metavar="LABELS",
        help="where recipes are built: a runner's labels with commas, or hf-jobs:FLAVOR:TIME (default: ubuntu-latest)",
    )
    parser.add_argument(
        "--moerge",
        metavar="OWNER/NAME@COMMIT",
        help="the moerge that the workflows call (default: the one this command is from)",
    )


def run(args: argparse.Namespace) -> int:
    from bot.init import contents, write
    from bot.init.source import installed_source, parse_source
    from bot.runners import parse_runner
    from merge.errors import UsageError

    if not _OWNER.fullmatch(args.owner):
        raise UsageError(f"--owner {args.owner}: no name on the Hub")
    try:
        runner = parse_runner(args.runner).text
    except ValueError as error:
        raise UsageError(f"--runner {args.runner}: {error}") from None
    if not re.fullmatch(r"[\w .,:-]+", runner, re.ASCII):
        raise UsageError(f"--runner {args.runner}: a label has letters, digits, spaces, dots, dashes and underscores")
    source = parse_source(args.moerge) if args.moerge else installed_source()
    name = re.sub(r"[^A-Za-z0-9._ -]", "-", args.folder.resolve().name) or "recipes"
    files = contents(source, name, args.owner, runner)
    write(args.folder, files)
    print(f"{args.folder}: a recipe repository")
    width = max(map(len, files))
    for path in files:
        print(f"  {path:<{width}}  {_ABOUT[path]}")
    print("\nNext:")
    print(f"  cd {args.folder}")
    print("  moerge preview recipes/*.yaml")
    print("  git init -b main && git add -A && git commit -m 'Recipes' && gh repo create --public --source . --push")
    print("Then give the repository its token: README.md says how.")
    return 0


_ABOUT = {
    "README.md": "how it works, and the three things to set up",
    ".gitignore": "keeps models out of git",
    "recipes/first-moe.yaml": "an example: two experts of 135 M parameters",
    ".github/workflows/preview.yml": "a preview in every pull request, from forks too",
    ".github/workflows/build.yml": "a build and a release on every push to main",
    ".github/workflows/comment.yml": "`/moerge preview` and `/moerge build recipes/x.yaml` as comments",
    ".github/dependabot.yml": "proposes newer versions of what the workflows call",
    ".moerge/recipe.schema.json": "lets your editor complete and check recipes",
}
