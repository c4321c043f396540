"""`moerge schema`: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

import argparse
import json

HELP = "print the JSON Schema of a recipe, for editors"


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    from merge.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
