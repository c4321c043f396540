"""`moerge watch`: the bot without Actions, for a machine at home."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from bot.cli.options import add_device_option

HELP = "the bot without Actions: previews pull requests and builds the default branch of a repository on GitHub"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="OWNER/REPO")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="state, checkout, builds, logs (default: OWNER-REPO here)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="previews and builds at once (default: 1)")
    parser.add_argument("--interval", type=float, default=60, metavar="SECONDS", help="between two looks (default: 60)")
    parser.add_argument("--once", action="store_true", help="look once, do what there is to do, and end")
    parser.add_argument("--since", metavar="COMMIT", help="at the first start: build what changed since this commit")
    parser.add_argument("--no-publish", action="store_true", help="build, and publish nothing")
    parser.add_argument("--job-image", metavar="IMAGE", help="the build image, for recipes built in a Hugging Face Job")
    add_device_option(parser)
    parser.epilog = (
        "GITHUB_TOKEN reads the repository, comments and sets statuses; HF_TOKEN publishes. "
        "HF_ENDPOINT and GITHUB_API_URL name other servers."
    )


def run(args: argparse.Namespace) -> int:
    from bot.github.client import API
    from bot.state import locked
    from bot.watch import Options, Watch
    from merge.errors import UsageError

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", args.repository):
        raise UsageError(f"{args.repository}: it is written OWNER/REPO")
    if args.jobs < 1 or args.interval <= 0:
        raise UsageError("--jobs and --interval must be more than 0")
    if args.since and not re.fullmatch(r"[0-9a-f]{40}", args.since):
        raise UsageError(f"--since {args.since}: a commit's 40 digits are needed")
    token = os.environ.get("GITHUB_TOKEN", "").strip()
    if not token:
        raise UsageError("set GITHUB_TOKEN: a token that may read the repository, comment on it, and set statuses")
    folder = (args.dir or Path(args.repository.replace("/", "-"))).resolve()
    options = Options(
        repository=args.repository,
        folder=folder,
        token=token,
        api=os.environ.get("GITHUB_API_URL") or API,
        interval=args.interval,
        jobs=args.jobs,
        once=args.once,
        since=args.since,
        device=args.device,
        publish=not args.no_publish,
        job_image=args.job_image,
    )
    with locked(folder):
        return Watch(options).run()
