"""The action's real entry on real events: what a step writes to GitHub, and what it must never write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from bot.hub.server import Server, running
from bot.inputs import INPUTS, OUTPUTS
from tests.bot.workflow import MODELS, ROOT, ZEROS, Recipes, commands, hub_recipe, pull_request, push, recipe, run_step

SECRET = "hf_" + "NotToBeSeenByAnyone42"
HUB_MODEL = "mlabonne/AlphaMonarch-7B"


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path / "workspace")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Hub with one public model and one private one, both only a config."""
    from huggingface_hub import HfApi

    with running(tmp_path_factory.mktemp("hub")) as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        for name, private in ((HUB_MODEL, False), ("acme/private", True)):
            api.create_repo(name, private=private)
            api.upload_file(
                path_or_fileobj=MODELS / HUB_MODEL / "config.json", path_in_repo="config.json", repo_id=name
            )
        yield server


def writes(hub: Server) -> list[str]:
    return [entry.path for entry in hub.log.all() if entry.method not in ("GET", "HEAD")]


# ---------------------------------------------------------------------------------------------------------------- action.yml


def test_action_yml_is_the_table_in_the_code() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    written = {
        name: (given["description"].strip(), given.get("default", "")) for name, given in action["inputs"].items()
    }
    assert written == {name: (given.description, given.default) for name, given in INPUTS.items()}
    assert {name: given["description"].strip() for name, given in action["outputs"].items()} == OUTPUTS
    for name in (*action["inputs"], *action["outputs"]):
        assert re.fullmatch(r"[a-z_]+", name), f"{name}: a hyphen would stay in the variable's name"
    assert not any(given.get("required") for given in action["inputs"].values())


def test_every_input_and_output_is_in_the_guide() -> None:
    guide = (ROOT / "docs/action.md").read_text(encoding="utf-8")
    for name in (*INPUTS, *OUTPUTS):
        assert f"| `{name}` |" in guide, name


# ------------------------------------------------------------------------------------------------------------------ previews


