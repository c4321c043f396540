"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Where the models a recipe names are looked for."""
    parser.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        help="a folder with models as DIR/owner/name, looked into before the Hub is asked",
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `merge.sources.Sources` that the command line gives."""
    return {"models": args.models, **hub_options()}


def hub_options() -> dict[str, str | None]:
    """The Hub and the token that the environment names, read when a command runs and passed on call by call."""
    return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "token": os.environ.get("HF_TOKEN") or None}


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """On what forward passes run."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=None,
        help="where forward passes run (default: the recipe's)",
    )
