"""A new recipe repository: README, an example recipe, its schema for editors, and the workflows that call moerge.

The files under templates/ are copied as they are, with @MOERGE@, @COMMIT@, @VERSION@, @OWNER@, @NAME@ and @RUNNER@ filled in.
"""

from __future__ import annotations

import json
from pathlib import Path

from bot.init.source import Source
from merge import __version__
from merge.errors import UsageError
from merge.files import writing
from merge.recipe import json_schema

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA = ".moerge/recipe.schema.json"
# Where each template goes: its folder has no dots, so that no tool takes it for its own configuration.
PLACES = {
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "recipes/first-moe.yaml": "recipes/first-moe.yaml",
    "workflows/preview.yml": ".github/workflows/preview.yml",
    "workflows/build.yml": ".github/workflows/build.yml",
    "workflows/comment.yml": ".github/workflows/comment.yml",
    "dependabot.yml": ".github/dependabot.yml",
}
# A repository that was just cloned from an empty one on GitHub has this already.
ALLOWED = {".git"}


def contents(source: Source, name: str, owner: str, runner: str) -> dict[str, str]:
    """Every file of a new repository, by its path: `owner` is the Hub's user or organisation, `runner` where builds run."""
    values = {
        "@MOERGE@": source.repository,
        "@COMMIT@": source.commit,
        "@VERSION@": f"v{__version__}",
        "@OWNER@": owner,
        "@NAME@": name,
        "@RUNNER@": runner,
    }
    files = {}
    for template, place in PLACES.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for word, value in values.items():
            text = text.replace(word, value)
        files[place] = text
    files[SCHEMA] = json.dumps(json_schema(), indent=2) + "\n"
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    """Write the files into a new or empty folder, all of them or none. Raises UsageError or DestinationError."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: is a file or a link; name a folder that is not there yet")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in there if name not in ALLOWED]:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UsageError(f"{folder}: not empty ({', '.join(foreign[:3])}{more}); name a folder that is not there yet")
    made: list[Path] = []
    try:
        with writing(folder):
            for path, text in files.items():
                target = folder / path
                for parent in reversed(target.relative_to(folder.parent).parents):
                    inner = folder.parent / parent
                    if not inner.exists():
                        inner.mkdir(parents=True)
                        made.append(inner)
                made.append(target)
                target.write_text(text, encoding="utf-8")
    except BaseException:
        for place in reversed(made):
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink(missing_ok=True)
        raise
