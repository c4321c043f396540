"""The action's inputs and outputs: one table, which action.yml repeats, and their values for one run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bot.changes import DEFAULT_GLOBS
from bot.events import Event, read_event
from merge.errors import UsageError
from merge.hub import Hub, header_cache
from merge.sources import Sources

if TYPE_CHECKING:
    from bot.github.client import GitHub

COMMANDS = ("preview", "plan", "build", "collect", "comment", "reply")
TOKENS = ("INPUT_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
GITHUB_TOKENS = ("INPUT_GITHUB_TOKEN", "GITHUB_TOKEN")
# Seconds for which a job believes an earlier one about what a source's branch means. A build asks anew.
RECENT = 300.0
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Input:
    """An input of the action."""

    description: str
    default: str = ""


INPUTS = {
    "command": Input(
        "What to do: `preview` shows what changed recipes would give, `plan` emits a matrix of the recipes to build, "
        "`build` builds and publishes them. For a pull request `build` previews and writes nothing to the Hub. "
        "`collect` ends a run of several jobs: summary, releases and statuses on GitHub. `comment` obeys a comment like "
        "`/moerge build recipes/x.yaml`, `reply` answers it.",
        "preview",
    ),
    "recipes": Input(
        "Globs of recipe files, one per line or separated by commas; `!` leaves out. A YAML file is a recipe when it has "
        "base_model and experts.",
        "\n".join(DEFAULT_GLOBS) + "\n",
    ),
    "token": Input(
        "A Hugging Face token: to read gated and private models, and to publish. Not used for pull requests from forks. "
        "Without it the environment's HF_TOKEN is used."
    ),
    "github_token": Input(
        "The job's own token for GitHub, with the permissions that the workflow gives it.", "${{ github.token }}"
    ),
    "expected": Input("For `collect` and `reply`: the plan's output `matrix`, to tell whose result is missing."),
    "hub_endpoint": Input("URL of another Hub than huggingface.co. Without it the environment's HF_ENDPOINT is used."),
    "working_directory": Input("Folder of the recipe repository's checkout, inside the workspace.", "."),
    "comment": Input(
        "Whether a pull request gets a comment with its preview and a check run with every finding at its line: true or "
        "false. It needs github_token with pull-requests: write and checks: write.",
        "true",
    ),
    "strict": Input("Whether a warning fails a preview as an error does: true or false.", "false"),
    "cache": Input(
        "Folder, relative to the workspace, for what models' headers said, to be kept from job to job (actions/cache). "
        "Commits never change, so a second preview asks the Hub only whether there are new ones, and within five minutes not even that."
    ),
    "out": Input("Folder for previews.json and for builds, relative to the workspace.", "moerge-out"),
    "device": Input("Where forward passes of a build run: auto, cpu or cuda. Without it the recipe decides."),
    "publish": Input("Whether `build` publishes what it built: true or false.", "true"),
    "runner": Input(
        "Where recipes are built that name no build.runner of their own: labels of a runner, or a Hugging Face Job as "
        "hf-jobs:FLAVOR:TIME.",
        "ubuntu-latest",
    ),
    "job_image": Input("The build image, for recipes that are built in a Hugging Face Job."),
    "job_namespace": Input(
        "Who pays for Hugging Face Jobs: a user or an organisation; the token's own user where empty."
    ),
}

OUTPUTS = {
    "changed": "JSON list of the paths of the recipes that are to be built; `[]` when there is nothing to do.",
    "matrix": 'GitHub matrix of the recipes to build: {"include": [{"recipe", "name", "runner", "repo", "gpu", "job"}]}, the 256 most urgent.',
    "previews": "Path of a JSON file, relative to the workspace, with one object per previewed recipe.",
    "errors": "Number of errors found in recipes and builds.",
    "warnings": "Number of warnings found in recipes.",
    "published": "JSON list of the releases on the Hub: recipe, repo, url, commit, gguf_repo and changed.",
    "model_url": "Address of the published model; of the last one where there are several.",
}


@dataclass(frozen=True)
class GitHubAccess:
    """The recipe repository on GitHub, and the token that reads and writes there."""

    repository: str
    token: str = field(repr=False)
    api: str

    def client(self) -> GitHub:
        """A client of it; no request is made yet."""
        from bot.github.client import GitHub

        return GitHub(self.repository, self.token, self.api)


@dataclass(frozen=True)
class Settings:
    """All that one run of the action was given, decided once."""

    command: str
    globs: tuple[str, ...]
    token: str | None
    endpoint: str | None
    folder: Path
    workspace: Path
    out: Path
    device: str | None
    publish: bool
    runner: str
    job_image: str | None
    job_namespace: str | None
    github: GitHubAccess | None
    comment: bool
    strict: bool
    cache: Path | None
    expected: str
    run_url: str | None
    event: Event
    summary_file: Path | None
    output_file: Path | None
    debug: bool

    def shown(self, path: Path) -> str:
        """A path as later steps can use it: relative to the workspace, which in a container has another place."""
        return str(path.relative_to(self.workspace)) if path.is_relative_to(self.workspace) else str(path)

    def sources(self, recipe: str, hub: Hub | None = None) -> Sources:
        """Where the models of a recipe come from: the Hub, or folders of its repository unless it is a pull request's."""
        return Sources(
            (self.folder / recipe).parent,
            endpoint=self.endpoint,
            token=self.token,
            allow_local=not self.event.is_pull_request,
            local_root=self.folder,
            hub=hub,
        )

    def preview_sources(self, recipe: str) -> Sources:
        """The same, where only headers are asked for: all recipes share one Hub, whose answers are kept."""
        return self.sources(recipe, self._preview_hub)

    @cached_property
    def _preview_hub(self) -> Hub:
        return Hub(self.endpoint, self.token, self.cache or header_cache(), RECENT if self.cache else 0.0)

    @property
    def inside(self) -> str:
        """The folder of the workspace that recipes' paths begin at; without a checkout, of the repository."""
        return str(self.folder.relative_to(self.workspace))

    @property
    def scope(self) -> tuple[str, ...]:
        """What tells this preview from another one of the same pull request; empty where it is the only one."""
        said = (*self.globs, self.inside)
        return () if said == (*DEFAULT_GLOBS, ".") else said

    def prepare_client(self) -> None:
        """Take the tokens out of the environment: they are passed per call, and no library or process finds them there.

        For a fork's pull request the Hub's client may not look for a token by itself either.
        """
        for name in (*TOKENS, *GITHUB_TOKENS):
            os.environ.pop(name, None)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if self.event.is_from_fork:
            os.environ.update(HF_HUB_DISABLE_IMPLICIT_TOKEN="1")  # noqa: S106  (a switch, not a password)
            os.environ.pop("HF_OIDC_RESOURCE", None)


