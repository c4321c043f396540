"""Which recipes changed, told by real repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bot.changes import Change, all_recipes, changes_between, is_recipe
from bot.cli import main
from bot.events import Event, compare
from bot.git import Repository
from bot.globs import matcher
from merge.errors import UsageError
from tests.bot.workflow import BASE, ZEROS, Recipes, pull_request, push, recipe

GLOBS = ("recipes/**/*.yaml", "recipes/**/*.yml")


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path / "recipes-repository")


def between(repository: Recipes, base: str, head: str) -> dict[str, str]:
    found = changes_between(Repository(repository.folder), base, head, GLOBS)
    return {change.path: change.kind for change in found}


def of_event(repository: Recipes, name: str, payload: dict[str, Any], sha: str = "") -> tuple[list[Change], str]:
    checkout = Repository(repository.folder)
    comparison = compare(Event(name, payload, sha), checkout)
    if comparison.head is None:
        return [], comparison.why
    if comparison.base is None:
        return all_recipes(checkout, comparison.head, GLOBS, comparison.why), comparison.why
    return changes_between(checkout, comparison.base, comparison.head, GLOBS), comparison.why


def to_build(changes: list[Change]) -> list[str]:
    return [change.path for change in changes if change.to_build]


# --------------------------------------------------------------------------------------------------------- between commits


def test_a_recipe_changed_when_it_says_something_else_and_not_when_its_text_differs(recipes: Recipes) -> None:
    files = {"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3), "recipes/c.yaml": recipe(4)}
    before = recipes.commit(**files)
    reordered = "\n".join(reversed(recipe(3).split("gate_mode: random\n"))) + "gate_mode: 'random'  # quoted\n"
    after = recipes.commit(**{"recipes/a.yaml": recipe(5), "recipes/b.yaml": reordered, "recipes/d.yml": recipe(6)})
    # c did not change at all, so it is not even named.
    assert between(recipes, before, after) == {
        "recipes/a.yaml": "changed", "recipes/b.yaml": "unchanged", "recipes/d.yml": "added",
    }  # fmt: skip


def test_a_renamed_recipe_is_not_built_and_a_deleted_one_is_named(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/old.yaml": recipe(2), "recipes/gone.yaml": recipe(3)})
    recipes.git("mv", "recipes/old.yaml", "recipes/new.yaml")
    recipes.git("rm", "--quiet", "recipes/gone.yaml")
    after = recipes.commit(**{"recipes/new.yaml": recipe(2, comment="moved, with a comment")})
    found = changes_between(Repository(recipes.folder), before, after, GLOBS)
    assert {change.path: change.kind for change in found} == {
        "recipes/gone.yaml": "deleted", "recipes/new.yaml": "renamed",
    }  # fmt: skip
    assert "recipes/old.yaml" in next(change.why for change in found if change.kind == "renamed")
    assert to_build(found) == []


def test_a_recipe_that_is_renamed_and_says_something_else_is_new(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/old.yaml": recipe(2)})
    recipes.git("mv", "recipes/old.yaml", "recipes/new.yaml")
    after = recipes.commit(**{"recipes/new.yaml": recipe(5)})
    assert between(recipes, before, after) == {"recipes/old.yaml": "deleted", "recipes/new.yaml": "added"}


def test_a_model_folder_that_a_recipe_names_is_part_of_it(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/a.yaml": recipe(2), "recipes/deep/b.yaml": recipe(3, folder="../..")})
    config = json.loads((recipes.folder / BASE / "config.json").read_text())
    after = recipes.commit(**{f"{BASE}/config.json": json.dumps(config | {"rope_theta": 5e5})})
    found = changes_between(Repository(recipes.folder), before, after, GLOBS)
    assert to_build(found) == ["recipes/a.yaml", "recipes/deep/b.yaml"]
    assert all(BASE in change.why for change in found)


@pytest.mark.parametrize("made", ["link", "broken link", "folder", "submodule"])
def test_only_ordinary_files_are_recipes(recipes: Recipes, tmp_path: Path, made: str) -> None:
    outside = tmp_path / "outside.yaml"
    outside.write_text(recipe(2))
    before = recipes.commit(**{"recipes/readme.md": "x"})
    target = recipes.folder / "recipes/a.yaml"
    if made in ("link", "broken link"):
        target.symlink_to(outside if made == "link" else tmp_path / "nothing")
    elif made == "folder":
        recipes.write("recipes/a.yaml/readme.txt", recipe(2))
    else:
        Recipes(target, models=False).commit(x="y")
    assert between(recipes, before, recipes.commit()) == {}


def test_odd_file_names_are_read(recipes: Recipes) -> None:
    names = ["recipes/with space.yaml", "recipes/ünï.yaml", 'recipes/"quoted".yaml', "recipes/new\nline.yaml",
             "recipes/-rf.yaml", "recipes/a,b.yaml"]  # fmt: skip
    before = recipes.commit()
    assert sorted(between(recipes, before, recipes.commit(**dict.fromkeys(names, recipe(2))))) == sorted(names)


def test_a_broken_recipe_is_reported_each_time_it_changes(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/a.yaml": "base_model: a/b\n"})
    after = recipes.commit(**{"recipes/a.yaml": "base_model: a/b\n# still without experts\n"})
    [change] = changes_between(Repository(recipes.folder), before, after, GLOBS)
    assert change.kind == "changed" and change.file is not None and change.file.error is not None


# --------------------------------------------------------------------------------------------------- recipes by their content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_model: a/b\nexperts: []\n", True),
        ("experts: []\n", True),
        ("base_model: a/b\n", True),
        ("base_model: [unclosed\n", True),
        ("base_model: &x a/b\nexperts: *x\n", True),
        ("on: push\njobs: {}\n", False),
        ("jobs: [unclosed\n", False),
        ("- base_model\n- experts\n", False),
        ("text: the base_model key\n", False),
        ("", False),
        ("\x00\x01", False),
        ("models:\n  - experts: 3\n", False),
    ],
)
def test_a_file_is_a_recipe_by_its_keys_even_where_it_is_broken(text: str, expected: bool) -> None:
    assert is_recipe(text.encode()) is expected


@pytest.mark.parametrize(
    ("patterns", "path", "expected"),
    [
        (GLOBS, "recipes/a.yaml", True),
        (GLOBS, "recipes/deep/er/a.yml", True),
        (GLOBS, "other/recipes/a.yaml", False),
        (GLOBS, "recipes/a.json", False),
        (["**/*.yaml"], "a.yaml", True),
        (["**"], "x/y", True),
        (["recipes/*"], "recipes/x/y", False),
        (["./recipes/[ab]?.yaml"], "recipes/b1.yaml", True),
        (["recipes/[!ab].yaml"], "recipes/b.yaml", False),
        (["**/*.yaml", "!**/draft-*"], "recipes/draft-1.yaml", False),
        (["recipes/a[1].yaml"], "recipes/a[1].yaml", True),
        (["recipes/a+b (c).yaml"], "recipes/a+b (c).yaml", True),
    ],
)
def test_globs(patterns: list[str], path: str, expected: bool) -> None:
    assert matcher(patterns)(path) is expected


def test_a_glob_that_cannot_be_meant_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="glob"):
        matcher(["recipes/[z-a].yaml"])


# ------------------------------------------------------------------------------------------------------------------- events


def test_the_first_push_builds_every_recipe(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2), "elsewhere/b.yaml": recipe(3), "recipes/ci.yaml": "on: push"})
    changes, why = of_event(recipes, "push", push(ZEROS, head))
    assert to_build(changes) == ["recipes/a.yaml"]
    assert "first push" in why and "every recipe" in why


def test_a_new_branch_is_compared_with_the_default_branch(recipes: Recipes) -> None:
    main_commit = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    recipes.git("update-ref", "refs/remotes/origin/main", main_commit)
    head = recipes.commit(**{"recipes/b.yaml": recipe(3)})
    changes, why = of_event(recipes, "push", push(ZEROS, head, ref="refs/heads/feature"))
    assert to_build(changes) == ["recipes/b.yaml"]
    assert "default branch" in why and main_commit[:9] in why


def test_after_a_force_push_the_commit_before_counts_where_it_is_known(recipes: Recipes) -> None:
    first = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    before = recipes.commit(**{"recipes/b.yaml": recipe(3)})
    recipes.git("reset", "--quiet", "--hard", first)
    head = recipes.commit(**{"recipes/b.yaml": recipe(3, comment="the same again"), "recipes/c.yaml": recipe(4)})
    changes, _ = of_event(recipes, "push", push(before, head, forced=True))
    assert to_build(changes) == ["recipes/c.yaml"]


def test_after_a_force_push_from_an_unknown_commit_every_recipe_counts_and_it_is_said(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3)})
    changes, why = of_event(recipes, "push", push("1" * 40, head, forced=True))
    assert to_build(changes) == ["recipes/a.yaml", "recipes/b.yaml"]
    assert "rewritten" in why and "every recipe" in why


def test_a_deleted_branch_leaves_nothing_to_do(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    changes, why = of_event(recipes, "push", push(before, ZEROS, deleted=True))
    assert changes == [] and "deleted" in why


def test_a_pull_request_is_compared_with_where_it_left_its_base(recipes: Recipes) -> None:
    start = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    recipes.git("checkout", "--quiet", "-b", "feature")
    head = recipes.commit(**{"recipes/mine.yaml": recipe(3)})
    recipes.git("checkout", "--quiet", "main")
    base = recipes.commit(**{"recipes/theirs.yaml": recipe(4)})
    recipes.git("merge", "--quiet", "--no-edit", "feature")
    changes, why = of_event(recipes, "pull_request", pull_request(base, head))
    assert to_build(changes) == ["recipes/mine.yaml"]
    assert start[:9] in why


def test_a_pull_request_is_told_from_a_checkout_of_depth_two(recipes: Recipes, tmp_path: Path) -> None:
    recipes.commit(**{"recipes/a.yaml": recipe(2)})
    recipes.commit("so that the history goes further back")
    recipes.git("checkout", "--quiet", "-b", "feature", "HEAD~1")
    recipes.commit()
    head = recipes.commit(**{"recipes/mine.yaml": recipe(3)})
    recipes.git("checkout", "--quiet", "main")
    base = recipes.commit(**{"recipes/theirs.yaml": recipe(4)})
    recipes.git("merge", "--quiet", "--no-edit", "feature")
    shallow = Recipes(tmp_path / "checkout", models=False)
    shallow.git("fetch", "--quiet", "--depth=2", recipes.folder.as_uri(), "main")
    shallow.git("checkout", "--quiet", "FETCH_HEAD")
    changes, _ = of_event(shallow, "pull_request", pull_request(base, head))
    assert to_build(changes) == ["recipes/mine.yaml"]


def test_a_shallow_checkout_fetches_the_commit_before_or_says_how_to_have_it(recipes: Recipes, tmp_path: Path) -> None:
    before = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    head = recipes.commit(**{"recipes/b.yaml": recipe(3)})
    shallow = Recipes(tmp_path / "checkout", models=False)
    shallow.git("fetch", "--quiet", "--depth=1", recipes.folder.as_uri(), "main")
    shallow.git("checkout", "--quiet", "FETCH_HEAD")
    with pytest.raises(UsageError, match="fetch-depth: 0"):
        of_event(shallow, "push", push(before, head))
    recipes.git("config", "uploadpack.allowAnySHA1InWant", "true")
    shallow.git("remote", "add", "origin", recipes.folder.as_uri())
    changes, _ = of_event(shallow, "push", push(before, head))
    assert to_build(changes) == ["recipes/b.yaml"]


def test_a_pull_request_s_commits_are_fetched_where_only_the_base_is_checked_out(
    recipes: Recipes, tmp_path: Path
) -> None:
    base = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    checkout = Recipes(tmp_path / "checkout", models=False)
    checkout.git("remote", "add", "origin", recipes.folder.as_uri())
    checkout.git("fetch", "--quiet", "origin", "main")
    checkout.git("checkout", "--quiet", base)
    recipes.git("checkout", "--quiet", "-b", "feature")
    recipes.commit()
    head = recipes.commit(**{"recipes/mine.yaml": recipe(3)})
    changes, _ = of_event(checkout, "pull_request_target", pull_request(base, head), base)
    assert to_build(changes) == ["recipes/mine.yaml"]
    assert not (checkout.folder / "recipes/mine.yaml").exists()


def test_any_other_event_asks_for_every_matching_recipe(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3)})
    for event in ("workflow_dispatch", "schedule", ""):
        changes, _ = of_event(recipes, event, {}, head)
        assert to_build(changes) == ["recipes/a.yaml", "recipes/b.yaml"]


def test_a_folder_inside_the_repository_may_hold_the_recipes(recipes: Recipes) -> None:
    recipes.commit(**{"sub/recipes/a.yaml": recipe(2, folder="../.."), "recipes/b.yaml": recipe(3)})
    checkout = Repository(recipes.folder / "sub")
    [change] = all_recipes(checkout, "HEAD", GLOBS, "")
    assert change.path == "recipes/a.yaml"


def test_without_a_checkout_it_is_said_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="actions/checkout"):
        Repository(tmp_path)


# -------------------------------------------------------------------------------------------------------------- moerge plan


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = main(["plan", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_plan_says_what_would_be_built_and_why(recipes: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.commit(**{f"recipes/{name}.yaml": recipe(number) for number, name in enumerate("abc", start=2)})
    recipes.write("recipes/a.yaml", recipe(2, comment="new comment"))
    recipes.write("recipes/b.yaml", recipe(6, build={"runner": "gpu-large"}))
    recipes.write("recipes/d.yaml", recipe(7))
    recipes.write("recipes/not-one.yaml", "on: push\n")
    (recipes.folder / "recipes/c.yaml").unlink()
    paths = [recipes.folder / "recipes", recipes.folder / "recipes/c.yaml"]
    code, entries = plan(capsys, *paths, "--base", "HEAD")
    assert code == 0
    found = {Path(entry["recipe"]).stem: (entry["change"], entry["build"], entry["runner"]) for entry in entries}
    assert found == {
        "a": ("unchanged", False, None),
        "b": ("changed", True, "gpu-large"),
        "c": ("deleted", False, None),
        "d": ("added", True, "ubuntu-latest"),
    }
    assert all(entry["why"] for entry in entries)
    code, matrix = plan(capsys, *paths, "--base", "HEAD", "--matrix")
    assert [Path(entry["recipe"]).stem for entry in matrix["include"]] == ["b", "d"]


def test_plan_without_a_base_needs_no_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe(2, release={"repo": "me/Mine-2x7B"}))
    code, [entry] = plan(capsys, path)
    assert (code, entry["name"], entry["change"], entry["build"]) == (0, "Mine-2x7B", "asked", True)


def test_plan_leaves_a_broken_recipe_out_and_returns_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("base_model: a/b\n")
    code, [entry] = plan(capsys, path)
    assert code == 1 and not entry["build"] and entry["errors"][0]["id"] == "missing-key"
    assert plan(capsys, path, "--matrix")[1] == {"include": []}


def test_plan_of_a_file_or_commit_that_is_not_there_is_wrong_use(recipes: Recipes) -> None:
    recipes.commit(**{"recipes/a.yaml": recipe(2)})
    assert main(["plan", str(recipes.folder / "nothing.yaml")]) == 2
    assert main(["plan", str(recipes.folder / "recipes/a.yaml"), "--base", "nowhere"]) == 2
    assert main(["plan", str(recipes.folder / "recipes/a.yaml"), "--base=--output=x"]) == 2
