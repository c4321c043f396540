"""A real browser: a page as it is once its scripts have run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def asked(page: Path, script: str, *, width: int = 1400, dark: bool = False, javascript: bool = True) -> Any:
    """What `script` (the body of a function) returns in the page, opened in Chromium in a window of `width`."""
    assert CHROMIUM is not None
    probe = page.with_name(f"probe-{page.name}")
    # Pictures are there only when all of the page is loaded.
    told = f"addEventListener('load', () => {{ document.title = 'told:' + JSON.stringify((() => {{ {script} }})()) }})"
    probe.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{told}</script></body>"), encoding="utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1200", "--dump-dom"]
    command += ["--force-dark-mode"] if dark else []
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, check=True, timeout=60)
    found = re.search(r"<title>told:(.*?)</title>", done.stdout.decode(), re.DOTALL)
    assert found, done.stderr.decode()[-2000:]
    return json.loads(html.unescape(found[1]))


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as a browser computes them, `rgb(…)`, from 1 to 21: https://www.w3.org/TR/WCAG21/#contrast-minimum"""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Every element with text of its own: its colour and the nearest background behind it.
COLORS = """
const behind = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor;
  if (!c.startsWith("rgba(0, 0, 0, 0")) return c; e = e.parentElement; } return "rgb(255, 255, 255)"; };
const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
return [...document.body.querySelectorAll("*")].filter((e) => own(e) && !["SCRIPT", "STYLE"].includes(e.tagName))
  .map((e) => [e.tagName + "." + e.className, getComputedStyle(e).color, behind(e)]);
"""
# By how much the page is wider than its window, in pixels.
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"
