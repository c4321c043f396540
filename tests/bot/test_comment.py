"""The comment's text: everything of a small pull request, the most important of a large one, and never too long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bot.changes import ADDED, DELETED, Change, read_recipe
from bot.github.comment import LIMIT, marker, nothing_comment, preview_comment
from bot.preview import Preview
from bot.previews import preview_changes
from merge.sources import Sources
from tests.bot.workflow import MODELS, ROOT

HEAD = "a" * 40


def previews(root: Path, *names: str) -> list[Preview]:
    changes = []
    for name in names:
        path = f"recipes/{name}.yaml"
        file = read_recipe((ROOT / path).read_bytes(), path, root)
        changes.append(Change(path, ADDED, "the recipe is new", file))
    return preview_changes(changes, lambda path: Sources(root, models=MODELS), runner="ubuntu-latest")


@pytest.fixture(scope="module")
def community(tmp_path_factory: pytest.TempPathFactory) -> list[Preview]:
    return previews(tmp_path_factory.mktemp("root"), "Beyonder-4x7B-v3", "Raiden-16x3.43B", "Xwin-Pygmalion-2x7B")


def renamed(preview: Preview, path: str) -> Preview:
    from dataclasses import replace

    return replace(preview, recipe=path)


def test_one_recipe_s_comment_is_open_and_has_the_whole_table(community: list[Preview]) -> None:
    text = preview_comment(community[:1], [], "compared with x", head=HEAD)
    assert "<details open>" in text
    for label in ("Family", "Parameters", "Checkpoint", "GGUF", "Download", "Disk for the build", "Memory for the build",
                  "Runner", "Licence", "Sources"):  # fmt: skip
        assert f"| {label} | " in text, label
    assert "**24.15 B**, 12.88 B active" in text and "Q8_0 25.7 GB" in text and "48.3 GB (bfloat16)" in text


@pytest.mark.parametrize("count", [1, 2, 50, 300, 3000])
@pytest.mark.parametrize("limit", [LIMIT, 5000])
def test_a_comment_is_never_longer_than_its_limit_and_says_what_is_left_out(
    community: list[Preview], count: int, limit: int
) -> None:
    many = [renamed(community[number % 3], f"recipes/{number}-{'x' * (number % 90)}.yaml") for number in range(count)]
    gone = [Change(f"recipes/gone-{number}.yaml", DELETED, "the recipe is gone", None) for number in range(count)]
    text = preview_comment(many, gone, "x", head=HEAD, limit=limit)
    assert len(text) <= limit
    assert text.count("<details") == text.count("</details>") == text.count("<summary>")
    shown = text.count("<details")
    if shown < count:
        assert f"The details of {count - shown} more recipes do not fit" in text
    rows = len(re.findall(r"^\| (?:✅|⚠️|❌)", text, re.MULTILINE))
    assert count == 1 or rows == count or f"*and {count - rows} more*" in text


def test_fifty_recipes_have_each_their_row(community: list[Preview]) -> None:
    many = [renamed(community[number % 3], f"recipes/{number}.yaml") for number in range(50)]
    text = preview_comment(many, [], "x", head=HEAD)
    assert all(f"| `recipes/{number}.yaml` |" in text for number in range(50)) and len(text) <= LIMIT


def test_a_bug_of_ours_is_said_to_be_ours() -> None:
    text = preview_comment([Preview("recipes/a.yaml", "a", (), bug="KeyError: 'x'")], [], "x", head=HEAD)
    assert "**In moerge** (not in your recipe)" in text and "In the recipe" not in text


def test_previews_of_other_globs_have_comments_of_their_own() -> None:
    assert marker() != marker(("models/*.yaml", ".")) != marker(("other/*.yaml", "."))
    assert nothing_comment("x", head=HEAD, scope=("a",)).startswith(marker(("a",)))
