"""`moerge action`: what the GitHub Action runs."""

from __future__ import annotations

import argparse
import os

HELP = "the container's entry: run as a GitHub Action, from INPUT_* and GITHUB_*"


def configure(parser: argparse.ArgumentParser) -> None:
    """No options: all comes from the environment, as GitHub sets it."""


def run(args: argparse.Namespace) -> int:
    from bot.action import run_action

    return run_action(os.environ)
