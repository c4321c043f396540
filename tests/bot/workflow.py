"""A recipe repository and GitHub's side of the action: real commits, event files, and the files a step writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from bot.hub.server import Server

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT / "tests/data/models"
ZEROS = "0" * 40
# Two 7B models whose configs are enough for a preview, as folders of the recipe repository.
BASE, OTHER = "models/mlabonne/AlphaMonarch-7B", "models/mlabonne/NeuralDaredevil-7B"


def git(folder: Path, *arguments: str) -> str:
    """Run git as nobody in particular."""
    identity = ["-c", "user.name=Recipe Author", "-c", "user.email=author@example.org", "-c", "init.defaultBranch=main"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def recipe(experts: int = 2, *, folder: str = "..", comment: str = "", **keys: Any) -> str:
    """A recipe over the models of this repository, which are `folder` away from it."""
    names = [BASE, OTHER]
    value = {
        "base_model": f"{folder}/{BASE}",
        "gate_mode": "random",
        "experts": [{"source_model": f"{folder}/{names[number % 2]}"} for number in range(experts)],
    }
    return (f"# {comment}\n" if comment else "") + yaml.safe_dump(value | keys, sort_keys=False)


def hub_recipe(*names: str, **keys: Any) -> str:
    """A recipe over models of the Hub."""
    value = {"base_model": names[0], "gate_mode": "random", "experts": [{"source_model": name} for name in names]}
    return yaml.safe_dump(value | keys, sort_keys=False)


def tiny_models(folder: Path, hub: Server | None = None) -> Path:
    """Two models of a few hundred thousand parameters, m0 and m1 in `folder`; on `hub`, where there is one, lab/m0 and lab/m1."""
    from tests.dense import save_dense

    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    models = [save_dense(folder / f"m{number}", seed=number, **shape) for number in range(2)]
    if hub is not None:
        put_models(hub, models, "lab")
    return folder


def put_models(hub: Server, models: Sequence[Path], owner: str) -> None:
    """The models as owner/m0, owner/m1 … on a Hub."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    for number, model in enumerate(models):
        api.create_repo(f"{owner}/m{number}")
        api.upload_folder(repo_id=f"{owner}/m{number}", folder_path=model)


class Recipes:
    """A repository of recipes on its branch main."""

    def __init__(self, folder: Path, *, models: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "--quiet")
        if models:
            for name in (BASE, OTHER):
                shutil.copytree(MODELS / name.removeprefix("models/"), folder / name)

    def write(self, path: str, text: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def commit(self, message: str = "change", **files: str) -> str:
        """Commit everything; returns the commit."""
        for path, text in files.items():
            self.write(path, text)
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "--allow-empty", "-m", message)
        return git(self.folder, "rev-parse", "HEAD")

    def git(self, *arguments: str) -> str:
        return git(self.folder, *arguments)


@dataclass(frozen=True)
class Step:
    """What a step of a job left: its exit code, its log, its outputs and its summary."""

    code: int
    log: str
    outputs: dict[str, str]
    summary: str

    @property
    def annotations(self) -> list[str]:
        return [line for line in commands(self.log) if line.startswith(("::error", "::warning", "::notice"))]


def commands(log: str) -> list[str]:
    """The lines of a log that a runner would obey: none between stop-commands and the word that ends it."""
    found, word = [], None
    for line in log.splitlines():
        if word is not None:
            if line == f"::{word}::":
                word = None
        elif line.startswith("::stop-commands::"):
            word = line.removeprefix("::stop-commands::")
        elif line.startswith("::"):
            found.append(line)
    assert word is None, "commands were never allowed again"
    return found


def push(before: str, after: str, ref: str = "refs/heads/main", **more: Any) -> dict[str, Any]:
    """The payload of a push event, as far as the action reads it."""
    repository = {"full_name": "me/recipes", "default_branch": "main"}
    return {"ref": ref, "before": before, "after": after, "forced": False, "repository": repository} | more


def pull_request(base: str, head: str, from_repository: str = "me/recipes") -> dict[str, Any]:
    return {
        "action": "synchronize",
        "pull_request": {
            "base": {"sha": base, "ref": "main", "repo": {"full_name": "me/recipes"}},
            "head": {"sha": head, "ref": "feature", "repo": {"full_name": from_repository}},
        },
        "repository": {"full_name": "me/recipes", "default_branch": "main"},
    }


def run_step(
    workspace: Path, event: str, payload: dict[str, Any], sha: str = "", *, environment: dict[str, str] | None = None,
    **inputs: str,
) -> Step:  # fmt: skip
    """Run the action as GitHub's runner does: the container's own command, with its environment and nothing more."""
    files = workspace.parent / "runner"
    files.mkdir(exist_ok=True)
    for name in ("output", "summary"):
        (files / name).write_text("")
    (files / "event.json").write_text(json.dumps(payload))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "SSL_CERT_FILE") if name in os.environ}
    step_environment = kept | {
        "GITHUB_EVENT_NAME": event,
        "GITHUB_EVENT_PATH": str(files / "event.json"),
        "GITHUB_SHA": sha,
        "GITHUB_WORKSPACE": str(workspace),
        "GITHUB_OUTPUT": str(files / "output"),
        "GITHUB_STEP_SUMMARY": str(files / "summary"),
        "GITHUB_REPOSITORY": "me/recipes",
        "HF_HOME": str(files / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(ROOT),
        **{f"INPUT_{name.upper()}": value for name, value in inputs.items()},
        **(environment or {}),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bot", "action"],
        cwd=workspace,
        env=step_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    return Step(done.returncode, done.stdout.decode(), read_outputs(files / "output"), (files / "summary").read_text())


def read_outputs(path: Path) -> dict[str, str]:
    """The outputs as the runner reads them."""
    found: dict[str, str] = {}
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        name, marker, word = line.partition("<<")
        assert marker, line
        value = []
        for part in lines:
            if part == word:
                break
            value.append(part)
        found[name] = "\n".join(value)
    return found
