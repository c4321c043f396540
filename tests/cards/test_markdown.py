from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cards.markdown import JOINER, code, code_link, description, destination, escape, fence, link, one_line
from tests.cards.page import RENDERER, page

# Text with much in it that Markdown, HTML or a renderer's extensions take for theirs.
PIECES = (
    *"`*_[]()<>!#|\\~^$@:;&-+=.\"'{}/% \n\t\r1aZé",
    "```", "~~~", "    ", "  ", "\n\n", "---", "===", "- ", "1. ", "> ", "# ", "| a |\n|---|\n", "\n```\n", "\n  ```js\n",
    "<b>", "</details>", "<!--", "<script>", "<?", "<![CDATA[", "<img src=x onerror=y>", "&lt;", "&#60;b&#62;", "&#64;",
    "https://", "http://x.yz", "www.x.yz", "@user", "a@b.cd", "mailto:", "javascript:", "javascript:alert(1)", "data:",
    "![", "](", "]:", "[a]: ", "[a](", "x.yz", "{{ 7 * 7 }}", "{% raw %}", "\u202e", "\u200d", "\u2060", "\x00", "\ud800",
)  # fmt: skip
NASTY = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
TAGS_OF_A_CELL = ["table", "thead", "tr", "th", "/th", "/tr", "/thead", "tbody", "tr", "td", "/td", "td", "/td"]


def shown(text: str) -> str:
    """What a reader should see of `text`."""
    return " ".join(one_line(text).replace(JOINER, "").split())


@given(NASTY)
def test_escaped_text_reads_as_it_was_written_and_makes_nothing(text: str) -> None:
    seen = page(f"before {escape(text)} after")
    assert seen.words == re.sub(r"\s+", " ", f"before {shown(text)} after")
    assert [tag[0] for tag in seen.tags] == ["p", "/p"]


@given(NASTY)
def test_escaped_text_makes_nothing_at_the_start_of_a_line(text: str) -> None:
    seen = page(f"{escape(text)}\n\n# {escape(text)}\n")
    assert seen.words == f"{shown(text)} {shown(text)}".strip()
    assert {tag[0] for tag in seen.tags} <= {"p", "/p", "h1", "/h1"}


@given(NASTY, NASTY)
def test_a_table_keeps_its_cells_whatever_they_say(first: str, second: str) -> None:
    seen = page(f"| a | b |\n| --- | --- |\n| x {escape(first)} | x {code(second)} |\n")
    cells = [tag for tag in seen.tags if tag[0] in ("td", "tr", "th")]
    assert [tag[0] for tag in cells] == ["tr", "th", "th", "tr", "td", "td"]
    assert not seen.links
    assert seen.words == " ".join(f"a b x {shown(first)} x {shown(second)}".split())


@given(NASTY)
def test_code_shows_the_text_itself(text: str) -> None:
    seen = page(f"before {code(text)} after")
    assert seen.words == " ".join(f"before {shown(text)} after".split())
    assert [tag[0] for tag in seen.tags] in (["p", "code", "/code", "/p"], ["p", "/p"])


@given(NASTY)
def test_a_fence_holds_any_text(text: str) -> None:
    tokens = RENDERER.parse(f"{fence(text, 'text')}\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


def test_a_fence_changes_no_character_of_ordinary_text() -> None:
    text = "  indented\n\n\ttab | <b> & ``` @user é 日本 \u200d\n"
    assert RENDERER.parse(fence(text))[0].content == text


@given(NASTY, NASTY)
def test_a_link_leads_where_it_should_or_is_text(text: str, rest: str) -> None:
    seen = page(f"x {link(text, f'https://host/{rest}')}")
    assert len(seen.links) == 1
    assert seen.links[0].startswith("https://host/")
    assert seen.words == f"x {shown(text)}".strip()


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "//host", "/x", "", "https://", "x"])
def test_only_the_web_is_linked(url: str) -> None:
    assert not page(f"x {link('text', url)} {code_link('text', url)}").links


def test_an_url_keeps_its_query() -> None:
    assert page(link("x", "https://h.org/a?b=1&copy=2#c")).links == ["https://h.org/a?b=1&copy=2#c"]
    assert destination("https://h.org/a)b c") == "https://h.org/a%29b%20c"


