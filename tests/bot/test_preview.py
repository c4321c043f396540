"""The preview: right counts for the community's recipes, the promised JSON, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bot.cli import main
from tests.bot.workflow import Recipes, recipe

# Billions of parameters as the models' pages on the Hub show them.
COMMUNITY = {
    "Raiden-16x3.43B": 35.8,
    "Xwin-Pygmalion-2x7B": 11.07,
    "BurningBruce-005": 24.15,
    "Beyonder-4x7B-v3": 24.15,
    "smol_llama-8x220M": 1.10,
    "clown-car-4x7B": 24.15,
}
KEYS = ["recipe", "name", "family", "parameters", "checkpoint_bytes", "gguf_bytes", "download_bytes", "build_disk_bytes",
        "license", "findings", "build_memory_bytes", "gguf_tensor_bytes", "runner", "sources", "change", "against_base", "bug"]  # fmt: skip


def preview_json(root: Path, capsys: pytest.CaptureFixture[str], *recipes: str) -> tuple[int, list[dict]]:
    models = root / "tests/data/models"
    code = main(["preview", "--json", "--models", str(models), *(str(root / "recipes" / f"{r}.yaml") for r in recipes)])
    return code, json.loads(capsys.readouterr().out)


def test_the_community_s_recipes_have_the_parameters_the_hub_shows(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, previews = preview_json(root, capsys, *COMMUNITY)
    assert code == 0
    for preview in previews:
        billions = COMMUNITY[preview["name"]]
        digits = len(str(billions).split(".")[1])
        assert round(preview["parameters"]["total"] / 1e9, digits) == billions, preview["name"]


def test_the_json_has_the_promised_keys_and_its_parts_add_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, [preview] = preview_json(root, capsys, "BurningBruce-005")
    assert list(preview) == KEYS
    parameters = preview["parameters"]
    assert parameters["total"] == parameters["shared"] + 4 * parameters["per_expert"]
    assert parameters["active"] == parameters["shared"] + 2 * parameters["per_expert"]
    assert preview["checkpoint_bytes"] == 2 * parameters["total"]
    assert set(preview["gguf_bytes"]) == {"Q8_0", "Q4_K_M"}
    assert preview["download_bytes"] is None  # there are only configs: nothing could be built from them
    assert set(preview["findings"][0]) == {"id", "level", "message", "line", "fault"}


def test_a_recipe_with_an_error_keeps_its_place_in_the_list(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("base_model: a/b\n")
    models = root / "tests/data/models"
    good = root / "recipes/smol_llama-8x220M.yaml"
    assert main(["preview", "--json", "--models", str(models), str(broken), str(good)]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["parameters"], first["findings"][0]["id"]) == ("broken", None, "missing-key")
    assert second["name"] == "smol_llama-8x220M"


def test_strict_makes_a_warning_an_error_and_the_exit_code_with_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["preview", "--json", "--models", str(root / "tests/data/models")]
    levels = []
    for strict, expected in (([], 0), (["--strict"], 1)):
        assert main([*arguments, *strict, str(root / "recipes/smol_llama-8x220M.yaml")]) == expected
        [preview] = json.loads(capsys.readouterr().out)
        levels.append({finding["id"]: finding["level"] for finding in preview["findings"]})
    assert levels[0]["all-experts-same"] == "warning"
    assert levels[1] == {name: level.replace("warning", "error") for name, level in levels[0].items()}


def test_base_previews_only_what_says_something_else_since_then_and_tells_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = Recipes(tmp_path / "recipes")
    recipes.commit(**{f"recipes/{name}.yaml": recipe(2) for name in "abc"})
    recipes.write("recipes/a.yaml", recipe(2, comment="says the same"))
    recipes.write("recipes/b.yaml", recipe(4))
    recipes.write("recipes/d.yaml", recipe(2))
    folder = str(recipes.folder / "recipes")
    assert main(["preview", "--json", "--base", "HEAD", folder]) == 0
    previews = {preview["name"]: preview for preview in json.loads(capsys.readouterr().out)}
    assert {name: preview["change"] for name, preview in previews.items()} == {"b": "changed", "d": "added"}
    told = {one["what"]: (one["before"], one["after"]) for one in previews["b"]["against_base"]}
    assert told["parameters"] == ("12.88 B", "24.15 B"), told
    assert main(["preview", "--base", "HEAD", folder]) == 0
    said = capsys.readouterr().out
    assert "changed     parameters: 12.88 B → 24.15 B" in said
    assert f"{folder}/a.yaml: unchanged: the recipe says the same as before" in said
    assert main(["preview", "--base", "nowhere", folder]) == 2
    assert "nowhere: no such commit" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["preview", "--models", "tests/data/models", "recipes/BurningBruce-005.yaml"],
                                       ["schema"], ["--help"]])  # fmt: skip
def test_no_heavy_library_is_loaded_where_none_is_needed(root: Path, arguments: list[str]) -> None:
    script = (
        "import sys; from bot.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'xllamacpp', 'starlette', 'accelerate'}\n"
        "if sys.argv[1] == '--help': heavy |= {'pydantic', 'numpy', 'yaml', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "moerge recipe"


def test_a_bug_of_ours_is_said_to_be_one_and_shows_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    import bot.previews

    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(bot.previews, "preview_loaded", broken)
    assert main(["preview", str(root / "recipes/Beyonder-4x7B-v3.yaml")]) == 5
    error = capsys.readouterr().err
    assert "a bug in moerge" in error
    assert "Traceback" not in error
