"""The gallery shows every recipe, readable without scripts, sorted and searched with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from bot.cli import main
from bot.hub.server import Server, running
from bot.publish.contents import PUBLISHED_REPORT
from evals.scores import ModelLosses, Perplexities, TextLoss
from merge.recipe import load_recipe
from tests.browser import COLORS, OVERFLOW, asked, contrast, needs_browser
from tests.cards.page import Page
from tests.cards.reports import release_report

RECIPE = """\
base_model: leveldevai/TurdusBeagle-7B
gate_mode: random
experts:
  - {{source_model: leveldevai/TurdusBeagle-7B, role: "{role}"}}
  - {{source_model: udkai/Turdus}}
release: {{repo: me/{name}, license: apache-2.0, quants: [Q8_0]}}
card: {{description: "{description}"}}
"""
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(1)> {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hub: Server) -> Path:
    """A repository of four recipes: one released, one changed since, one new and hostile, one with a mistake."""
    folder = tmp_path_factory.mktemp("recipes-repository")
    (folder / "recipes").mkdir()
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    for name in ("released", "changed", "hostile"):
        text = RECIPE.format(name=name, role="chat", description=HOSTILE if name == "hostile" else f"A {name} model.")
        path = folder / "recipes" / f"{name}.yaml"
        path.write_text(text)
        if name != "hostile":
            losses = Perplexities(
                ("a",),
                (
                    ModelLosses(name, "mixture", (TextLoss(2.0 if name == "released" else 2.4, 9),)),
                    ModelLosses("b", "base", (TextLoss(2.3, 9),)),
                ),
                "2026-11-22",
            )
            report = replace(
                release_report(), recipe_identity=load_recipe(path).recipe.identity(), name=name, perplexities=losses
            )
            api.create_repo(f"me/{name}")
            api.upload_file(path_or_fileobj=report.to_json(), path_in_repo=PUBLISHED_REPORT, repo_id=f"me/{name}")
        if name == "changed":
            path.write_text(text.replace("role: ", "residual_scale: 0.5, role: "))
    (folder / "recipes/broken.yaml").write_text("base_model: a/b\nexperts: 3\n")
    (folder / "recipes/notes.yaml").write_text("hello: world\n")
    return folder


@pytest.fixture(scope="module")
def site(folder: Path, hub: Server, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(out / "cache"))
        arguments = ["site", str(folder), "--out", str(out), "--models", str(root / "tests/data/models")]
        assert main([*arguments, "--title", "Our <mixtures>", "--url", "https://github.com/me/recipes/blob/main"]) == 0
    return out / "index.html"


def test_every_recipe_has_its_row_with_status_figures_and_links_without_any_script(site: Path) -> None:
    text = site.read_text(encoding="utf-8")
    rows = re.findall(r"<tr>\n(.*?)</tr>", text.split("<tbody>")[1], re.DOTALL)
    assert len(rows) == 4
    row = {re.search(r'data-value="(.*?)"', each)[1]: each for each in rows}  # type: ignore[index]
    assert [
        re.search(r'class="status ([\w-]+)"', row[name])[1] for name in ("released", "changed", "hostile", "broken")
    ] == [  # type: ignore[index]
        "published",
        "recipe-changed",
        "not-published",
        "error",
    ]
    assert "24.15 B" in row["released"]
    assert "25.9 % better" in row["released"]
    assert "10.5 % worse" in row["changed"]
    assert "experts must be a list" in row["broken"]
    assert 'href="https://huggingface.co/me/released"' in row["released"]
    assert 'href="https://huggingface.co/me/released-GGUF"' in row["released"]
    assert 'href="https://github.com/me/recipes/blob/main/recipes/released.yaml"' in row["released"]
    assert 'href="https://huggingface.co/me/hostile"' not in text
    assert (site.parent / ".nojekyll").is_file()


def test_hostile_text_stays_text(site: Path) -> None:
    page = Page()
    page.feed(site.read_text(encoding="utf-8"))
    assert [tag for tag in page.tags if tag[0] in ("script", "img")] == [("script",)]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "Our <mixtures>" in page.text


@needs_browser
def test_a_click_sorts_and_a_word_searches(site: Path) -> None:
    names = "[...document.querySelectorAll('#recipes tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].dataset.value)"
    assert asked(site, f"return {names};") == ["broken", "changed", "hostile", "released"]
    sort = "document.querySelectorAll('#recipes th button')[8].click();"
    # The better one first; what was not measured last, whichever way.
    assert asked(site, f"{sort} return {names};")[:2] == ["released", "changed"]
    assert asked(site, f"{sort}{sort} return {names};")[:2] == ["changed", "released"]
    search = "const s = document.querySelector('#search'); s.value = 'TURDUS apache-2.0'; s.dispatchEvent(new Event('input'));"
    assert asked(site, f"{search} return {names};") == ["hostile"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_contrast(site: Path, dark: bool) -> None:
    found = asked(site, COLORS, dark=dark)
    assert len(found) > 50
    assert not [(what, ink, paper) for what, ink, paper in found if contrast(ink, paper) < 4.5]


@needs_browser
@pytest.mark.parametrize("width", [500, 900, 1200])
def test_nothing_is_wider_than_the_window(site: Path, width: int) -> None:
    assert asked(site, OVERFLOW, width=width) <= 0


def test_a_folder_without_recipes_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", str(tmp_path), "--out", str(tmp_path / "site"), "--offline"]) == 2
    assert "no recipes in it" in capsys.readouterr().err
    assert main(["site", str(tmp_path / "nowhere"), "--offline"]) == 2
    assert not (tmp_path / "site").exists()
