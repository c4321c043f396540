"""`make demo-github`: a recipe repository's day, from `moerge init` to a release, on a GitHub and a Hub on this machine.

A stranger's fork asks for three recipes, one of them broken; the bot previews them, the fork is corrected and merged, the builds
run two at a time, and the models are on the Hub, the releases on GitHub. Each job runs the container's entry, `moerge action`,
with the event and the permissions that the workflows of `moerge init` give it. `--requests` prints every HTTP request.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bot.hub import server as hubs
from bot.hub.faults import Exchange
from bot.watch import read_outputs
from demo.github import server as githubs
from demo.page import page, picture, raw_markdown

ROOT = Path(__file__).parent.parent
HERE = ROOT / "build" / "demo-github"
NAME, FORK, BRANCH = "acme/moes", "stranger/moes", "three-recipes"
MAINTAINER, STRANGER = "acme", "stranger"
SPECIALITIES = {
    "chat": "Tell me about your day.",
    "code": "def add(a, b): return a + b",
    "maths": "2 + 2 = 4, so 4 - 2 = 2",
}
PREVIEW = {"contents": "read", "pull_requests": "write", "checks": "write"}
READ, COLLECT = {"contents": "read"}, {"contents": "write", "statuses": "write"}
_print = threading.Lock()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", action="store_true", help="print every HTTP request")
    requests = parser.parse_args().requests
    started = time.monotonic()
    shutil.rmtree(HERE, ignore_errors=True)
    os.environ |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "HF_HOME": str(HERE / "hf"),
    }
    with (
        hubs.running(HERE / "hub") as hub,
        githubs.running(HERE / "github", printer=lambda said: show("GitHub", said) if requests else None) as github,
    ):
        if requests:
            hub.log.told = lambda exchange: show("Hub", exchange)
        Story(hub, github).tell()
    print(f"\nDone in {time.monotonic() - started:.0f} s. All of it is in {HERE}")
    return 0


class Story:
    """The two servers, the repository's checkout and the fork's."""

    def __init__(self, hub: hubs.Server, github: githubs.Server) -> None:
        self.hub, self.github = hub, github
        self.repository = github.repository(NAME)
        self.checkout, self.fork = HERE / "moes", HERE / "fork"
        self.steps = 0

    def tell(self) -> None:
        heading("Three models of a million parameters, on the Hub")
        self.models()
        heading("moerge init, and the first push")
        self.init()
        heading("A stranger's fork asks for three recipes")
        number = self.pull_request()
        failed = self.step("preview", "pull_request_target", self.github.pull_request_event(NAME, number), PREVIEW)
        assert failed.code == 1, failed.log
        comment = self.look_at_comment(number, "comment-1")
        self.look_at_checks(number)
        heading("The fork is corrected: the same comment, edited")
        git(self.fork, "pull", "--quiet", "origin", BRANCH)
        write(self.fork / "recipes/calculator-3x1M.yaml", recipe("Calculator-3x1M", ["chat", "maths", "code"]))
        commit(self.fork, "gate_mode is random")
        git(self.fork, "push", "--quiet", "origin", f"HEAD:{BRANCH}")
        fixed = self.step("preview", "pull_request_target", self.github.pull_request_event(NAME, number), PREVIEW)
        assert fixed.code == 0, fixed.log
        assert self.look_at_comment(number, "comment-2") == comment, "a second comment"
        heading("It is merged, and the push builds: a plan, and a job for each recipe, two at a time")
        before = self.repository.git.text("rev-parse", "refs/heads/main")
        self.api(MAINTAINER).get_pull(number).merge(merge_method="squash")
        git(self.checkout, "pull", "--quiet", "origin", "main")
        after = git(self.checkout, "rev-parse", "HEAD")
        self.build(self.github.push_event(NAME, before, after), after)
        heading("What everyone can see now")
        self.look_at_hub()
        self.look_at_releases(after)

    # ------------------------------------------------------------------------------------------------------------ the chapters

    def models(self) -> None:
        from huggingface_hub import HfApi

        from tests.dense import save_dense

        api = HfApi(endpoint=self.hub.endpoint, token=self.hub.token())
        for seed, name in enumerate(SPECIALITIES):
            folder = save_dense(
                HERE / "models" / name, seed=seed, hidden_size=128, intermediate_size=256, num_hidden_layers=4
            )
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
            api.create_repo(f"tiny/{name}")
            api.upload_folder(repo_id=f"tiny/{name}", folder_path=folder, commit_message=f"A tiny model for {name}")
            print(f"tiny/{name}")

    def init(self) -> None:
        pinned = git(ROOT, "rev-parse", "HEAD") if (ROOT / ".git").exists() else "0" * 40
        run("init", str(self.checkout), "--moerge", f"acme/moerge@{pinned}", "--owner", "acme")
        git(self.checkout, "init", "--quiet", "-b", "main")
        # Its example is of models on the real Hub; this story has its own.
        (self.checkout / "recipes/first-moe.yaml").unlink()
        commit(self.checkout, "Recipes")
        git(self.checkout, "remote", "add", "origin", str(self.repository.git.path))
        git(self.checkout, "push", "--quiet", "-u", "origin", "main")

    def pull_request(self) -> int:
        self.api(STRANGER).create_fork()
        git(HERE, "clone", "--quiet", str(self.github.repository(FORK).git.path), str(self.fork))
        git(self.fork, "checkout", "--quiet", "-b", BRANCH)
        recipes = {
            "assistant-2x1M": recipe("Assistant-2x1M", ["chat", "code"], release={"version": "1.0"}),
            "night-shift-2x1M": recipe("Night-Shift-2x1M", ["chat", "maths"]),
            "calculator-3x1M": recipe("Calculator-3x1M", ["chat", "maths", "kode"]).replace("random", "randon"),
        }
        for name, text in recipes.items():
            write(self.fork / f"recipes/{name}.yaml", text)
        commit(self.fork, "Three recipes")
        git(self.fork, "push", "--quiet", "origin", BRANCH)
        pull = self.api(STRANGER).create_pull(
            base="main",
            head=f"{STRANGER}:{BRANCH}",
            title="Three recipes",
            body="They would be nice to have. @everyone",
        )
        print(f"pull request #{pull.number} from {FORK}")
        return int(pull.number)

    def build(self, event: dict[str, Any], sha: str) -> None:
        plan = self.step("plan", "push", event, READ, sha, workspace=self.checkout)
        assert plan.code == 0, plan.log
        entries = json.loads(plan.outputs["matrix"])["include"]
        for entry in entries:
            print(f"  {entry['recipe']} → {entry['repo']} on {entry['runner']}")
        out = HERE / "outcomes"

        def one(index: int) -> Step:
            return self.step(
                "build", "push", event, READ, sha, workspace=self.checkout, token=self.hub.token(),
                recipes=entries[index]["recipe"], out=str(out / f"moerge-outcome-{index}"),
            )  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            for step in pool.map(one, range(len(entries))):
                assert step.code == 0, step.log
        end = self.step("collect", "push", event, COLLECT, sha, expected=plan.outputs["matrix"], out=str(out))
        assert end.code == 0, end.log
        self.look_at(end.summary, "summary")

    # ----------------------------------------------------------------------------------------------------------- what is seen

    def look_at_comment(self, number: int, name: str) -> int:
        [comment] = self.repository.issues[number].comments
        self.look_at(comment.body, name)
        return comment.id

    def look_at_checks(self, number: int) -> None:
        head = self.repository.git.text("rev-parse", f"refs/pull/{number}/head")
        for check in self.api(MAINTAINER).get_commit(head).get_check_runs():
            print(f"check run “{check.name}”: {check.conclusion}, {check.output.title}")
            for note in check.get_annotations():
                print(f"  {note.path}:{note.start_line}: {note.annotation_level}: {note.message}")

    def look_at_hub(self) -> None:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.hub.endpoint)
        for model in sorted(api.list_models(author="acme"), key=lambda model: model.id):
            info = api.model_info(model.id, files_metadata=True)
            size = sum(file.size or 0 for file in info.siblings or [])
            tags = ", ".join(ref.name for ref in api.list_repo_refs(model.id).tags)
            print(f"{self.hub.endpoint}/{model.id}: {len(info.siblings or [])} files, {size / 1e6:.1f} MB, tag {tags}")

    def look_at_releases(self, sha: str) -> None:
        for status in self.api(MAINTAINER).get_commit(sha).get_combined_status().statuses:
            print(f"commit status {status.context}: {status.state}, {status.description}")
        releases = list(self.api(MAINTAINER).get_releases())
        for release in releases:
            print(f"release {release.tag_name}: {release.html_url}")
            self.look_at(release.body, f"release-{release.tag_name}")
        assert [release.tag_name for release in releases] == ["Assistant-2x1M-v1.0"]

    def look_at(self, markdown: str, name: str) -> None:
        """Keep Markdown as a page and a picture, and check that none of it shows as Markdown."""
        html = HERE / "pages" / f"{name}.html"
        html.parent.mkdir(exist_ok=True)
        html.with_suffix(".md").write_text(markdown, encoding="utf-8")
        html.write_text(page(markdown, name), encoding="utf-8")
        seen = raw_markdown(html.read_text(encoding="utf-8"))
        assert not seen, f"{html}: raw Markdown shows: {seen[:5]}"
        shown = picture(html)
        print(f"{markdown.count(chr(10)) + 1} lines of Markdown, none of it showing: {shown or html}")

    # ------------------------------------------------------------------------------------------------------------- the jobs

    def step(
        self, command: str, event: str, payload: dict[str, Any], permissions: dict[str, str], sha: str = "",
        *, workspace: Path | None = None, **inputs: str,
    ) -> Step:  # fmt: skip
        """A step of a job: the container's entry with the environment that the runner gives it, and nothing more."""
        self.steps += 1
        files = HERE / "jobs" / f"{self.steps:02}-{command}"
        (files / "workspace").mkdir(parents=True)
        for name in ("output", "summary.md"):
            (files / name).touch()
        (files / "event.json").write_text(json.dumps(payload))
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "SSL_CERT_FILE") if name in os.environ}
        environment = kept | {
            "GITHUB_EVENT_NAME": event,
            "GITHUB_EVENT_PATH": str(files / "event.json"),
            "GITHUB_SHA": sha or payload.get("pull_request", {}).get("base", {}).get("sha", ""),
            "GITHUB_WORKSPACE": str(workspace or files / "workspace"),
            "GITHUB_OUTPUT": str(files / "output"),
            "GITHUB_STEP_SUMMARY": str(files / "summary.md"),
            "GITHUB_REPOSITORY": NAME,
            "GITHUB_API_URL": self.github.url,
            "HF_HOME": str(files / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": str(ROOT),
            "INPUT_COMMAND": command,
            "INPUT_GITHUB_TOKEN": self.github.workflow_token(NAME, permissions),
            "INPUT_HUB_ENDPOINT": self.hub.endpoint,
            **{f"INPUT_{name.upper()}": value for name, value in inputs.items()},
        }
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "bot", "action"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=environment["GITHUB_WORKSPACE"], timeout=600, check=False,
        )  # fmt: skip
        log = done.stdout.decode(errors="replace")
        (files / "log").write_text(log)
        with _print:
            what = f"{command} {inputs.get('recipes', '')}".strip()
            print(
                f"job “{what}” on {event}: ended with {done.returncode} after {time.monotonic() - started:.1f} s",
                flush=True,
            )
        return Step(done.returncode, log, read_outputs(files / "output"), (files / "summary.md").read_text())

    def api(self, login: str) -> Any:
        """The repository as a person's PyGithub sees it."""
        from github import Auth, Github

        client = Github(auth=Auth.Token(self.github.token(login)), base_url=self.github.url, lazy=True,
                        seconds_between_requests=0, seconds_between_writes=0)  # fmt: skip
        return client.get_repo(NAME)


