"""`moerge init`: a repository that works as it is, and whose workflows the linters find nothing in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from bot.cli import main
from bot.hub.server import running
from bot.init.source import _GITHUB
from tests.bot.workflow import MODELS, ZEROS, Recipes, push, run_step

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MOERGE = f"acme/moerge@{COMMIT}"
SMOL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
PLACES = {
    "README.md", ".gitignore", "recipes/first-moe.yaml", ".moerge/recipe.schema.json", ".github/dependabot.yml",
    ".github/workflows/preview.yml", ".github/workflows/build.yml", ".github/workflows/comment.yml",
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "my-models"
    assert main(["init", str(folder), "--moerge", MOERGE, "--owner", "acme", "--runner", "self-hosted, gpu"]) == 0
    capsys.readouterr()
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_leaves_the_promised_files_and_no_hole_unfilled(made: Path) -> None:
    assert files(made) == PLACES
    for path in files(made):
        assert not re.search(r"@[A-Z]+@", (made / path).read_text()), path


def test_every_workflow_calls_one_commit_and_no_job_has_more_rights_than_it_names(made: Path) -> None:
    for path in (made / ".github/workflows").iterdir():
        text = path.read_text()
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {}
        for used in re.findall(r"\buses: (\S+)", text):
            assert re.search(r"@[0-9a-f]{40}$", used), used
            assert not used.startswith("acme/") or used.endswith(f"@{COMMIT}")
        for job in workflow["jobs"].values():
            assert job["permissions"]
    preview = yaml.safe_load((made / ".github/workflows/preview.yml").read_text())["jobs"]["preview"]
    assert preview["permissions"] == {"contents": "read", "pull-requests": "write", "checks": "write"}
    assert len(preview["steps"]) == 1  # no checkout, nothing that runs


def test_a_call_of_the_reusable_workflow_gives_it_what_its_jobs_need_and_only_inputs_it_has(
    made: Path, root: Path
) -> None:
    called = yaml.safe_load((root / ".github/workflows/build.yml").read_text())
    needed: set[tuple[str, str]] = set()
    for job in called["jobs"].values():
        needed |= {(name, level) for name, level in job["permissions"].items() if level == "write"}
    inputs = called[True]["workflow_call"]["inputs"]
    for name in ("build", "comment"):
        job = yaml.safe_load((made / f".github/workflows/{name}.yml").read_text())["jobs"]["build"]
        assert set(job["permissions"].items()) == needed
        assert set(job["with"]) <= set(inputs)


def test_the_reusable_workflow_gives_the_action_inputs_that_it_has(root: Path) -> None:
    from bot.inputs import COMMANDS, INPUTS

    text = (root / ".github/workflows/build.yml").read_text()
    given = re.findall(r"^ +INPUT_([A-Z_]+): (.*)$", text, re.MULTILINE)
    assert {name.lower() for name, _ in given} <= set(INPUTS)
    assert {value for name, value in given if name == "COMMAND"} <= set(COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        ["zizmor", "--offline", "--quiet", "--pedantic", "."],
        ["actionlint"],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", "WORKFLOWS"],
        ["check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml"],
        ["check-jsonschema", "--schemafile", ".moerge/recipe.schema.json", "recipes/first-moe.yaml"],
    ],
    ids=lambda command: " ".join(command[:1]),
)
def test_the_linters_find_nothing(command: list[str], made: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=made, check=True)
    workflows = sorted(str(path) for path in (made / ".github/workflows").iterdir())
    arguments = [part for word in command for part in (workflows if word == "WORKFLOWS" else [word])]
    tool = Path(sys.executable).with_name(arguments[0])
    done = subprocess.run([tool, *arguments[1:]], cwd=made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_recipe_passes_the_preview_and_is_what_a_first_push_builds(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((made / "recipes/first-moe.yaml").read_text())
    assert recipe["gate_mode"] == "discriminant"
    first = (made / "recipes/first-moe.yaml").read_text().splitlines()[0]
    schema = made / "recipes" / first.partition("$schema=")[2]
    assert first.startswith("# yaml-language-server: ") and json.loads(schema.read_text())["title"] == "moerge recipe"
    with running(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token())
        for name in SMOL:
            api.create_repo(name)
            api.upload_folder(repo_id=name, folder_path=MODELS / name)
            card = b"---\nlicense: apache-2.0\n---\n"
            api.upload_file(repo_id=name, path_or_fileobj=card, path_in_repo="README.md")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        assert main(["preview", str(made / "recipes/first-moe.yaml"), "--json"]) == 0
        [preview] = json.loads(capsys.readouterr().out)
        # Only what comes of the models' weights not being here.
        assert {finding["id"] for finding in preview["findings"]} <= {"headers-missing"}
        assert preview["name"] == "first-moe" and 180e6 < preview["parameters"]["total"] < 230e6
        repository = Recipes(made, models=False)
        head = repository.commit()
        step = run_step(made, "push", push(ZEROS, head), head, command="plan", runner="self-hosted, gpu")
        assert step.code == 0, step.log
        [entry] = json.loads(step.outputs["matrix"])["include"]
        assert entry["repo"] == "acme/first-moe" and entry["runner"] == ["self-hosted", "gpu"]


def test_a_folder_with_something_in_it_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        assert main(["init", str(tmp_path / name), "--moerge", MOERGE]) == 2
    assert "mine.txt" in capsys.readouterr().err
    assert files(tmp_path) == {"full/mine.txt", "file"}


def test_an_empty_clone_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path / "clone"], check=True)
    assert main(["init", str(tmp_path / "clone"), "--moerge", MOERGE]) == 0


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    write = Path.write_text

    def full(path: Path, *arguments: object, **options: object) -> int:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["init", str(tmp_path / "new"), "--moerge", MOERGE]) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["--moerge", "acme/moerge@v0"], ["--moerge", f"acme@{COMMIT}"], ["--moerge", f"a/b\n@{COMMIT}"],
        ["--owner", "a/b"], ["--owner", "${{ github.token }}"], ["--runner", ","], ["--runner", 'x"\n    evil: 1'],
        ["--runner", "hf-jobs:a10g:soon"],
    ],
)  # fmt: skip
def test_wrong_options_are_wrong_use_and_reach_no_file(wrong: list[str], tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "new"), "--moerge", MOERGE, *wrong]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/acme/moerge.git", "acme/moerge"),
        ("git+https://token@github.com/acme/moerge", "acme/moerge"),
        ("git@github.com:acme/moerge.git", "acme/moerge"),
        ("ssh://git@github.com/acme/moerge", "acme/moerge"),
        ("https://example.org/acme/moerge", None),
        ("https://github.com.example.org/acme/moerge", None),
    ],
)
def test_a_checkout_s_origin_names_its_repository(url: str, name: str | None) -> None:
    found = _GITHUB.fullmatch(url)
    assert (found[1] if found else None) == name
