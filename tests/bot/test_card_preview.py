"""`moerge card --preview` shows the cards as the Hub would, and follows what changes."""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from bot import card_preview
from cards import render
from cards.page import card_page, rendered
from cards.render import render_gguf_card, render_model_card, write_cards
from evals.results import REPORT
from tests.browser import CHROMIUM, COLORS, OVERFLOW, asked, contrast, needs_browser
from tests.cards.page import Page
from tests.cards.reports import demo_report, measured_report

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    (folder / REPORT).write_bytes(measured_report().to_json())
    return folder


@pytest.fixture(scope="module")
def address(build: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "bot", "card", str(build), "--preview", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = next(filter(None, (re.match(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)))
        yield found[0]
        process.terminate()


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310
            return answer.status, answer.headers["content-type"], answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, "", ""


def test_both_cards_and_their_figures_are_served(address: str, build: Path) -> None:
    status, kind, text = get(address)
    assert (status, kind.split(";")[0]) == (200, "text/html")
    assert "Beyonder 4x7B, version 3</h1>" in text
    assert 'src="/files/architecture.svg"' in text
    assert get(f"{address}/files/architecture.svg")[:2] == (200, "image/svg+xml")
    assert get(f"{address}/files/routing.png")[:2] == (200, "image/png")
    assert "GGUF files of" in get(f"{address}/gguf")[2]
    for path in ("../report.json", "%2e%2e/report.json", "README.md", "nothing.png", "/etc/passwd"):
        assert get(f"{address}/files/{path}")[0] == 404


def test_a_new_report_is_another_version_and_another_page(address: str, build: Path) -> None:
    before = get(f"{address}/version")[2]
    assert f'data-version="{before}"' in get(address)[2]
    old = (build / REPORT).read_bytes()
    (build / REPORT).write_bytes(replace(measured_report(), title="Another title").to_json())
    assert get(f"{address}/version")[2] != before
    assert "Another title</h1>" in get(address)[2]
    (build / REPORT).write_bytes(b"{")
    assert "cannot be rendered" in get(address)[2]
    (build / REPORT).write_bytes(old)


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the templates that can be edited."""
    copied = Path(shutil.copytree(render.TEMPLATES, tmp_path / "templates"))
    monkeypatch.setattr(render, "TEMPLATES", copied)
    monkeypatch.setattr(card_preview, "TEMPLATES", copied)
    render._environment.cache_clear()
    yield copied
    render._environment.cache_clear()


def test_an_edited_template_is_another_version_and_another_card(templates: Path, build: Path) -> None:
    before = card_preview.version(build)
    assert "All new words" not in render_model_card(measured_report())
    section = templates / "sections/limitations.md.j2"
    section.write_text("All new words.\n" + section.read_text())
    assert card_preview.version(build) != before
    assert "All new words" in render_model_card(measured_report())


@needs_browser
def test_an_open_page_loads_itself_again(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first page is of version one; its script is told of version two, and asks for the page again."""
    versions = itertools.chain(["one"], itertools.repeat("two"))
    monkeypatch.setattr(card_preview, "version", lambda folder: next(versions))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(card_preview.application(build), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        assert CHROMIUM is not None
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
        done = subprocess.run([*command, address], capture_output=True, check=True, timeout=60)
        server.should_exit = True
        thread.join()
    assert 'data-version="two"' in done.stdout.decode()


def pages() -> dict[str, Callable[[], str]]:
    return {
        "model": lambda: render_model_card(measured_report()),
        "gguf": lambda: render_gguf_card(measured_report()),
        "demo": lambda: render_model_card(demo_report()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cards as files, with their figures beside them."""
    folder = tmp_path_factory.mktemp("pages")
    write_cards(folder, measured_report())
    for name, make in pages().items():
        text = card_page(make(), name, {"Model card": "#"}, "Model card")
        (folder / "model" / f"{name}.html").write_text(text, encoding="utf-8")
    return folder / "model"


@needs_browser
@pytest.mark.parametrize("name", pages())
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_of_a_card_has_contrast(folder: Path, name: str, dark: bool) -> None:
    found = asked(folder / f"{name}.html", COLORS, dark=dark)
    assert len(found) > 50
    assert not [(what, ink, paper) for what, ink, paper in found if contrast(ink, paper) < 4.5]


@needs_browser
@pytest.mark.parametrize("name", pages())
def test_a_card_fits_a_narrow_screen_and_a_wide_one(folder: Path, name: str) -> None:
    for width in (500, 1400):
        assert asked(folder / f"{name}.html", OVERFLOW, width=width) <= 0


@needs_browser
def test_the_figures_of_a_card_are_pictures(folder: Path) -> None:
    (folder / "image.png").write_bytes((folder / "routing.png").read_bytes())
    sizes = asked(
        folder / "model.html", "return [...document.images].map((i) => [i.alt.length > 10, i.naturalWidth > 100]);"
    )
    # The image and the diagram; the router's section is the author's own text there, so its figure is not shown.
    assert sizes == [[True, True]] * 2


def test_html_of_a_card_is_text_but_for_a_few_harmless_tags() -> None:
    page = Page()
    page.feed(
        rendered(
            "a <b>b</b> <script>alert(1)</script> <img src=x onerror=y> <details open onclick=z>\n\n<iframe></iframe>"
        )
    )
    assert {tag[0].strip("/") for tag in page.tags} == {"p", "b"}
    assert "<script>" in page.text
    assert "<iframe>" in page.text
