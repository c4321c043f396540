"""Which recipes changed between two commits, and which of them are to be built.

What counts is what a recipe says (`Recipe.identity`), not its bytes: a comment, the order of keys or a new file name builds
nothing. A model folder inside the repository that a recipe names counts as part of the recipe.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from bot.git import Blob, Commits, Repository
from bot.globs import matcher
from merge import findings as f
from merge import yaml_file
from merge.errors import RecipeError, UsageError
from merge.recipe import LoadedRecipe, parse_document
from merge.yaml_file import Document

DEFAULT_GLOBS = ("recipes/**/*.yaml", "recipes/**/*.yml")
KEYS = ("base_model", "experts")
_KEY_LINE = re.compile(rb"^\s*[\"']?(?:base_model|experts)[\"']?\s*:", re.MULTILINE)

ADDED, CHANGED, ASKED = "added", "changed", "asked"
RENAMED, DELETED, UNCHANGED = "renamed", "deleted", "unchanged"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it stands in a commit or on disk: parsed, or with the error that says why it is not."""

    path: str
    raw: bytes
    identity: str
    loaded: LoadedRecipe | None
    error: RecipeError | None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.loaded.name if self.loaded else PurePosixPath(self.path).stem


@dataclass(frozen=True)
class Change:
    """What happened to one recipe, and in words why it is built or not. `file` is None for a deleted one; `old` is what it
    was before, where it is known."""

    path: str
    kind: str
    why: str
    file: RecipeFile | None
    old: RecipeFile | None = None

    @property
    def to_build(self) -> bool:
        return self.kind in (ADDED, CHANGED, ASKED)

    @property
    def name(self) -> str:
        return self.file.name if self.file else PurePosixPath(self.path).stem


def is_recipe(raw: bytes) -> bool:
    """Whether a YAML file is a recipe, by its content: a mapping with base_model or experts, or broken where it has them.

    A file with one of the keys is a recipe with a mistake, which its author wants to hear about.
    """
    return read_if_recipe(raw, "", Path()) is not None


def read_recipe(raw: bytes, path: str, folder: Path) -> RecipeFile:
    """A recipe from its bytes; `path` is shown, and with `folder` it is where the recipe's relative paths begin."""
    try:
        return _parsed(yaml_file.load(raw, str(folder / path)), raw, path, folder)
    except RecipeError as error:
        return _broken(raw, path, error)


def read_if_recipe(raw: bytes, path: str, folder: Path) -> RecipeFile | None:
    """The same, of a file that may be no recipe; None then. It is parsed once."""
    try:
        document = yaml_file.load(raw, str(folder / path))
    except RecipeError as error:
        return _broken(raw, path, error) if _KEY_LINE.search(raw) else None
    if not isinstance(document.value, dict) or not any(key in document.value for key in KEYS):
        return None
    return _parsed(document, raw, path, folder)


def _parsed(document: Document, raw: bytes, path: str, folder: Path) -> RecipeFile:
    try:
        loaded = parse_document(document, raw, folder / path)
    except RecipeError as error:
        return _broken(raw, path, error)
    return RecipeFile(path, raw, loaded.recipe.identity(), loaded, None)


def _broken(raw: bytes, path: str, error: RecipeError) -> RecipeFile:
    # Broken recipes are compared byte by byte: each change of one is reported.
    return RecipeFile(path, raw, f"broken {hashlib.sha256(raw).hexdigest()}", None, error)


def recipes_at(repository: Commits, commit: str, globs: Sequence[str]) -> dict[str, Blob]:
    """The files of a commit that the globs match, by path. Whether they are recipes, only their content tells."""
    matches = matcher(globs)
    return {path: blob for path, blob in repository.files(commit).items() if matches(path)}


def all_recipes(repository: Commits, head: str, globs: Sequence[str], why: str) -> list[Change]:
    """Every recipe of a commit, each to be built."""
    files = _read(repository, recipes_at(repository, head, globs))
    return [Change(path, ASKED, why, file) for path, file in sorted(files.items())]