class Step:
    """What a step left."""

    def __init__(self, code: int, log: str, outputs: dict[str, str], summary: str) -> None:
        self.code, self.log, self.outputs, self.summary = code, log, outputs, summary


def recipe(name: str, experts: list[str], release: dict[str, Any] | None = None) -> str:
    """A recipe over the story's models."""
    value = {
        "base_model": f"tiny/{experts[0]}",
        "gate_mode": "random",
        "experts_per_token": 1,
        "experts": [{"source_model": f"tiny/{expert}", "role": expert} for expert in experts],
        "release": {"repo": f"acme/{name}", "license": "apache-2.0", "quants": ["Q8_0"], **(release or {})},
        "card": {"description": f"{' and '.join(experts)}, in one small model."},
    }
    return yaml.safe_dump(value, sort_keys=False)


def run(*arguments: str) -> None:
    """Run the command as a user would, and show it."""
    print(f"$ moerge {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "bot", *arguments], cwd=ROOT, check=True)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A Person", "-c", "user.email=person@example.org", "-c", "commit.gpgsign=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", message)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def show(server: str, exchange: Exchange) -> None:
    """One request, as `--requests` prints it."""
    query = f"?{exchange.query}" if getattr(exchange, "query", "") else ""
    with _print:
        print(f"  {server:<6} {exchange.method:<5} {exchange.path}{query} → {exchange.status}", flush=True)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
