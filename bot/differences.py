"""What a recipe gives now against what it gave on the base branch, in the terms of its author."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cards.words import billions, size
from merge.recipe import Expert, Recipe

if TYPE_CHECKING:
    from bot.preview import Preview


@dataclass(frozen=True)
class Difference:
    """One thing that is another now: plain text before and after, a dash where there was or is none."""

    what: str
    before: str
    after: str


def differences(old: Recipe, new: Recipe, before: Preview | None, after: Preview | None) -> tuple[Difference, ...]:
    """What changed between two recipes, and between what comes of them where both could be previewed."""
    found = [*_of_results(before, after), *_of_recipes(old, new)]
    return tuple(Difference(what, was or "-", now or "-") for what, was, now in found if was != now)


def _of_results(before: Preview | None, after: Preview | None) -> Iterator[tuple[str, str, str]]:
    if before is None or after is None or before.parameters is None or after.parameters is None:
        return
    yield "parameters", billions(before.parameters.total), billions(after.parameters.total)
    yield "active per token", billions(before.parameters.active), billions(after.parameters.active)
    yield "checkpoint", size(before.checkpoint_bytes or 0), size(after.checkpoint_bytes or 0)
    yield "family", before.family or "", after.family or ""
    if before.download_bytes is not None and after.download_bytes is not None:
        yield "download", size(before.download_bytes), size(after.download_bytes)
    yield "licence", before.license or "not known", after.license or "not known"


def _of_recipes(old: Recipe, new: Recipe) -> Iterator[tuple[str, str, str]]:
    yield "base model", old.base_model, new.base_model
    yield "number of experts", str(len(old.experts)), str(len(new.experts))
    was, now = ([expert.source_model for expert in recipe.experts] for recipe in (old, new))
    yield "experts", ", ".join(_without(was, now)), ", ".join(_without(now, was))
    if sorted(was) == sorted(now) and was != now:
        yield "order of the experts", ", ".join(was), ", ".join(now)
    if was == now:
        pairs = zip(old.experts, new.experts, strict=True)
        changed = [str(index) for index, (a, b) in enumerate(pairs, 1) if _prompts(a) != _prompts(b)]
        yield "prompts", "", f"of expert {', '.join(changed)}" if changed else ""
    yield "experts per token", str(old.experts_per_token), str(new.experts_per_token)
    yield "shared experts", _shared(old), _shared(new)
    yield "gate_mode", old.gate_mode, new.gate_mode
    yield "dtype", old.dtype or "", new.dtype or ""
    yield "architecture", old.architecture or "", new.architecture or ""
    yield (
        "quants",
        ", ".join(_without(old.release.quants, new.release.quants)),
        ", ".join(_without(new.release.quants, old.release.quants)),
    )
    for key in ("repo", "version", "license", "private"):
        yield f"release.{key}", _text(getattr(old.release, key)), _text(getattr(new.release, key))
    yield "build.runner", old.build.runner or "", new.build.runner or ""
    yield "build.seed", str(old.build.seed), str(new.build.seed)


def _without(these: Sequence[str], those: Sequence[str]) -> list[str]:
    """Those of `these` that are not among `those`, each as often as it is there more often."""
    left = list(those)
    found = []
    for item in these:
        if item in left:
            left.remove(item)
        else:
            found.append(item)
    return found


def _prompts(expert: Expert) -> tuple[object, ...]:
    return expert.positive_prompts, expert.negative_prompts, expert.prompts_file


def _shared(recipe: Recipe) -> str:
    return ", ".join(expert.source_model for expert in recipe.shared_experts or ())


def _text(value: object) -> str:
    return "" if value is None else str(value)
