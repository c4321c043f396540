"""Previews of many recipes at once: sources are shared, and a recipe that breaks something here does not keep the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from bot.changes import ADDED, ASKED, CHANGED, Change, RecipeFile
from bot.differences import differences
from bot.preview import Preview, preview_loaded
from merge.errors import MoergeError
from merge.sources import Sources

# Each waits for up to eight sources at a time.
RECIPES_AT_ONCE = 8


def preview_changes(
    changes: Sequence[Change],
    sources: Callable[[str], Sources],
    *,
    runner: str | None = None,
    on_bug: Callable[[Exception], None] | None = None,
) -> list[Preview]:
    """The preview of each recipe that is new, changed or asked for, with what differs from what it was.

    `sources` gives, for a recipe's path, where its models come from; `runner` is where recipes are built that name none.
    `on_bug` is told of an exception that is a mistake of ours; its preview says so.
    """

    def one(change: Change) -> Preview:
        assert change.file is not None
        try:
            return _preview(change, change.file, sources, runner)
        except Exception as error:
            if on_bug is not None:
                on_bug(error)
            return Preview(change.path, change.name, (), bug=_said(error), change=change.kind)

    wanted = [change for change in changes if change.file is not None and change.kind in (ADDED, CHANGED, ASKED)]
    # All sources are asked for at once, whichever recipe is looked at first.
    for change in wanted:
        for file in (change.file, change.old):
            if file is not None and file.loaded is not None:
                sources(file.path).begin(file.loaded.recipe.references)
    with ThreadPoolExecutor(RECIPES_AT_ONCE) as pool:
        return list(pool.map(one, wanted))


def import_for_previews() -> None:
    """Import what every preview comes to need, and other work does without."""
    import gguf  # noqa: F401
    import huggingface_hub.utils._http  # noqa: F401


def _preview(change: Change, file: RecipeFile, sources: Callable[[str], Sources], runner: str | None) -> Preview:
    if file.loaded is None:
        return Preview(change.path, file.name, file.error.findings if file.error else (), change=change.kind)
    preview = replace(preview_loaded(file.loaded, sources(change.path), change.path, runner), change=change.kind)
    old = change.old.loaded if change.old else None
    if old is None or change.kind != CHANGED:
        return preview
    assert change.old is not None
    before = preview_loaded(old, sources(change.old.path), change.old.path, runner)
    return replace(preview, against=differences(old.recipe, file.loaded.recipe, before, preview))


def _said(error: Exception) -> str:
    """An exception in a line, with the place in our code where it came from."""
    if isinstance(error, MoergeError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
