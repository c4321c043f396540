"""A card as a reader sees it: rendered as GitHub-flavoured Markdown, taken apart by an HTML parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from cards.markdown import JOINER

# Raw HTML passes and bare addresses become links: what the most permissive renderer would do.
RENDERER = MarkdownIt("gfm-like", {"html": True, "linkify": True})


@dataclass
class Page(HTMLParser):
    """`tags`: every tag with its attributes' names, in order; `links`: every href; `text`: all that is shown, `prose`: the same
    without code."""

    tags: list[tuple[str, ...]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    text: str = ""
    prose: str = ""
    depth: int = 0

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.depth += tag == "code"
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))
        self.depth -= tag == "code"

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment",))

    def handle_decl(self, decl: str) -> None:
        self.tags.append(("declaration",))

    def handle_pi(self, data: str) -> None:
        self.tags.append(("instruction",))

    def unknown_decl(self, data: str) -> None:
        self.tags.append(("declaration",))

    def handle_data(self, data: str) -> None:
        self.text += data
        self.prose += "" if self.depth else data

    @property
    def words(self) -> str:
        """The text without what is invisible, runs of white space as one space."""
        return re.sub(r"\s+", " ", self.text.replace(JOINER, "")).strip()


def page(markdown: str) -> Page:
    """The page that `markdown` without front matter gives."""
    parser = Page()
    parser.feed(RENDERER.render(markdown))
    parser.close()
    return parser


def body(card: str) -> str:
    """A card without its front matter."""
    return card.split("\n---\n", 1)[1]
