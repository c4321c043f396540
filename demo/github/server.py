"""Running the server in a thread of this process, and acting on it as people and workflows do."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from bot.hub.faults import Log
from demo.github.outer import Faults, Outer, Said
from demo.github.routes import route
from demo.github.shown import Shown
from demo.github.state import ALL_WRITE, Limits, Repository, State, Token

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ACTIONS = "github-actions[bot]"
_START_SECONDS = 20.0


class Server:
    """A served GitHub. `url` is what clients take as `base_url`; `log` holds the requests, `faults` may be set at any time."""

    def __init__(self, root: Path, limits: Limits, printer: Callable[[Said], None] | None) -> None:
        self.state = State(root, limits)
        self.outer = Outer(self.state, route, printer=printer)
        self._socket = socket.create_server(("127.0.0.1", 0))
        # As in bot/hub/server.py: without it each answer waits 40 ms between its headers and its body.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = Starlette(routes=[Route("/{path:path}", self.outer.__call__, methods=METHODS)])
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="critical", server_header=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)

    @property
    def log(self) -> Log:
        """The requests so far: `outer.Said` each."""
        return self.outer.log

    @property
    def faults(self) -> Faults | None:
        return self.outer.faults

    @faults.setter
    def faults(self, faults: Faults | None) -> None:
        self.outer.faults = faults

    def serve(self) -> None:
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        self._uvicorn.should_exit = True

    @property
    def started(self) -> bool:
        return self._uvicorn.started

    # ------------------------------------------------------------------------------------------------ people and workflows

    def repository(self, full_name: str, **options: Any) -> Repository:
        """A repository, made if need be; its git is at `repository.git.path`, to be pushed to and cloned from."""
        with self.state.lock:
            return self.state.repository(full_name) or self.state.create(full_name, **options)

    def token(self, login: str) -> str:
        """A person's token, which may do what they may."""
        return self._keep(Token(self.state.account(login)))

    def workflow_token(self, repository: str, permissions: dict[str, str] | None = None) -> str:
        """A job's GITHUB_TOKEN for one repository: of a job that names no permissions, or only those named."""
        has = dict(ALL_WRITE) if permissions is None else {"metadata": "read", **permissions}
        return self._keep(Token(self.state.account(ACTIONS), has, repository))

    def _keep(self, token: Token) -> str:
        secret = f"ghs_{secrets.token_hex(18)}"
        self.state.tokens[secret] = token
        return secret

    # ------------------------------------------------------------------------------------------------------------- payloads

    def _event(self, full_name: str, actor: str) -> tuple[Shown, Repository, dict[str, Any]]:
        shown, repository = Shown(self.state, self.url), self.repository(full_name)
        return shown, repository, {
            "repository": shown.repository(repository), "sender": shown.account(self.state.account(actor))
        }  # fmt: skip

    def push_event(
        self, full_name: str, before: str, after: str, ref: str = "refs/heads/main", **more: Any
    ) -> dict[str, Any]:
        """The payload of `push`."""
        shown, repository, event = self._event(full_name, full_name.split("/")[0])
        head = None if set(after) == {"0"} else shown.commit(repository, after)["commit"] | {"id": after}
        return event | {
            "ref": ref, "before": before, "after": after, "created": set(before) == {"0"}, "deleted": head is None,
            "forced": False, "base_ref": None, "compare": f"{self.url}/{full_name}/compare/{before[:12]}...{after[:12]}",
            "head_commit": head, "commits": [head] if head else [], "pusher": {"name": repository.owner.login},
        } | more  # fmt: skip

    def pull_request_event(self, full_name: str, number: int, action: str = "synchronize") -> dict[str, Any]:
        """The payload of `pull_request` and of `pull_request_target`."""
        with self.state.lock:
            issue = self.repository(full_name).issues[number]
            shown, repository, event = self._event(full_name, issue.author.login)
            return event | {"action": action, "number": number, "pull_request": shown.pull(repository, issue)}

    def comment_event(self, full_name: str, comment_id: int, action: str = "created") -> dict[str, Any]:
        """The payload of `issue_comment`."""
        with self.state.lock:
            for issue in self.repository(full_name).issues.values():
                for comment in issue.comments:
                    if comment.id == comment_id:
                        shown, repository, event = self._event(full_name, comment.author.login)
                        said = {
                            "issue": shown.issue(repository, issue),
                            "comment": shown.comment(repository, issue, comment),
                        }
                        return event | said | {"action": action}
        raise KeyError(comment_id)

    def release_event(self, full_name: str, release_id: int, action: str = "published") -> dict[str, Any]:
        """The payload of `release`."""
        with self.state.lock:
            release = self.repository(full_name).releases[release_id]
            shown, repository, event = self._event(full_name, release.author.login)
            return event | {"action": action, "release": shown.release(repository, release)}

    def schedule_event(self, full_name: str, schedule: str = "17 3 * * *") -> dict[str, Any]:
        """The payload of `schedule`."""
        return self._event(full_name, full_name.split("/")[0])[2] | {"schedule": schedule, "workflow": "build.yml"}

    def dispatch_event(self, full_name: str, inputs: dict[str, str], ref: str = "refs/heads/main") -> dict[str, Any]:
        """The payload of `workflow_dispatch`."""
        event = self._event(full_name, full_name.split("/")[0])[2]
        return event | {"inputs": inputs, "ref": ref, "workflow": ".github/workflows/build.yml"}


@contextlib.contextmanager
def running(
    root: Path, *, limits: Limits | None = None, printer: Callable[[Said], None] | None = None
) -> Iterator[Server]:
    """A GitHub on 127.0.0.1 with its repositories in `root`, as long as the block lasts. `printer` is told each request."""
    server = Server(root, limits or Limits(), printer)
    thread = threading.Thread(target=server.serve, name="github", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the local GitHub did not start")
            time.sleep(0.005)
        yield server
    finally:
        server.stop()
        thread.join(12)
