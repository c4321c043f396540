"""What the demo shows of comments and releases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo.page import page, raw_markdown


@pytest.mark.parametrize(
    "text", ["a \\*\\*b", "a \\[b](c)", "\\# a", "a \\| b\n\n\\| --- | b |", "&lt;b&gt;", "&amp;lt;"]
)
def test_markdown_that_shows_as_such_is_noticed(text: str) -> None:
    assert raw_markdown(page(text, "title"))


@pytest.mark.parametrize(
    "text", ["**a** [b](https://c.d) `**code**`", "# a\n\n| a | b |\n|---|--:|\n| 1 | 2 |", "<!-- a -->\n\nb"]
)
def test_markdown_that_is_rendered_is_not(text: str) -> None:
    assert raw_markdown(page(text, "title")) == []


@pytest.mark.slow
def test_the_story_is_told_to_its_end_and_every_request_is_printed(root: Path) -> None:
    command = [sys.executable, "-m", "demo.story", "--requests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "GitHub POST  /repos/acme/moes/issues/1/comments → 201" in done.stdout
    assert "GitHub PATCH /repos/acme/moes/issues/comments/" in done.stdout
    assert "GitHub POST  /repos/acme/moes/releases → 201" in done.stdout
    assert "Hub    POST  /api/models/acme/Assistant-2x1M/commit/main → 200" in done.stdout
