"""Jobs of the embedded Hub: each runs as a process of this machine, in an empty folder, whatever image it names.

There is no container around them, so they are off unless the Hub is started with jobs. A job finds `moerge` on its path, as
in our build image, and of the environment only what it was given.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bot.hub import errors

SCHEDULING, RUNNING = "SCHEDULING", "RUNNING"
COMPLETED, CANCELED, ERROR = "COMPLETED", "CANCELED", "ERROR"
_DEFAULT_SECONDS, _MAX_SECONDS = 1800, 14 * 86400
_KEEP_ALIVE_SECONDS = 15.0
_KILL_SECONDS = 10.0
_ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """One job. `lines` holds (time, line) of what it printed; `changed` is notified with each and at its end."""

    id: str
    owner: str
    spec: dict[str, Any]
    created: datetime
    stage: str = SCHEDULING
    message: str | None = None
    started: datetime | None = None
    finished: datetime | None = None
    lines: list[tuple[datetime, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    process: subprocess.Popen[bytes] | None = None

    @property
    def ended(self) -> bool:
        return self.stage in (COMPLETED, CANCELED, ERROR)

    def to_json(self) -> dict[str, Any]:
        """As the Hub's API shows it: the names of its secrets, never their values."""
        owner = {"id": self.owner, "name": self.owner, "type": "user"}
        return {
            "id": self.id,
            "createdAt": _iso(self.created),
            "startedAt": _iso(self.started),
            "finishedAt": _iso(self.finished),
            "dockerImage": self.spec.get("dockerImage"),
            "spaceId": self.spec.get("spaceId"),
            "command": self.spec["command"],
            "arguments": self.spec["arguments"],
            "environment": self.spec["environment"],
            "secrets": sorted(self.spec["secrets"]),
            "flavor": self.spec["flavor"],
            "timeoutSeconds": self.spec["timeoutSeconds"],
            "labels": self.spec["labels"],
            "status": {"stage": self.stage, "message": self.message, "expose_urls": None, "ssh_url": None},
            "owner": owner,
            "initiator": owner,
        }

    def set(self, stage: str, message: str | None = None) -> None:
        """Move to a stage; one that has ended stays as it is."""
        with self.changed:
            if not self.ended:
                self.stage, self.message = stage, message
                if stage == RUNNING:
                    self.started = datetime.now(UTC)
                else:
                    self.finished = datetime.now(UTC)
            self.changed.notify_all()

    def add(self, line: str) -> None:
        with self.changed:
            self.lines.append((datetime.now(UTC), line))
            self.changed.notify_all()

    def events(self) -> Iterator[tuple[datetime, str] | None]:
        """Every line from the first on, as they come, until the job has ended; None where none came for a while."""
        seen = 0
        while True:
            with self.changed:
                if seen == len(self.lines) and not self.ended:
                    self.changed.wait(_KEEP_ALIVE_SECONDS)
                new, ended = self.lines[seen:], self.ended
            seen += len(new)
            yield from new
            if ended and seen == len(self.lines):
                return
            if not new:
                yield None


class Jobs:
    """The jobs that a Hub runs. They end with it."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._jobs: dict[str, Job] = {}

    def start(self, owner: str, body: dict[str, Any]) -> Job:
        """A new job from the body of the request. Raises HubError."""
        self.check_enabled()
        job = Job(secrets.token_hex(12), owner, _spec(body), datetime.now(UTC))
        self._jobs[job.id] = job
        threading.Thread(target=_run, args=(job,), name=f"job-{job.id}", daemon=True).start()
        return job

    def get(self, owner: str, identifier: str) -> Job:
        """Raises HubError(404)."""
        self.check_enabled()
        job = self._jobs.get(identifier)
        if job is None or job.owner != owner:
            raise errors.HubError(404, "Job not found")
        return job

    def all(self, owner: str) -> list[Job]:
        """The newest first."""
        self.check_enabled()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def cancel(self, job: Job) -> None:
        """End a job; one that has ended already stays as it is."""
        job.set(CANCELED)
        _stop(job)

    def stop(self) -> None:
        """End all of them."""
        for job in list(self._jobs.values()):
            self.cancel(job)

    def check_enabled(self) -> None:
        if not self.enabled:
            raise errors.HubError(501, "The embedded Hub runs no jobs unless it is started with --jobs.")


def _spec(body: dict[str, Any]) -> dict[str, Any]:
    # Imported here: the client reads its settings from the environment when it is imported.
    from huggingface_hub import JobHardware

    command, arguments = body.get("command"), body.get("arguments") or []
    flavor, seconds = body.get("flavor"), body.get("timeoutSeconds", _DEFAULT_SECONDS)
    if not _is_texts(command) or not _is_texts(arguments):
        raise errors.bad_request('"command" must be a list of texts.')
    if not isinstance(body.get("dockerImage") or body.get("spaceId"), str):
        raise errors.bad_request('One of "dockerImage" and "spaceId" is needed.')
    if flavor not in {each.value for each in JobHardware}:
        raise errors.bad_request(f"There is no flavor {flavor!r}.")
    if not isinstance(seconds, int) or not 0 < seconds <= _MAX_SECONDS:
        raise errors.bad_request(f'"timeoutSeconds" must be from 1 to {_MAX_SECONDS}.')
    variables = {}
    for name in ("environment", "secrets", "labels"):
        given = body.get(name) or {}
        if not isinstance(given, dict) or not _is_texts(list(given.values())):
            raise errors.bad_request(f'"{name}" must be an object of texts.')
        variables[name] = given
    kept = {key: body.get(key) for key in ("dockerImage", "spaceId")}
    return {
        **kept,
        **variables,
        "command": command,
        "arguments": arguments,
        "flavor": flavor,
        "timeoutSeconds": seconds,
    }


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _run(job: Job) -> None:
    folder = Path(tempfile.mkdtemp(prefix="moerge-job-"))
    try:
        _write_shim(folder / "bin" / "moerge")
        (folder / "work").mkdir()
        kept = {name: os.environ[name] for name in ("LANG", "SSL_CERT_FILE", "OMP_NUM_THREADS") if name in os.environ}
        environment = kept | {
            "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "JOB_ID": job.id,
            "HF_HUB_DISABLE_XET": "1",
            **job.spec["environment"],
            **job.spec["secrets"],
        }
        _watch(job, environment, folder / "work")
    except OSError as error:
        job.set(ERROR, f"Job failed to start: {error.strerror}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(job: Job, environment: dict[str, str], folder: Path) -> None:
    job.add(f"===== Job started at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} =====")
    with subprocess.Popen(
        [*job.spec["command"], *job.spec["arguments"]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        job.process = process
        job.set(RUNNING)
        if job.ended:  # cancelled while it started
            _stop(job)
        limit = threading.Timer(job.spec["timeoutSeconds"], _end_late, args=(job,))
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            job.add(line.decode(errors="replace").rstrip("\r\n"))
        code = process.wait()
        limit.cancel()
    if code:
        job.set(ERROR, f"Job failed with exit code: {code}")
    else:
        job.set(COMPLETED)


def _end_late(job: Job) -> None:
    job.set(ERROR, "Job timeout")
    _stop(job)


def _stop(job: Job) -> None:
    """End the job's processes: asked first, killed where they go on."""
    process = job.process
    if process is None:
        return
    for sent, seconds in ((signal.SIGTERM, _KILL_SECONDS), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            return


def _write_shim(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nPYTHONSAFEPATH=1 PYTHONPATH="{_ROOT}" exec "{sys.executable}" -m bot "$@"\n')
    path.chmod(0o755)


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z") if moment else None
