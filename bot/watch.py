"""The bot without Actions: looks at a repository on GitHub, previews its pull requests and builds its default branch.

Each piece of work is a `moerge action` of its own, the very program that GitHub Actions would run, told of the event in the
same way. What is done stands in DIR/watch.json: a watcher that was killed goes on where it was, and a build with it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bot.collect import OUTCOMES
from bot.git import NO_COMMIT
from bot.polling import Pause, Poller
from bot.workflow_commands import read_outputs
from merge.errors import JobError, RecipeError, SourceError, UsageError
from merge.files import write_atomically, writing
from merge.findings import printable

ROOT = Path(__file__).parents[1]
STATE = "watch.json"
FORMAT = 1
OPEN_PULLS = "/pulls?state=open&sort=updated&direction=desc&per_page=100"
# Work whose source or destination failed is tried again, after a minute, then two, four, and so on.
ATTEMPTS = 4
RETRY_SECONDS = 60.0
STOP_SECONDS = 30.0
TICK_SECONDS = 0.2
UNREACHABLE, RECIPE_ERROR = JobError.exit_code, RecipeError.exit_code
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Options:
    """What to watch and how: `folder` keeps state, checkout, builds and logs; `interval` is in seconds."""

    repository: str
    folder: Path
    token: str = field(repr=False)
    api: str
    interval: float
    jobs: int
    once: bool
    since: str | None
    device: str | None
    publish: bool
    job_image: str | None


@dataclass
class Work:
    """One `moerge action`: its inputs, the event it is told of, and how often it failed for a reason that may pass."""

    name: str
    command: str
    event: str
    payload: dict[str, Any]
    sha: str
    inputs: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    not_before: float = 0.0
    process: subprocess.Popen[bytes] | None = None


class Watch:
    """One watcher on its folder, which nobody else may hold."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = _read_state(options.folder / STATE, options.repository)
        self.poller = Poller(options.repository, options.token, options.api, self.state["known"])
        self.waiting: list[Work] = []
        self.running: list[Work] = []
        self.stopping = False
        self.next_poll = 0.0
        self.refused = 0

    # -------------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> int:
        """Watch until SIGINT or SIGTERM; with `once` until what there is to do is done. Returns the exit code."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self.stopping:
                self._reap()
                if time.monotonic() >= self.next_poll:
                    self._poll()
                self._start()
                if self.options.once and not self.running and not self.waiting:
                    break
                time.sleep(TICK_SECONDS)
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        return UNREACHABLE if self.options.once and self.refused else 0

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def _poll(self) -> None:
        """Look what is new: two conditional requests, of which an unchanged answer costs nothing."""
        try:
            repository = self.poller.get("")
            pulls = self.poller.get(OPEN_PULLS)
            branch = repository["default_branch"]
            head = self.poller.get(f"/git/ref/heads/{branch}")["object"]["sha"]
        except Pause as pause:
            say(f"{pause.why}; asking again in {pause.seconds:.0f} s")
            self.next_poll = time.monotonic() + pause.seconds
            self.refused += 1
            return
        self.next_poll = float("inf") if self.options.once else time.monotonic() + self.options.interval
        self.refused = 0
        if self.state["built"] is None:
            self.state["built"] = self.options.since or head
            if not self.options.since:
                say(f"{branch} is at {head[:9]}: what is pushed from now on is built")
        self._see_pulls(repository, pulls)
        try:
            self._see_push(repository, branch, head)
        except SourceError as error:
            say(f"{error}; tried again at the next look")
            self.refused += 1
        self._save()

    def _see_pulls(self, repository: Mapping[str, Any], pulls: list[dict[str, Any]]) -> None:
        open_now = {str(pull["number"]) for pull in pulls}
        if len(pulls) < 100:
            self.state["previewed"] = {key: sha for key, sha in self.state["previewed"].items() if key in open_now}
        for pull in pulls:
            number, sha = str(pull["number"]), pull["head"]["sha"]
            name = f"preview of #{number}"
            if self.state["previewed"].get(number) == sha or any(
                work.name == name and work.sha == sha for work in (*self.waiting, *self.running)
            ):
                continue
            # An older state of the same pull request is of no interest any more.
            self.waiting = [work for work in self.waiting if work.name != name]
            payload = {
                "action": "synchronize",
                "number": pull["number"],
                "pull_request": pull,
                "repository": repository,
            }
            self.waiting.append(Work(name, "preview", "pull_request_target", payload, sha))

    def _see_push(self, repository: Mapping[str, Any], branch: str, head: str) -> None:
        """A run begins with its plan. There is one at a time: the next begins where it ended."""
        if head == self.state["built"] or self._run_is_on():
            return
        self._check_out(str(repository["clone_url"]), branch, head)
        built = self.state["built"] or NO_COMMIT
        payload = {
            "ref": f"refs/heads/{branch}", "before": built, "after": head, "forced": True,
            "repository": {"full_name": repository["full_name"], "default_branch": branch},
        }  # fmt: skip
        run = self.state["run"]
        if not run or run["head"] != head:
            self.state["run"] = {"head": head, "done": [], "matrix": None}
            shutil.rmtree(self.options.folder / "outcomes", ignore_errors=True)
        self.waiting.append(Work(f"plan of {head[:9]}", "plan", "push", payload, head))

    def _run_is_on(self) -> bool:
        return any(work.event == "push" for work in (*self.waiting, *self.running))

    # -------------------------------------------------------------------------------------------------------------- the work

    def _start(self) -> None:
        """Start what may start, previews first: someone waits for them."""
        self.waiting.sort(key=lambda work: work.command != "preview")
        for work in list(self.waiting):
            if len(self.running) >= self.options.jobs:
                return
            if time.monotonic() < work.not_before:
                continue
            self.waiting.remove(work)
            self._launch(work)

    def _launch(self, work: Work) -> None:
        folder = self.options.folder
        files = folder / "runs" / _slug(work.name)
        shutil.rmtree(files, ignore_errors=True)
        with writing(files):
            (files / "workspace").mkdir(parents=True)
            for name in ("output", "summary.md"):
                (files / name).touch()
            (files / "event.json").write_text(json.dumps(work.payload))
        on_checkout = work.event == "push"
        out = files / "out"
        if work.command == "build":
            out = folder / "builds" / _slug(work.inputs["recipes"])
        elif work.command == "collect":
            out = folder / "outcomes"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("INPUT_", "GITHUB_"))}
        environment |= {
            "GITHUB_EVENT_NAME": work.event,
            "GITHUB_EVENT_PATH": str(files / "event.json"),
            "GITHUB_SHA": work.sha,
            "GITHUB_REPOSITORY": self.options.repository,
            "GITHUB_API_URL": self.options.api,
            "GITHUB_WORKSPACE": str(folder / "checkout" if on_checkout else files / "workspace"),
            "GITHUB_OUTPUT": str(files / "output"),
            "GITHUB_STEP_SUMMARY": str(files / "summary.md"),
            "INPUT_COMMAND": work.command,
            "INPUT_GITHUB_TOKEN": self.options.token,
            "INPUT_OUT": str(out),
            "INPUT_PUBLISH": "true" if self.options.publish else "false",
            "INPUT_DEVICE": self.options.device or "",
            "INPUT_JOB_IMAGE": self.options.job_image or "",
            # A folder named `merge` where the watcher was started must not be imported instead of ours.
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **{f"INPUT_{name.upper()}": value for name, value in work.inputs.items()},
        }
        say(f"{work.name}: begins; its log is {files / 'log'}")
        with writing(files), (files / "log").open("wb") as log:
            work.process = subprocess.Popen(
                [sys.executable, "-m", "bot", "action"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.running.append(work)

    def _reap(self) -> None:
        for work in list(self.running):
            assert work.process is not None
            code = work.process.poll()
            if code is None:
                continue
            self.running.remove(work)
            work.process = None
            self._ended(work, code)
            self._save()

    def _ended(self, work: Work, code: int) -> None:
        """Go on from a piece of work that has ended with an exit code."""
        work.attempts += 1
        if code == UNREACHABLE and work.attempts < ATTEMPTS and work.command in ("preview", "build"):
            wait = RETRY_SECONDS * 2 ** (work.attempts - 1)
            say(f"{work.name}: a source or the Hub failed; tried again in {wait:.0f} s")
            work.not_before = time.monotonic() + wait
            self.waiting.append(work)
            return
        said = {0: "done", 1: "a recipe has an error", 2: "wrong use", 4: "a source or destination failed"}
        say(f"{work.name}: {said.get(code, f'ended with {code}')}")
        files = self.options.folder / "runs" / _slug(work.name)
        if work.command == "preview":
            self.state["previewed"][work.name.rpartition("#")[2]] = work.sha
        elif work.command == "plan":
            matrix = read_outputs(files / "output").get("matrix")
            if code in (0, RECIPE_ERROR) and matrix:
                self._planned(work, matrix)
            else:  # nobody knows what this push changed: it is planned again at the next look
                self.refused += 1
        elif work.command == "build":
            self._built(work)
        elif work.command == "collect":
            self.state["built"], self.state["run"] = work.sha, None

    def _planned(self, work: Work, matrix: str) -> None:
        run = self.state["run"]
        run["matrix"] = matrix
        entries = [entry for entry in json.loads(matrix)["include"] if entry["recipe"] not in run["done"]]
        for entry in entries:
            inputs = {"recipes": entry["recipe"]}
            if refused := self.poller.pending(work.sha, f"moerge/{entry['name']}"[:100], "waiting, or being built"):
                say(f"no status for {entry['recipe']}: {refused}")
            self.waiting.append(Work(f"build of {entry['recipe']}", "build", "push", work.payload, work.sha, inputs))
        if not entries:
            self._collect(work)

    def _built(self, work: Work) -> None:
        run, recipe = self.state["run"], work.inputs["recipes"]
        folder = self.options.folder
        left = folder / "builds" / _slug(recipe) / OUTCOMES
        if left.is_file():
            with writing(folder / "outcomes"):
                (folder / "outcomes" / _slug(recipe)).mkdir(parents=True, exist_ok=True)
                left.replace(folder / "outcomes" / _slug(recipe) / OUTCOMES)
        run["done"].append(recipe)
        if not any(other.command == "build" for other in (*self.waiting, *self.running)):
            self._collect(work)

    def _collect(self, work: Work) -> None:
        matrix = self.state["run"]["matrix"]
        if not json.loads(matrix)["include"]:
            self.state["built"], self.state["run"] = work.sha, None
            return
        with writing(self.options.folder):
            (self.options.folder / "outcomes").mkdir(exist_ok=True)
        name = f"end of {work.sha[:9]}"
        self.waiting.append(Work(name, "collect", "push", work.payload, work.sha, {"expected": matrix}))

    # -------------------------------------------------------------------------------------------------------- the checkout

    def _check_out(self, url: str, branch: str, head: str) -> None:
        """Bring the checkout to `head`. The token goes to git by its environment, where no list of processes shows it."""
        checkout = self.options.folder / "checkout"
        if not (checkout / ".git").exists():
            shutil.rmtree(checkout, ignore_errors=True)
            self._git(url, self.options.folder, "clone", "--quiet", "--no-checkout", url, str(checkout))
        refs = f"+refs/heads/{branch}:refs/remotes/origin/{branch}"
        self._git(url, checkout, "fetch", "--quiet", "--prune", "origin", refs)
        self._git(url, checkout, "-c", "core.hooksPath=/dev/null", "checkout", "--quiet", "--force", "--detach", head)

    def _git(self, url: str, folder: Path, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_CONFIG_COUNT": "2"}
        environment |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        # As GitHub's own checkout action does it, for the server alone that the repository is on.
        server = urlsplit(url)
        basic = base64.b64encode(f"x-access-token:{self.options.token}".encode()).decode()
        environment |= {
            "GIT_CONFIG_KEY_1": f"http.{server.scheme}://{server.netloc}/.extraheader",
            "GIT_CONFIG_VALUE_1": f"AUTHORIZATION: basic {basic}",
        }
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], env=environment, capture_output=True, timeout=600, check=False
            )
        except FileNotFoundError:
            raise UsageError("git is not installed, and it brings the recipes to this machine") from None
        except subprocess.TimeoutExpired:
            raise SourceError(f"git {arguments[0]} of {self.options.repository} took more than ten minutes") from None
        if done.returncode:
            raise SourceError(f"git {arguments[0]}: {printable(done.stderr.decode(errors='replace').strip())[-500:]}")

    # ------------------------------------------------------------------------------------------------------------- the end

    def _end(self) -> None:
        """End what runs; builds keep what they have done, and go on at the next start."""
        for work in self.running:
            say(f"{work.name}: stopped; it goes on at the next start")
            _send(work, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for work in self.running:
            assert work.process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                work.process.wait(max(0.0, deadline - time.monotonic()))
            if work.process.poll() is None:
                _send(work, signal.SIGKILL)
                work.process.wait()
        self._save()
        say(f"{self.poller.asked} requests, {self.poller.unchanged} of them unchanged and free")

    def _save(self) -> None:
        with writing(self.options.folder):
            write_atomically(self.options.folder / STATE, (json.dumps(self.state, indent=1) + "\n").encode())


def say(line: str) -> None:
    """One line with the time, for whoever watches the watcher."""
    print(f"{time.strftime('%H:%M:%S')} {printable(line)}", flush=True)


def _read_state(path: Path, repository: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise ValueError("another format")
    except FileNotFoundError:
        value = {"format": FORMAT, "repository": repository, "built": None, "previewed": {}, "run": None, "known": {}}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: not a watcher's state; choose another folder, or remove it") from None
    if value["repository"] != repository:
        raise UsageError(f"{path.parent}: watches {value['repository']}; choose another folder with --dir")
    return dict(value)


def _slug(name: str) -> str:
    """A file name of its own for a piece of work; what is not plain is written in hexadecimal."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda found: "_" if found[0] in " /" else f"_{ord(found[0]):x}_", name).lstrip(
        "."
    )


def _send(work: Work, number: signal.Signals) -> None:
    if work.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(work.process.pid, number)


def _end_with_parent() -> None:
    """In the child: have the kernel end it when the watcher is killed, so that a new one finds the build's folder free."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