def test_a_push_is_previewed_with_summary_annotations_and_outputs(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/old.yaml": recipe(2)})
    after = recipes.commit(**{"recipes/new.yaml": recipe(4), "recipes/old.yaml": recipe(2, comment="only a comment")})
    step = run_step(recipes.folder, "push", push(before, after), after)
    assert step.code == 0, step.log
    assert set(step.outputs) == set(OUTPUTS)
    assert json.loads(step.outputs["changed"]) == ["recipes/new.yaml"]
    assert json.loads(step.outputs["matrix"])["include"][0]["name"] == "new"
    assert step.outputs["previews"] == "moerge-out/previews.json"
    [preview] = json.loads((recipes.folder / step.outputs["previews"]).read_text())
    assert preview["parameters"]["total"] == 24_153_690_112
    assert step.outputs["errors"] == "0" and int(step.outputs["warnings"]) > 0
    assert any(line.startswith("::warning file=recipes/new.yaml,line=") for line in step.annotations)
    assert "24.15 B" in step.summary and before[:9] in step.summary
    assert "old.yaml" not in step.summary


def test_when_nothing_changed_the_job_is_green_and_says_so(recipes: Recipes) -> None:
    before = recipes.commit(**{"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3)})
    recipes.git("mv", "recipes/b.yaml", "recipes/c.yaml")
    after = recipes.commit(**{"recipes/a.yaml": recipe(2, comment="new")})
    for command in ("preview", "plan", "build"):
        step = run_step(recipes.folder, "push", push(before, after), after, command=command)
        assert step.code == 0
        assert step.outputs["changed"] == "[]" and json.loads(step.outputs["matrix"]) == {"include": []}
        assert "Nothing to do" in step.summary
        assert "recipes/c.yaml" in step.summary and "renamed" in step.summary


def test_a_recipe_s_errors_are_annotations_at_their_lines_and_the_job_fails(recipes: Recipes) -> None:
    before = recipes.commit()
    after = recipes.commit(
        **{"recipes/bad.yaml": "base_model: a/b\nexperts:\n- source_modle: a/b\n", "recipes/good.yaml": recipe(2)}
    )
    step = run_step(recipes.folder, "push", push(before, after), after)
    assert step.code == 1
    assert any(
        re.match(r"::error file=recipes/bad\.yaml,line=3,title=unknown-key::", line) for line in step.annotations
    )
    assert "14.16 B" not in step.summary.split("bad.yaml")[0]
    assert {preview["name"] for preview in json.loads((recipes.folder / "moerge-out/previews.json").read_text())} == {
        "bad",
        "good",
    }
    assert int(step.outputs["errors"]) >= 1


def test_workflow_dispatch_takes_globs_and_an_empty_input_means_all(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2), "recipes/b.yaml": recipe(3), "other/c.yml": recipe(4)})
    inputs = {"": ["recipes/a.yaml", "recipes/b.yaml"], "other/*.yml": ["other/c.yml"],
              "recipes/**, !recipes/a.yaml": ["recipes/b.yaml"], "recipes/b.yaml": ["recipes/b.yaml"]}  # fmt: skip
    for given, expected in inputs.items():
        step = run_step(
            recipes.folder, "workflow_dispatch", {"inputs": {"recipes": given}}, head, recipes=given, command="plan"
        )
        assert (step.code, json.loads(step.outputs["changed"])) == (0, expected)


def test_a_checkout_in_a_folder_of_the_workspace(tmp_path: Path) -> None:
    repository = Recipes(tmp_path / "workspace/checkout")
    head = repository.commit(**{"recipes/a.yaml": recipe(2)})
    workspace = tmp_path / "workspace"
    step = run_step(workspace, "push", push(ZEROS, head), head, working_directory="checkout", out="previews")
    assert step.code == 0
    assert (workspace / "previews/previews.json").is_file()
    assert any("file=checkout/recipes/a.yaml" in line for line in step.annotations)
    outside = run_step(workspace, "push", push(ZEROS, head), head, working_directory="..")
    assert outside.code == 2 and "inside the workspace" in outside.annotations[0]


def test_wrong_inputs_are_one_annotation_and_exit_code_two(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    wrong = (
        {"command": "publish"},
        {"publish": "yes please"},
        {"device": "tpu"},
        {"hub_endpoint": "file:///etc"},
        {"recipes": "[z-a]"},
    )
    for inputs in wrong:
        step = run_step(recipes.folder, "push", push(ZEROS, head), head, **inputs)
        assert step.code == 2 and len(step.annotations) == 1, inputs


# -------------------------------------------------------------------------------------------------------------- the matrix


def test_plan_emits_a_matrix_and_leaves_the_broken_out(recipes: Recipes) -> None:
    before = recipes.commit()
    files = {
        "recipes/a.yaml": recipe(2, build={"runner": "gpu"}),
        "recipes/b.yaml": recipe(3),
        "recipes/bad.yaml": "experts: 3\n",
    }
    after = recipes.commit(**files)
    step = run_step(recipes.folder, "push", push(before, after), after, command="plan", runner="gpu-small")
    assert step.code == 1  # what is broken is not silently left out
    same = {"repo": "", "gpu": True, "job": ""}
    assert json.loads(step.outputs["matrix"]) == {"include": [
        {"recipe": "recipes/a.yaml", "name": "a", "runner": "gpu", **same},
        {"recipe": "recipes/b.yaml", "name": "b", "runner": "gpu-small", **same},
    ]}  # fmt: skip
    assert step.outputs["previews"] == "" and not (recipes.folder / "moerge-out").exists()


def test_a_matrix_has_at_most_256_jobs_and_what_is_over_is_said(recipes: Recipes) -> None:
    head = recipes.commit(**{f"recipes/{number:03}.yaml": recipe(2) for number in range(260)})
    step = run_step(recipes.folder, "push", push(ZEROS, head), head, command="plan")
    assert step.code == 0
    assert len(json.loads(step.outputs["matrix"])["include"]) == 256
    assert len(json.loads(step.outputs["changed"])) == 260
    assert any("4 recipes are not in the matrix" in line for line in step.annotations)


def test_a_pull_request_does_not_choose_its_runner(recipes: Recipes) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": recipe(2, build={"runner": "self-hosted"})})
    step = run_step(recipes.folder, "pull_request", pull_request(base, head), head, command="plan")
    assert [entry["runner"] for entry in json.loads(step.outputs["matrix"])["include"]] == ["ubuntu-latest"]


# ----------------------------------------------------------------------------------------------------------- pull requests


def test_a_pull_request_is_previewed_from_the_hub_and_nothing_is_written(recipes: Recipes, hub: Server) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": hub_recipe(HUB_MODEL, HUB_MODEL, release={"repo": "me/Mine"})})
    asked = len(writes(hub))
    step = run_step(
        recipes.folder, "pull_request", pull_request(base, head), head,
        command="build", hub_endpoint=hub.endpoint, token=hub.token(),
    )  # fmt: skip
    assert step.code == 0, step.log
    assert any("only previewed" in line for line in step.annotations)
    assert json.loads((recipes.folder / step.outputs["previews"]).read_text())[0]["parameters"]["total"] > 1e10
    assert step.outputs["published"] == "[]" and writes(hub)[asked:] == []
    assert sorted(path.name for path in (recipes.folder / "moerge-out").iterdir()) == ["previews.json"]


def test_a_pull_request_may_name_no_local_folder_and_a_push_only_ones_inside_the_repository(recipes: Recipes) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    step = run_step(recipes.folder, "pull_request", pull_request(base, head), head)
    assert step.code == 1 and any("title=local-not-allowed" in line for line in step.annotations)
    for outside in ("/etc", "../..", "../models/../../runner"):
        after = recipes.commit(**{"recipes/b.yaml": hub_recipe(outside, outside)})
        step = run_step(recipes.folder, "push", push(head, after), after)
        assert step.code == 1 and any("title=local-not-allowed" in line for line in step.annotations), outside
    (recipes.folder / "recipes/escape").symlink_to("/etc")
    after = recipes.commit(**{"recipes/b.yaml": hub_recipe("./escape", "./escape")})
    step = run_step(recipes.folder, "push", push(head, after), after)
    assert step.code == 1 and any("title=local-not-allowed" in line for line in step.annotations)


def test_a_fork_s_pull_request_is_read_without_any_token(recipes: Recipes, hub: Server) -> None:
    base = recipes.commit()
    head = recipes.commit(**{"recipes/a.yaml": hub_recipe("acme/private", "acme/private")})
    given = {"hub_endpoint": hub.endpoint, "token": hub.token()}
    environment = {"HF_TOKEN": hub.token()}
    own = run_step(recipes.folder, "pull_request", pull_request(base, head), head, environment=environment, **given)
    assert own.code == 0, own.log
    for event in ("pull_request", "pull_request_target"):
        payload = pull_request(base, head, "stranger/recipes")
        step = run_step(recipes.folder, event, payload, head, environment=environment, **given)
        assert step.code == 4 and any("title=source-unavailable" in line for line in step.annotations)


# ------------------------------------------------------------------------------------------------------------------ safety

HOSTILE = (
    "x]\n::error::owned%0A::set-output name=a::b\r\n::add-mask::e <img src=x> @someone | `a` ## h https://evil.example"
)


def test_text_from_recipes_is_never_a_command_a_property_or_markup(recipes: Recipes) -> None:
    before = recipes.commit()
    name = "recipes/a,line=9:::error::b%0A.yaml"
    hostile = yaml.safe_dump(
        {"base_model": HOSTILE, HOSTILE: 1, "gate_mode": HOSTILE, "experts": [{"source_model": "a/b", HOSTILE: 2}]}
    )
    after = recipes.commit(**{name: hostile, "recipes/broken.yaml": f"base_model: [\n::error::owned {HOSTILE}"})
    step = run_step(recipes.folder, "push", push(before, after), after)
    assert step.code == 1
    known = ("::error file=", "::warning file=")
    for line in commands(step.log):
        assert line.startswith(known), line
        properties = line.removeprefix("::").partition("::")[0].split(" ", 1)[1]
        assert {item.split("=")[0] for item in properties.split(",")} <= {"file", "line", "title"}, line
        assert properties.startswith(
            ("file=recipes/a%2Cline=9%3A%3A%3Aerror%3A%3Ab%250A.yaml,", "file=recipes/broken.yaml,")
        )
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(step.summary)
    assert "<img" not in html and "<a " not in html and "<h1" not in html
    assert not re.search(r"@\w", re.sub(r"<code>.*?</code>", "", html))


def test_the_token_is_masked_first_and_never_printed(recipes: Recipes, hub: Server) -> None:
    before = recipes.commit()
    after = recipes.commit(**{"recipes/a.yaml": hub_recipe("nobody/nothing", HUB_MODEL)})
    for inputs, environment in (({"token": SECRET}, {}), ({}, {"HF_TOKEN": SECRET})):
        step = run_step(
            recipes.folder, "push", push(before, after), after,
            environment={"RUNNER_DEBUG": "1", **environment}, hub_endpoint=hub.endpoint, **inputs,
        )  # fmt: skip
        assert step.log.splitlines()[0] == f"::add-mask::{SECRET}"
        rest = step.log.split("\n", 1)[1] + step.summary + json.dumps(step.outputs)
        assert SECRET not in rest
        assert step.code == 4


def test_at_most_ten_annotations_of_a_level_and_the_rest_are_in_the_log(recipes: Recipes) -> None:
    before = recipes.commit()
    keys = "".join(f"wrong_{number}: 1\n" for number in range(30))
    after = recipes.commit(**{"recipes/a.yaml": f"{keys}base_model: a/b\nexperts: []\n"})
    step = run_step(recipes.folder, "push", push(before, after), after)
    errors = [line for line in step.annotations if line.startswith("::error")]
    assert len(errors) == 10 and "in the log" in errors[-1]
    assert all(len(line.partition("::")[2]) < 4200 for line in errors)
    assert "wrong_29" in step.log and "wrong_29" in step.summary
    assert int(step.outputs["errors"]) > 30


def test_a_summary_stays_under_one_mebibyte(tmp_path: Path) -> None:
    from bot.workflow_commands import SUMMARY_BYTES, Summary

    path = tmp_path / "summary"
    summary = Summary(path)
    for number in range(300):
        summary.add(f"### {number}\n\n" + "é" * 5000)
    summary.write()
    text = path.read_bytes()
    assert SUMMARY_BYTES - 20_000 < len(text) < SUMMARY_BYTES
    assert b"more sections are left out" in text[-200:]


def test_an_output_cannot_end_itself_early(tmp_path: Path) -> None:
    from bot.workflow_commands import write_output
    from tests.bot.workflow import read_outputs

    path = tmp_path / "output"
    path.touch()
    hostile = "a\nend\nmatrix<<end\nowned\nend"
    write_output(path, "model_url", hostile)
    write_output(path, "changed", "[]")
    assert read_outputs(path) == {"model_url": hostile, "changed": "[]"}


def test_an_out_that_is_a_file_is_the_destination_s_failure(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    (recipes.folder / "moerge-out").write_text("a file where a folder should be")
    step = run_step(recipes.folder, "push", push(ZEROS, head), head)
    assert step.code == 4 and any("input `out`" in line for line in step.annotations)


def test_a_bug_of_ours_is_called_so_and_the_traceback_is_only_for_debug_logging(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    broken = recipes.folder.parent / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import bot.preview\nbot.preview.plan_recipe = lambda *_: 1 / 0\n")
    for debug in ("0", "1"):
        environment = {"RUNNER_DEBUG": debug, "PYTHONPATH": f"{broken}:{ROOT}"}
        step = run_step(recipes.folder, "push", push(ZEROS, head), head, environment=environment)
        assert step.code == 5
        assert step.annotations[0].startswith("::error title=moerge::A bug in moerge, not in your recipe")
        assert ("Traceback" in step.log) is (debug == "1")


def test_the_preview_loads_no_torch(recipes: Recipes) -> None:
    head = recipes.commit(**{"recipes/a.yaml": recipe(2)})
    for module in ("torch", "transformers", "xllamacpp"):
        (recipes.folder.parent / "blocked").mkdir(exist_ok=True)
        (recipes.folder.parent / "blocked" / f"{module}.py").write_text("raise SystemExit('imported')")
    path = f"{recipes.folder.parent / 'blocked'}:{ROOT}"
    assert run_step(recipes.folder, "push", push(ZEROS, head), head, environment={"PYTHONPATH": path}).code == 0