# ------------------------------------------------------------------------------------------------- the author's description


@given(NASTY)
def test_a_description_runs_nothing_loads_nothing_and_ends(text: str) -> None:
    safe = description(text)
    tokens = RENDERER.parse(f"{safe}\n\n## After\n\nend\n")
    assert [token.type for token in tokens[-6:]] == [
        "heading_open", "inline", "heading_close", "paragraph_open", "inline", "paragraph_close",
    ]  # fmt: skip
    assert tokens[-6].level == 0
    assert tokens[-5].content == "After"
    inside = [*tokens, *(child for token in tokens for child in token.children or ())]
    assert not {token.type for token in inside} & {"html_block", "html_inline", "image"}
    for token in inside:
        if token.type == "link_open":
            assert not re.match(r"(?i)\s*(javascript|data|vbscript|file):", str(token.attrGet("href")))


@given(NASTY)
def test_a_description_mentions_nobody(text: str) -> None:
    tokens = RENDERER.parse(description(text))
    texts = [child.content for token in tokens for child in token.children or () if child.type == "text"]
    linked = re.compile(r"https?://\S*")
    assert not any(re.search(r"(?<![A-Za-z0-9])@[A-Za-z0-9]", linked.sub("", part)) for part in texts)


def test_a_description_keeps_its_formatting() -> None:
    text = (
        "## What it is\n\nA **bold** and *leaning* text, `code`, [a link](https://x.org/a_b?c=1), [a file](./LICENSE), "
        "<https://y.org>, mail@x.org, ~~gone~~.\n\n- one\n- two\n\n> quoted\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"
    )
    assert RENDERER.render(description(text)) == RENDERER.render(text)


def test_code_in_a_description_stays_to_the_letter() -> None:
    text = "See:\n\n```html\n<b>@user</b> ![x](y)\n```\n\n1. Or:\n   ~~~\n   if a <b:\n     ![x]\n   ~~~"
    blocks = [token.content for token in RENDERER.parse(description(text)) if token.type == "fence"]
    assert blocks == ["<b>@user</b> ![x](y)\n", "if a <b:\n  ![x]\n"]


def test_html_in_a_description_becomes_text() -> None:
    seen = page(description("<script>alert(1)</script>\n\n<details><summary>x</summary>\n\n<img src=x>"))
    assert seen.words == "<script>alert(1)</script> <details><summary>x</summary> <img src=x>"
    assert {tag[0] for tag in seen.tags} == {"p", "/p"}


def test_an_image_in_a_description_becomes_a_link() -> None:
    seen = page(description("![a cat](https://x.org/cat.png)"))
    assert seen.tags[1] == ("a", "href")
    assert seen.links == ["https://x.org/cat.png"]


@pytest.mark.parametrize(
    "text",
    [
        "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](&#106;avascript:alert(1))", "[x](java\\script:a)",
        "[x](\n javascript:alert(1))", "[x]: javascript:alert(1)\n\n[x]", "> [x]:\n> data:text/html,y\n\n[x]",
        "<javascript:alert(1)>", "[x](<javascript:alert(1)>)", "[x](data:text/html;base64,PHNjcmlwdD4=)",
    ],
)  # fmt: skip
def test_links_of_other_schemes_in_a_description_become_text(text: str) -> None:
    assert not page(description(text)).links


@pytest.mark.parametrize(
    "piece", ["a", "a.", "@a.", "](", "<https://", "`", "~", "[a]: ", " ", "![", "&#64;", "a@b.c@"]
)
def test_a_long_description_takes_no_time(piece: str) -> None:
    started = time.perf_counter()
    description(piece * (50_000 // len(piece)))
    escape(piece * (50_000 // len(piece)))
    assert time.perf_counter() - started < 1


def test_an_open_block_of_code_in_a_description_is_closed() -> None:
    for text in ("```\nopen", " ```\nopen", "- ```\n  open", "> ~~~\n> open", "~~~~\n~~~\nopen"):
        assert page(f"{description(text)}\n\n# After").tags[-2:] == [("h1",), ("/h1",)]