def tokens(environment: Mapping[str, str]) -> list[str]:
    """Every secret of the environment that this action knows of."""
    return [value for name in (*TOKENS, *GITHUB_TOKENS) if (value := environment.get(name, "").strip())]


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings of this run from INPUT_* and GITHUB_*. Raises UsageError."""
    event_file = environment.get("GITHUB_EVENT_PATH")
    event = read_event(
        environment.get("GITHUB_EVENT_NAME", ""),
        Path(event_file) if event_file else None,
        environment.get("GITHUB_SHA", ""),
    )
    workspace = Path(environment.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()
    folder = (workspace / _input(environment, "working_directory")).resolve()
    # Without a checkout the folder is on GitHub alone.
    if not folder.is_relative_to(workspace) or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"input working_directory: {folder} is not a folder inside the workspace {workspace}")
    endpoint = _input(environment, "hub_endpoint") or environment.get("HF_ENDPOINT", "").strip()
    if endpoint and not endpoint.startswith(("https://", "http://")):
        raise UsageError("input hub_endpoint must be a URL that begins with https://")
    known = [value for name in TOKENS if (value := environment.get(name, "").strip())]
    return Settings(
        command=_choice(environment, "command", COMMANDS),
        globs=_globs(_input(environment, "recipes")),
        token=known[0] if known and not event.is_from_fork else None,
        endpoint=endpoint.rstrip("/") or None,
        folder=folder,
        workspace=workspace,
        out=workspace / _input(environment, "out"),
        device=_choice(environment, "device", ("", *DEVICES)) or None,
        publish=_choice(environment, "publish", ("true", "false")) == "true",
        runner=_input(environment, "runner"),
        job_image=_input(environment, "job_image") or None,
        job_namespace=_input(environment, "job_namespace") or None,
        github=_github(environment),
        comment=_choice(environment, "comment", ("true", "false")) == "true",
        strict=_choice(environment, "strict", ("true", "false")) == "true",
        cache=workspace / cache if (cache := _input(environment, "cache")) else None,
        expected=_input(environment, "expected"),
        run_url=_run_url(environment),
        event=event,
        summary_file=_path(environment, "GITHUB_STEP_SUMMARY"),
        output_file=_path(environment, "GITHUB_OUTPUT"),
        debug=environment.get("RUNNER_DEBUG") == "1",
    )


def _github(environment: Mapping[str, str]) -> GitHubAccess | None:
    repository = environment.get("GITHUB_REPOSITORY", "")
    token = next((value for name in GITHUB_TOKENS if (value := environment.get(name, "").strip())), None)
    if token is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    return GitHubAccess(repository, token, environment.get("GITHUB_API_URL") or "https://api.github.com")


def _run_url(environment: Mapping[str, str]) -> str | None:
    """The address of this run of a workflow."""
    parts = [environment.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")]
    return f"{parts[0]}/{parts[1]}/actions/runs/{parts[2]}" if all(parts) else None


def _input(environment: Mapping[str, str], name: str) -> str:
    """An input's value. An empty one is its default: `${{ inputs.x }}` is empty on events that have no inputs."""
    return environment.get(f"INPUT_{name.upper()}", "").strip() or INPUTS[name].default.strip()


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = _input(environment, name).lower()
    if value not in choices:
        raise UsageError(f"input {name} is {value!r}; it must be one of {', '.join(filter(None, choices))}")
    return value


def _globs(text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A whole line counts as well as its parts: the path of a single recipe may have a comma.
    parts = [part.strip() for line in lines if "," in line for part in line.split(",")]
    return tuple(dict.fromkeys(pattern for pattern in (*lines, *parts) if pattern))


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    value = environment.get(name)
    return Path(value) if value else None
