"""Markdown as GitHub shows it, as a page and as a picture, to be looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

STYLE = """
body { font: 14px/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; color: #1f2328; margin: 24px;
       max-width: 980px; }
h1, h2, h3 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; }
table { border-collapse: collapse; margin: 0 0 16px; display: block; overflow: auto; }
th, td { border: 1px solid #d1d9e0; padding: 6px 13px; } tr:nth-child(2n) { background: #f6f8fa; }
code { background: #818b981f; padding: .2em .4em; border-radius: 6px; font: 85% ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: #f6f8fa; padding: 16px; border-radius: 6px; overflow: auto; } pre code { background: none; padding: 0; }
a { color: #0969da; } details { margin: 0 0 16px; } blockquote { border-left: .25em solid #d1d9e0; padding: 0 1em; margin: 0; }
"""
# What shows where Markdown was not understood: emphasis, links, headings, tables, fences, HTML's own brackets.
RAW = re.compile(r"\*\*|\]\(|^#{1,6} |^\|.*\||```|</?[a-z]+>|&[a-z]+;|&#\d+;|\\[*_`|\[]", re.MULTILINE)


def page(markdown: str, title: str) -> str:
    """A whole HTML page of a comment or a release, tables and collapsed sections as on GitHub, opened."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": True, "linkify": True}).enable(["table", "strikethrough", "linkify"])
    body = renderer.render(markdown).replace("<details>", "<details open>")
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>{body}'


def raw_markdown(html: str) -> list[str]:
    """Markdown that a reader of the page would see as such; none is right."""
    body = re.sub(r"<title>.*?</title>|<style>.*?</style>|<!--.*?-->|<code.*?</code>", "", html, flags=re.DOTALL)
    text = unescape(re.sub(r"<[^>]+>", "", body))
    return RAW.findall(text)


def picture(html: Path, height: int = 2000) -> Path | None:
    """A PNG of a page beside it, by Chromium; None where there is none."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        return None
    target = html.with_suffix(".png")
    target.unlink(missing_ok=True)
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--user-data-dir={html.parent / 'browser'}", f"--window-size=1060,{height}", f"--screenshot={target}", html.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=False)
    shutil.rmtree(html.parent / "browser", ignore_errors=True)
    return target if target.is_file() else None
