"""Every mistake in a recipe is one clear sentence with file and line, and exit code 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.cli import main
from merge.errors import RecipeError
from merge.recipe import DEFAULT_QUANTS, json_schema, load_recipe, parse_recipe

GOOD = """\
base_model: a/base
experts:
  - source_model: a/one
    positive_prompts: ["x"]
  - source_model: a/two
    positive_prompts: ["y"]
"""

# Kind of mistake -> (recipe, finding, line, a part of the sentence). Every one is a mistake that somebody makes or plants.
BROKEN = {
    "tab": ("base_model: a/b\n\texperts: []\n", "not-yaml", 2, "cannot start any token"),
    "colon in text": ("base_model: a/b: c\n", "not-yaml", 1, "mapping values"),
    "open bracket": ("base_model: [a\n", "not-yaml", 2, "expected ',' or ']'"),
    "open quote": ('base_model: "a/b\nexperts: []\n', "not-yaml", 3, "end of stream"),
    "two documents": ("a: 1\n---\nb: 2\n", "not-yaml", 2, "second document"),
    "complex key": ("? [a]\n: 1\n", "not-yaml", 1, "plain word"),
    "no date": ("base_model: a/b\nexperts: 2024-13-45\n", "not-yaml", 2, "quote it"),
    "control character": ("base_model: a\x07b\n", "not-text", 1, "U+0007"),
    "alias": ("a: &x [1]\nb: *x\n", "alias-used", 2, "*x"),
    "merge key": ("<<: {a: 1}\n", "alias-used", 1, "<<"),
    "python tag": ("base_model: !!python/name:os.system\n", "tag-used", 1, "python"),
    "duplicate key": ("base_model: a/b\nbase_model: c/d\n", "duplicate-key", 2, "first at line 1"),
    "nested": ("[" * 60 + "]" * 60, "too-deep", 1, "24 levels"),
    "a list": ("- a\n- b\n", "not-a-recipe", 1, "this is a list"),
    "empty": ("# nothing\n", "not-a-recipe", 1, "this is nothing"),
    "a text": ("hello\n", "not-a-recipe", 1, "this is a text"),
    "no base": ("experts: [{source_model: a/b}, {source_model: a/c}]\n", "missing-key", 1, "'base_model' is missing"),
    "no experts": ("base_model: a/b\n", "missing-key", 1, "'experts' is missing"),
    "no source": ("base_model: a/b\nexperts:\n  - positive_prompts: [x]\n", "missing-key", 3, "from expert 1"),
    "empty experts": ("base_model: a/b\nexperts: []\n", "out-of-range", 2, "at least one"),
    "misspelt key": (GOOD + "gate_mod: random\n", "unknown-key", 7, "perhaps you meant 'gate_mode'"),
    "misspelt expert key": (GOOD.replace("positive_prompts", "positive_prompt", 1), "unknown-key", 4, "of expert 1"),
    "misspelt section key": (GOOD + "release:\n  repository: a/b\n", "unknown-key", 8, "key of release"),
    "unknown gate mode": (GOOD + "gate_mode: hiden\n", "unknown-value", 7, "perhaps you meant 'hidden'"),
    "unknown dtype": (GOOD + "dtype: bf16\n", "unknown-value", 7, "perhaps you meant 'bfloat16'"),
    "unknown quant": (GOOD + "release:\n  quants: [Q4_KM]\n", "unknown-value", 8, "perhaps you meant 'Q4_K_M'"),
    "number as name": (GOOD.replace("a/base", "5"), "wrong-type", 1, "put it in quotes"),
    "norway": (GOOD.replace('["x"]', "[no]"), "wrong-type", 4, "'no', which YAML reads as false"),
    "time of day": (GOOD.replace('["x"]', "[12:30]"), "wrong-type", 4, "'12:30', which YAML reads as a number"),
    "prompt not in a list": (GOOD.replace('["x"]', "hello"), "wrong-type", 4, "must be a list, not the text 'hello'"),
    "experts as mapping": ("base_model: a/b\nexperts: {a: 1}\n", "wrong-type", 2, "must be a list, not a mapping"),
    "half an expert": (GOOD + "experts_per_token: 2.5\n", "wrong-type", 7, "whole number"),
    "word for number": (GOOD + "experts_per_token: two\n", "wrong-type", 7, "not the text 'two'"),
    "maybe": (GOOD + "release:\n  private: maybe\n", "wrong-type", 8, "true or false"),
    "null prompt": (GOOD.replace('["x"]', "[null]"), "wrong-type", 4, "not nothing"),
    "no experts per token": (GOOD + "experts_per_token: 0\n", "out-of-range", 7, "at least 1"),
    "huge seed": (GOOD + "build:\n  seed: 99999999999999999999\n", "out-of-range", 8, "less than"),
    "negative noise": (GOOD.replace("    positive", "    noise_scale: -1\n    positive", 1), "out-of-range", 4, "least 0"),
    "infinite noise": (GOOD.replace("    positive", "    noise_scale: .inf\n    positive", 1), "wrong-type", 4, "finite"),
    "too many per token": (GOOD + "experts_per_token: 3\n", "too-few-experts", 7, "more than there are experts (2)"),
    "no prompts": (GOOD.replace('    positive_prompts: ["y"]\n', ""), "prompts-missing", 5, "expert 2 has no positive"),
    "empty prompt": (GOOD.replace('"x"', '" "'), "empty-prompt", 4, "of expert 1 is empty"),
    "identical prompts": (GOOD.replace('"y"', '"x"'), "identical-prompts", 2, "the same prompts"),
    "web address": (GOOD.replace("a/base", "https://huggingface.co/a/base"), "bad-model-reference", 1, "web address"),
    "path upwards": (GOOD.replace("a/base", "a/.."), "bad-model-reference", 1, "not a name the Hub allows"),
    "no owner": (GOOD.replace("a/base", "base"), "bad-model-reference", 1, "one slash"),
    "bad revision": (GOOD.replace("a/base", "a/base@../../x"), "bad-model-reference", 1, "not a revision"),
    "bad repository": (GOOD + "release:\n  repo: mine\n", "bad-repository", 8, "write owner/name"),
    "line break in a tag": (GOOD + 'release:\n  tags: ["a\\nb"]\n', "bad-text", 8, "one line"),
    "expert of a dense model": (GOOD.replace("    positive", "    expert: 1\n    positive", 1), "expert-of-dense-model", 4,
                                "no expert 1 to choose"),
    "shared expert's reference": (GOOD + "shared_experts: [{source_model: ' '}]\n", "bad-model-reference", 7, "' '"),
    "shared expert's prompt": (GOOD + "shared_experts: [{source_model: a/b, positive_prompts: [' ']}]\n", "empty-prompt", 7,
                               "prompt 1 of shared expert 1 is empty"),
    "missing folder": (GOOD.replace("a/base", "./nowhere"), "source-unavailable", 1, "no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_recipe_gives_its_sentence_with_file_and_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, finding, line, sentence = BROKEN[kind]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    # An empty folder of models, so that nothing is asked of a Hub.
    code = main(["preview", str(path), "--models", str(_models(tmp_path))])
    said = [part for part in capsys.readouterr().out.splitlines() if "error[" in part]
    assert code == (4 if finding == "source-unavailable" else 1)
    mine = [part for part in said if f"{path}:{line}: error[{finding}]: " in part]
    assert mine, said
    assert any(sentence in part for part in mine)
    assert "Traceback" not in "".join(said)


def _models(folder: Path) -> Path:
    """Config-only models for the names that the recipes use."""
    config = (Path(__file__).parent.parent / "data/models/udkai/Turdus/config.json").read_text()
    for name in ("base", "one", "two"):
        (folder / "models/a" / name).mkdir(parents=True)
        (folder / "models/a" / name / "config.json").write_text(config)
    return folder / "models"


def test_a_file_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(tmp_path / "nowhere.yaml")]) == 1
    assert "error[not-readable]: the recipe cannot be read: No such file" in capsys.readouterr().out


def test_a_large_file_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RecipeError, match="too-large"):
        parse_recipe(b"#" * 300_000, Path("r.yaml"))


def test_bytes_that_are_no_text_are_refused_at_their_line() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2: error\[not-text\]"):
        parse_recipe(b"a: 1\nb: \xff\xfe\n", Path("r.yaml"))


def test_all_mistakes_are_said_at_once() -> None:
    text = "base_model: 5\nexperts: [{source_model: 6}]\ngate_mode: x\nother: 1\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.encode(), Path("r.yaml"))
    assert [finding.line for finding in caught.value.findings] == [1, 2, 3, 4]


def test_a_value_that_fills_the_screen_is_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"base_model: a/b\nexperts: []\n{'x' * 50_000}: 1\n".encode(), Path("r.yaml"))
    assert all(len(finding.text) < 1000 for finding in caught.value.findings)


def test_text_that_steers_a_terminal_is_shown_as_escapes() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(b'base_model: a/b\nexperts: []\n"\\e[2J\\u202e": 1\n', Path("r.yaml"))
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert "\\x1b[2J\\u202e" in str(caught.value)


def test_mergekit_keys_of_other_merge_methods_are_ignored_with_a_warning() -> None:
    loaded = parse_recipe((GOOD + "merge_method: moe\n").encode(), Path("r.yaml"))
    assert [finding.id for finding in loaded.findings if finding.line == 7] == ["ignored-key"]


def test_absent_keys_have_mergekits_meaning() -> None:
    recipe = parse_recipe(GOOD.encode(), Path("r.yaml")).recipe
    assert (recipe.gate_mode, recipe.experts_per_token, recipe.dtype) == ("hidden", 2, None)
    assert recipe.release.quants == DEFAULT_QUANTS


def test_two_experts_with_the_same_prompts_are_a_warning_among_more() -> None:
    text = GOOD + '  - source_model: a/three\n    positive_prompts: ["x"]\n'
    found = parse_recipe(text.encode(), Path("r.yaml")).findings
    assert [(finding.id, finding.line) for finding in found] == [("same-prompts-twice", 8)]


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    text = GOOD.replace("    positive", "    noise_scale: 1e-5\n    positive", 1)
    assert parse_recipe(text.encode(), Path("r.yaml")).recipe.experts[0].noise_scale == 1e-5


def test_a_version_is_text_however_it_is_written() -> None:
    assert parse_recipe((GOOD + "release: {version: 1.0}\n").encode(), Path("r")).recipe.release.version == "1.0"


def test_comments_order_and_layout_do_not_change_a_recipes_identity() -> None:
    other = "# a comment\ngate_mode: hidden\n" + GOOD.replace('["x"]', '\n      - "x"')
    same = [parse_recipe(text.encode(), Path("r.yaml")).recipe.identity() for text in (GOOD, other)]
    assert same[0] == same[1]
    changed = parse_recipe(GOOD.replace('"x"', '"z"').encode(), Path("r.yaml")).recipe.identity()
    assert changed != same[0]


@pytest.mark.parametrize("name", ["Beyonder-4x7B-v3", "BurningBruce-005", "Raiden-16x3.43B", "Xwin-Pygmalion-2x7B",
                                  "clown-car-4x7B", "smol_llama-8x220M", "demo-4x135M"])  # fmt: skip
def test_the_shipped_recipes_are_valid(root: Path, name: str) -> None:
    loaded = load_recipe(root / "recipes" / f"{name}.yaml")
    assert loaded.name == (loaded.recipe.release.repo or f"community/{name}").split("/")[1]


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    assert {"base_model", "experts", "gate_mode", "release", "build", "router", "card", "evals"} <= set(
        schema["properties"]
    )
    assert schema["additionalProperties"] is False


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                        ["base_model", "experts", "source_model", "positive_prompts", "release", "quants", "dtype", "evals",
                         "texts", "sections", "card", "expand", "router", "x"]), inner, max_size=5), max_leaves=20))  # fmt: skip
def test_any_yaml_gives_a_recipe_or_findings(value: object) -> None:
    import yaml

    try:
        parse_recipe(yaml.safe_dump(value).encode(), Path("r.yaml"))
    except RecipeError as error:
        assert error.findings
        assert all(finding.text for finding in error.findings)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="ab: -[]{}\"'&*!#|>\n\t", max_size=80).map(str.encode))
def test_any_bytes_give_a_recipe_or_findings(raw: bytes) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(raw, Path("r.yaml"))
