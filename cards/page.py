"""A card as a page that looks like the Hub's, to be looked at before it is published: light and dark, narrow and wide.

The Hub shows GitHub-flavoured Markdown with raw HTML that it has sanitised. Here raw HTML of a few harmless kinds passes and
everything else is shown as text, so what is wrong with a card is seen.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

import yaml

# What our cards use, and may be used in a recipe's text no more: `markdown.description` turns its HTML into text.
_ALLOWED = re.compile(r"</?(?:details|summary|code|br|b|i|em|strong|sub|sup|kbd)\s*/?>", re.IGNORECASE)
_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)

STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--faint:#4b5563;--line:#e5e7eb;--paper:#fff;--code:#f6f8fa;--link:#1d4ed8;--chip:#f3f4f6}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--faint:#9ca3af;--line:#374151;--paper:#0b0f19;--code:#141c2e;--link:#93b4fd;--chip:#1a2337}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.65 "Source Sans 3","Source Sans Pro",system-ui,sans-serif}
header{border-bottom:1px solid var(--line);padding:1rem 1.25rem}header h1{font:600 1.15rem/1.3 ui-monospace,monospace;margin:0 0 .5rem;overflow-wrap:anywhere}
nav{display:flex;gap:1rem;font-size:.9rem}nav a[aria-current]{font-weight:600;color:var(--ink)}
.chips{display:flex;flex-wrap:wrap;gap:.35rem;margin:.25rem 0 0;padding:0;list-style:none}.chips li{background:var(--chip);border:1px solid var(--line);border-radius:.5rem;padding:.05rem .5rem;font-size:.82rem;overflow-wrap:anywhere}
main{max-width:52rem;margin:0 auto;padding:1rem 1.25rem 4rem}a{color:var(--link)}
h1,h2,h3{line-height:1.3;overflow-wrap:anywhere}h2{margin:2rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
img{max-width:100%;height:auto}pre{background:var(--code);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;overflow-x:auto;font-size:.85rem}
code{background:var(--code);border-radius:.25rem;padding:.1em .3em;font-size:.87em;overflow-wrap:anywhere}pre code{padding:0;background:none;overflow-wrap:normal}
.table{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.92rem}th,td{border:1px solid var(--line);padding:.35rem .7rem;text-align:left;vertical-align:top}
td code{white-space:nowrap;overflow-wrap:normal}td:last-child{min-width:12rem}th{background:var(--chip)}summary{cursor:pointer;font-weight:600}details{margin:1rem 0}
"""
# Asks twice a second whether the card is another; the answer is its hash.
RELOAD = """
const first = document.documentElement.dataset.version;
setInterval(async () => {
  const answer = await fetch("/version").catch(() => null);
  if (answer && answer.ok && await answer.text() !== first) location.reload();
}, 500);
"""


def card_page(card: str, name: str, tabs: Mapping[str, str], current: str, version: str = "", base: str = "") -> str:
    """A card as a whole HTML page. `tabs` are addresses by title, `base` is where the files beside the card lie, and with a
    `version` the page loads itself again when the server has another."""
    found = _HEADER.match(card)
    metadata: dict[str, Any] = yaml.safe_load(found[1]) or {} if found else {}
    body = rendered(card[found.end() :] if found else card, base)
    links = "".join(
        f'<a href="{html.escape(url)}"{" aria-current=page" if title == current else ""}>{html.escape(title)}</a>'
        for title, url in tabs.items()
    )
    chips = "".join(f"<li>{html.escape(chip)}</li>" for chip in _chips(metadata))
    script = f"<script>{RELOAD}</script>" if version else ""
    return (
        f'<!doctype html><html lang="en" data-version="{html.escape(version)}"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style></head><body><header><h1>{html.escape(name)}</h1>"
        f'<nav>{links}</nav><ul class="chips">{chips}</ul></header><main>{body}</main>{script}</body></html>\n'
    )


def rendered(markdown: str, base: str = "") -> str:
    """Markdown as HTML, as the Hub would show it."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("gfm-like", {"html": True, "linkify": True})
    parser.add_render_rule("html_block", _html)
    parser.add_render_rule("html_inline", _html)
    tokens = parser.parse(markdown)
    for token in (child for block in tokens for child in (block, *(block.children or ()))):
        if token.type == "image" and "://" not in str(token.attrs.get("src", "")):
            token.attrs["src"] = f"{base}{token.attrs['src']}"
    text: str = parser.renderer.render(tokens, parser.options, {})
    return text.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def _html(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Raw HTML: a few tags as they are, the rest as text."""
    content: str = tokens[index].content
    parts, at = [], 0
    for tag in _ALLOWED.finditer(content):
        parts += [_words(content[at : tag.start()]), tag[0]]
        at = tag.end()
    return "".join([*parts, _words(content[at:])])


def _words(text: str) -> str:
    return html.escape(html.unescape(text), quote=False)


def _chips(metadata: Mapping[str, Any]) -> list[str]:
    """The tags that the Hub shows under a model's name."""
    chips: list[str] = []
    for key in ("pipeline_tag", "library_name", "language", "tags"):
        value = metadata.get(key) or []
        chips += [value] if isinstance(value, str) else [str(one) for one in value]
    licence = metadata.get("license_name") or metadata.get("license")
    return [*chips, *([f"license: {licence}"] if licence else [])]
