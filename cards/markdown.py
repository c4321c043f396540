"""Text of others made safe to stand in a card.

Two kinds of text come from a recipe. Names, roles, titles, prompts: they must read as they were written and mean nothing to
a renderer (`escape`, `code`, `fence`, `link`). And one description, the author's own Markdown (`description`), which keeps
its formatting but cannot run HTML, load an image, call anyone by `@name` or swallow the rest of the card.

Renderers differ, so this leans on CommonMark (https://spec.commonmark.org/0.31.2/) and on GitHub's tables and automatic
links (https://github.github.com/gfm/), and never on a renderer removing what is dangerous.
"""

from __future__ import annotations

import re
from html import escape as escape_html
from urllib.parse import quote

# Invisible, and no break of the line: what stands on its two sides is no longer one word to a renderer.
JOINER = "\u2060"
REPLACEMENT = "\ufffd"

# Controls, and what reorders a line: shown as the replacement character. (Joiners of emoji and Persian are left alone.)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_NEWLINE = re.compile("\r\n?")
_SPACE = re.compile(r"\s+")

# As character references where a backslash would be read by a table, by mathematics, or by HTML.
_ESCAPES = {ord(c): f"&#{ord(c)};" for c in "\\`|$"}
_ESCAPES |= {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
_ESCAPES |= {ord(c): f"\\{c}" for c in "*[]~^#"}
# Inside of a word an underscore is one; at its edge it may begin or end emphasis.
_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK_START = re.compile(r"^(?=[-+=])|^(\d+)(?=[.)](?:\s|$))")
# Mentions, references to issues, web addresses, bare hosts and e-mail addresses, which some renderers make links of wherever
# they stand. (A number sign after an ampersand is one of our own character references.)
_LINKED = re.compile(
    r"@|(?<!&)#(?=\d)|\bGH(?=-\d)|/(?=/)|www(?=\.)|(?:mailto|xmpp)(?=:)|(?<=\w)\.(?=[^\W\d_])", re.IGNORECASE
)

_PLAIN_CODE = re.compile(r"[A-Za-z0-9._/+=:,@-]+(?: [A-Za-z0-9._/+=:,@-]+)*")
_URL_SAFE = ":/?#!&'+,;=%~-._@"


class Markdown(str):
    """Text that is Markdown already: a template puts it in as it is, and escapes everything else."""

    __slots__ = ()


def clean(text: str) -> str:
    """`text` with newlines as newlines and without characters that steer a terminal or reorder a line."""
    return _CONTROLS.sub(REPLACEMENT, _NEWLINE.sub("\n", text))


def one_line(text: str) -> str:
    """`text` cleaned, in one line, every run of white space as one space."""
    return _SPACE.sub(" ", clean(text)).strip()


def escape(text: str) -> Markdown:
    """`text` in one line, as words that mean nothing to a renderer, whether in a sentence, a heading or a table's cell."""
    plain = _UNDERSCORE.sub(r"\\_", one_line(text).translate(_ESCAPES))
    plain = _BLOCK_START.sub(r"\1\\", plain)
    return Markdown(_LINKED.sub(lambda found: f"{found[0]}{JOINER}", plain))


def html(text: str) -> Markdown:
    """`text` in one line as HTML, for where Markdown does not reach: between the tags of a block of HTML."""
    plain = escape_html(one_line(text), quote=True)
    return Markdown(_LINKED.sub(lambda found: f"{found[0]}{JOINER}", plain))


def code(text: str) -> Markdown:
    """`text` in one line as code, also in a table's cell: there no code span of Markdown's can hold a pipe."""
    line = one_line(text)
    return Markdown(f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{escape(line)}</code>" if line else "")


def fence(text: str, language: str = "") -> Markdown:
    """`text` as a block of code, between fences longer than any run of backticks in it."""
    body = clean(text).rstrip("\n")
    longest = max(map(len, re.findall("`+", body)), default=0)
    marks = "`" * max(3, longest + 1)
    return Markdown(f"{marks}{language}\n{body}\n{marks}")


def link(text: str, url: str) -> Markdown:
    """`text` as a link to `url`; only as text where the URL is not one of the web."""
    return Markdown(f"[{escape(text)}]({destination(url)})") if is_web(url) else escape(text)


def code_link(text: str, url: str | None) -> Markdown:
    """`text` as code, and as a link where there is a URL to link to."""
    return Markdown(f"[{code(text)}]({destination(url)})") if url and is_web(url) else code(text)


def is_web(url: str) -> bool:
    return re.match(r"https?://[A-Za-z0-9]", url) is not None


def destination(url: str) -> str:
    """`url` as it can stand between the parentheses of a link: what would end or change it is percent-encoded."""
    return quote(one_line(url), safe=_URL_SAFE).replace("&", "&amp;")


# ------------------------------------------------------------------------------------------------- the author's description

_FENCE = re.compile(r"(?P<indent> {0,3})(?P<marks>`{3,}(?=[^`]*$)|~{3,})")
_LANGUAGE = re.compile(r"[ \t]*([A-Za-z0-9_+#.-]*)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])(?!https?://[^\s<>]*>)")
_IMAGE = re.compile(r"!(?=\[)")
# A mention, in any spelling of its `@`; but not one that begins a part of a web address, or that stands in an e-mail address.
_MENTION = re.compile(
    r"(?P<kept>https?://[a-z0-9-]+(?:\.[a-z0-9-]+)+/(?:[a-z0-9._~%/-]*/)?@(?=\w)"
    r"|(?<![a-z0-9._%+/-])[a-z0-9._%+-]+@[a-z0-9-]+(?:\.[a-z0-9-]+)+(?![@\w]))"
    r"|(?:@|&(?:#0*64|#x0*40|commat);)(?=\w)",
    re.IGNORECASE,
)
# What may follow `](` or `]:`: the web, mail, a place on this page, or a file beside it; no other scheme, in any spelling.
_TARGET = re.compile(r"(\])(?=[(:])(?![(:]\s*(?:<?https?://|mailto:|#|[\w./-][\w./?=#%-]*(?:[\s)]|\Z)))", re.IGNORECASE)


def description(text: str) -> Markdown:
    """The author's Markdown with its formatting, made harmless.

    Kept: paragraphs, emphasis, headings, lists, quotes, tables, code, and links to the web, to mail and to files beside the
    card. HTML becomes text; an image becomes a link to it, so that opening a card loads nothing from elsewhere; `@name`
    calls nobody; links of other schemes become text; a block of code that is never closed is closed. What is in a block of
    code stays exactly as it is. Elsewhere the change is one invisible character, since a backslash would be seen in a code
    span.
    """
    lines: list[str] = []
    words: list[str] = []
    marks = indent = ""

    def flush() -> None:
        if words:
            lines.append(_harmless("\n".join(words)))
            words.clear()

    for line in clean(text).strip("\n").split("\n"):
        found = _FENCE.match(line)
        if marks:
            lines.append(line[len(indent) :] if line.startswith(indent) else line.lstrip(" "))
            if found and found["marks"].startswith(marks) and not line[found.end() :].strip(" \t"):
                marks = ""
        elif found:
            # At the line's beginning a fence opens a block whatever came before, so that we and every renderer agree
            # on what is code. A fence deeper inside a list or quote ends with it.
            flush()
            # Of what follows a fence only the language is kept: a pipe there could make it a table's header.
            language = _LANGUAGE.match(line, found.end())
            lines.append(f"{found['marks']}{language[1] if language else ''}")
            marks, indent = found["marks"], found["indent"]
        else:
            words.append(line)
    flush()
    if marks:
        lines.append(marks)
    return Markdown("\n".join(lines).rstrip())


def _harmless(text: str) -> str:
    """Markdown outside of blocks of code, with invisible characters where something would begin that may not."""
    text = _TAG.sub(f"<{JOINER}", text)
    text = _IMAGE.sub(f"!{JOINER}", text)
    text = _MENTION.sub(lambda found: found["kept"] or f"{found[0]}{JOINER}", text)
    return _TARGET.sub(rf"\1{JOINER}", text)