def changes_between(repository: Commits, base: str, head: str, globs: Sequence[str]) -> list[Change]:
    """What happened to each recipe between two commits; files that did not change are left out."""
    before, after = recipes_at(repository, base, globs), recipes_at(repository, head, globs)
    new = _read(repository, {path: blob for path, blob in after.items() if before.get(path) != blob})
    old = _read(repository, {path: blob for path, blob in before.items() if after.get(path) != blob})
    gone = [file for path, file in old.items() if path not in new]
    found: list[Change] = []
    for path, file in new.items():
        was = old.get(path)
        if was is None and (was := next((other for other in gone if other.identity == file.identity), None)):
            gone.remove(was)
        if was is None:
            found.append(Change(path, ADDED, "the recipe is new", file))
        else:
            found.append(_compared(was, file, _changed_folder(repository, base, head, was, file)))
    found += [Change(file.path, DELETED, _GONE, None, file) for file in gone]
    if _others_changed(repository, base, head, {*new, *old}):
        # A recipe whose own bytes are the same may name a model folder or a prompts file that is another now.
        for file in _read(
            repository, {path: blob for path, blob in after.items() if before.get(path) == blob}
        ).values():
            change = _compared(file, file, _changed_folder(repository, base, head, file, file))
            found += [change] if change.to_build else []
    return sorted(found, key=lambda change: change.path)


def _others_changed(repository: Commits, base: str, head: str, recipes: set[str]) -> bool:
    """Whether files changed that are no recipes."""
    before, after = repository.files(base), repository.files(head)
    return any(path not in recipes for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def recipes_below(paths: Sequence[Path]) -> list[Path]:
    """Recipe files as they were named; a folder stands for the recipes below it."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for suffix in ("yaml", "yml") for file in path.rglob(f"*.{suffix}") if file.is_file())
            found += [file for file in files if is_recipe(_on_disk(file))]
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def recipe_on_disk(path: Path) -> RecipeFile:
    """A recipe file as it is now; one that cannot be opened is a recipe with that mistake."""
    try:
        return replace(read_recipe(_on_disk(path), path.name, path.parent), path=str(path))
    except OSError as error:
        problem = RecipeError([f.NotReadable(problem=error.strerror or str(error))], str(path))
        return RecipeFile(str(path), b"", "", None, problem)


def changed_on_disk(path: Path, base: str, *, shown: str) -> Change:
    """What happened to a recipe file on disk since the commit `base`. Raises UsageError where there is no such commit."""
    repository = Repository(path.absolute().parent)
    commit = repository.commit(base)
    if commit is None:
        raise UsageError(f"{base}: no such commit in the repository of {path}; fetch it first")
    blob = repository.files(commit).get(path.name)
    old = _read(repository, {path.name: blob}).get(path.name) if blob else None
    if not path.is_file():
        if old is None:
            raise UsageError(f"{path}: no such recipe, neither now nor at {base}")
        return Change(shown, DELETED, _GONE, None, old)
    new = read_recipe(_on_disk(path), path.name, repository.folder)
    if old is None:
        return Change(shown, ADDED, "the recipe is new", new)
    moved = next((name for name in _local_paths(new) if repository.differs(commit, name)), None)
    change = _compared(old, new, moved)
    return Change(shown, change.kind, change.why, new, replace(old, path=shown))


_SAME = "the recipe says the same as before"
_GONE = "the recipe is gone; what it published stays"


def _on_disk(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(yaml_file.MAX_BYTES + 1)


def _read(repository: Commits, blobs: Mapping[str, Blob]) -> dict[str, RecipeFile]:
    """By path the recipes among files of a commit."""
    raw = repository.read_all(blobs.values(), yaml_file.MAX_BYTES + 1)
    files = (read_if_recipe(raw[blob.oid], path, repository.folder) for path, blob in blobs.items())
    return {file.path: file for file in files if file is not None}


def _compared(old: RecipeFile, new: RecipeFile, moved: str | None) -> Change:
    """What two states of a recipe mean; `moved` is something in the repository that it names and that changed."""
    if old.identity != new.identity:
        why = "it can be read now" if old.error and not new.error else "the recipe says something else"
        return Change(new.path, CHANGED, why, new, old)
    if moved:
        return Change(new.path, CHANGED, f"what it names in this repository changed: {moved}", new, old)
    if old.path != new.path:
        return Change(new.path, RENAMED, f"it was {old.path} and says the same", new, old)
    return Change(new.path, UNCHANGED, _SAME, new, old)


def _changed_folder(repository: Commits, base: str, head: str, old: RecipeFile, new: RecipeFile) -> str | None:
    """The first model folder or file of the repository that the recipe names and that is another than before."""
    for was, now in zip(_local_paths(old), _local_paths(new), strict=False):
        if repository.folder_id(base, was) != repository.folder_id(head, now):
            return now
    return None


def _local_paths(file: RecipeFile) -> list[str]:
    """Paths in the repository that a recipe names, relative to the repository's folder."""
    if file.loaded is None:
        return []
    parent = PurePosixPath(file.path).parent
    recipe = file.loaded.recipe
    named = [part.path for reference in recipe.references for part in reference.parts if part.is_local]
    named += recipe.files
    return [os.path.normpath(parent / name) for name in named if not name.startswith(("/", "~"))]
