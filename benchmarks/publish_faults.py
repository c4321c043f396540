"""Publishing under faults: one at each request in turn, and SIGKILL at random moments; how many releases were lost.

    python -m benchmarks.publish_faults [--every N] [--kills N]

A first release is on the embedded Hub, and a second is published through the unmodified client while something goes wrong.
Each run must end, after at most one restart, in exactly the release of a run without faults, or in a clear error with the
previous release intact; and no commit may ever hold anything but one whole release.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from huggingface_hub import constants

from bot.hub.changes import Put
from bot.hub.faults import Fault, Faults
from bot.hub.names import repo_id
from bot.hub.server import Server, running
from bot.publish import LOCK, publish
from evals.results import FileMade, QuantMade, Report, SourceUsed
from merge.errors import MoergeError
from merge.files import file_sha256

REPO = "me/Fault-2x1M"
REPOS = (REPO, f"{REPO}-GGUF")
# Seconds: the client gives a request up after the first, and a stalled or late answer comes after the second.
GIVEN_UP, LATE = 0.5, 0.8
NOTE = "notes.txt"
SEED = 20261122
# Of each kind of failure the client's own retries and ours are to be seen.
ALWAYS = 1 << 30


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it does to the request it meets, and to how many after it. `somebody` commits a file of their
    own to both repositories just before the request."""

    name: str
    fault: Fault | None = None
    requests: int = 1
    somebody: bool = False


KINDS = (
    Kind("429 with Retry-After", Fault(status=429, retry_after=0)),
    Kind("500", Fault(status=500)),
    Kind("502", Fault(status=502)),
    Kind("503 with Retry-After", Fault(status=503, retry_after=0)),
    Kind("500, from there on", Fault(status=500), ALWAYS),
    Kind("connection dropped", Fault(drop=0)),
    Kind("connection dropped in the answer", Fault(drop=20)),
    Kind("stall", Fault(stall=LATE)),
    Kind("answer after the client's timeout", Fault(late=LATE)),
    Kind("answer lost", Fault(lost=True)),
    Kind("409", Fault(status=409)),
    Kind("412", Fault(status=412)),
    Kind("somebody else's commit before it", somebody=True),
    Kind("a bit of the upload flipped", Fault(damage="request")),
    Kind("a bit of a download flipped", Fault(damage="answer")),
    Kind("token expired, from there on", Fault(status=401, message="Invalid username or password."), ALWAYS),
    Kind("out of quota, from there on", Fault(status=402, message="Storage limit reached."), ALWAYS),
)
# Bits are flipped in files on their way: the client's JSON is protected by nothing but TLS, there as anywhere.
DAMAGED = {"request": ("PUT", "/info/lfs/storage/"), "answer": ("GET", "/resolve/")}
WRITES = ("POST", "PUT", "DELETE")


@dataclass
class Count:
    """What became of the runs of one kind: survived at once, or with one restart after a clear error; lost."""

    tried: int = 0
    survived: int = 0
    restarted: int = 0
    lost: int = 0


class Stage:
    """The two builds, the Hub with the first release, and what the second is when nothing goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = make_build(folder / "first", 1)
        self.second = make_build(folder / "second", 2)
        self.hub = folder / "hub"
        with running(self.hub) as server:
            publish(self.first, token=server.token(), endpoint=server.endpoint)
            self.old = releases(server)
        with self.copied() as server:
            publish(self.second, token=server.token(), endpoint=server.endpoint)
            self.requests = [(each.method, each.path) for each in server.log.all()]
            self.new = releases(server)

    @contextlib.contextmanager
    def copied(self, faults: Faults | None = None) -> Iterator[Server]:
        """A Hub with the first release, as often as it is wanted."""
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            shutil.copytree(self.hub, copy, dirs_exist_ok=True)
            constants.HF_HUB_CACHE = f"{copy}/cache"  # each run asks the Hub for everything
            with running(Path(copy), faults=faults) as server:
                yield server

    def problem(self, server: Server, *, finished: bool) -> str | None:
        """What is wrong with the Hub: None where all of it is a whole release, and the new one if it is `finished`."""
        for repo in REPOS:
            found = server.hub.store.get(repo_id("model", repo))
            for commit, _ in found.history(found.resolve("main")):
                tree = files(server, repo, commit)
                if tree not in (self.old[repo], self.new[repo]) and LOCK in tree:
                    return f"{repo}: {commit[:8]} is neither release"
            refs = found.refs()
            if files(server, repo, refs["refs/tags/v1"]) != self.old[repo]:
                return f"{repo}: the tag of the first release is not intact"
            if finished and files(server, repo, "main") != self.new[repo]:
                return f"{repo}: not the second release"
            if finished and files(server, repo, refs.get("refs/tags/v2", "main~")) != self.new[repo]:
                return f"{repo}: the tag of the second release is not on it"
            commits = [value.title for _, value in found.history(found.resolve("main"))]
            if sum(title.startswith("Release Fault-2x1M v2") for title in commits) > 1:
                return f"{repo}: committed twice"
        return None


def meets(kind: Kind, method: str, path: str) -> bool:
    """Whether such a request can have this kind of fault."""
    if kind.fault is None or kind.fault.damage is None:
        return True
    wanted, part = DAMAGED[kind.fault.damage]
    return method == wanted and part in path


def run_fault(stage: Stage, kind: Kind, number: int) -> tuple[str | None, bool]:
    """Publish the second release with a fault at request `number`; what was lost (None: nothing), and if it was restarted."""
    left = [kind.requests]

    def faults(seen: int, request: Any) -> Fault | None:
        if seen < number or left[0] == 0:
            return None
        if kind.fault is not None and kind.fault.status == 402 and request.method not in WRITES:
            return None
        if not meets(kind, request.method, request.url.path):
            return None
        left[0] -= 1
        if kind.somebody:
            for repo in REPOS:
                found = server.hub.store.get(repo_id("model", repo))
                blob = found.objects.write("blob", b"mine")
                found.commit("main", [Put(NOTE, blob)], author="somebody", title="A note")
        return kind.fault

    with stage.copied(faults) as server:
        error = attempt(lambda: publish(stage.second, token=server.token(), endpoint=server.endpoint))
        if isinstance(error, MoergeError):
            if problem := stage.problem(server, finished=False):
                return f"{problem} (after: {error})", False
            server.faults = None
            again = attempt(lambda: publish(stage.second, token=server.token(), endpoint=server.endpoint))
            return (f"not after a restart: {again!r}" if again else stage.problem(server, finished=True)), True
        return (repr(error) if error else stage.problem(server, finished=True)), False


def run_kill(stage: Stage, seconds: float) -> tuple[str | None, bool]:
    """Publish the second release in a process that is killed after `seconds`; then once more."""
    context = multiprocessing.get_context("forkserver")
    with stage.copied() as server:
        process = context.Process(target=_publish, args=(str(stage.second), server.token(), server.endpoint))
        process.start()
        process.join(seconds)
        alive = process.is_alive()
        if alive and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.1)  # what the server has of it is done
        if problem := stage.problem(server, finished=False):
            return problem, alive
        again = attempt(lambda: publish(stage.second, token=server.token(), endpoint=server.endpoint))
        return (repr(again) if again else stage.problem(server, finished=True)), alive


def _publish(folder: str, token: str, endpoint: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        publish(Path(folder), token=token, endpoint=endpoint)


def attempt(action: Callable[[], object]) -> Exception | None:
    """The error that an action ends with."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            action()
    except Exception as error:
        return error
    return None


def files(server: Server, repo: str, revision: str) -> dict[str, str]:
    """The checksums of a release's files, by name; without what is not of it: the note, and the times in the report."""
    found = server.hub.store.get(repo_id("model", repo))
    try:
        tree = found.files(found.resolve(revision))
    except Exception:  # no such revision
        return {}
    return {file.path: file.etag for file in tree if file.path not in (NOTE, ".gitattributes")}


def releases(server: Server) -> dict[str, dict[str, str]]:
    """The files of both repositories."""
    return {repo: files(server, repo, "main") for repo in REPOS}


def make_build(folder: Path, version: int, size: int = 30_000) -> Path:
    """What a build leaves, small: the second drops a GGUF file of the first, and has another and other weights."""
    rng = random.Random(version)  # noqa: S311 - the same files each time
    for name in ("model", "gguf"):
        (folder / name).mkdir(parents=True)
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    (folder / "model/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + _noise(rng, size))
    (folder / "model/config.json").write_text(json.dumps({"num_local_experts": version}))
    (folder / "model/tokenizer.json").write_text("{}")
    types = ["Q8_0", "Q4_K_M"] if version == 1 else ["Q8_0", "Q6_K"]
    for quant in types:
        (folder / f"gguf/Fault-2x1M-{quant}.gguf").write_bytes(b"GGUF" + _noise(rng, size))
    for name in ("model", "gguf"):
        (folder / name / "README.md").write_text(f"---\nlicense: mit\n---\n# Fault-2x1M v{version}\n")
    quants = [
        QuantMade(_made(folder / f"gguf/Fault-2x1M-{quant}.gguf"), quant, 8.0, 0.0, "ran", "", "") for quant in types
    ]
    model = [_made(path) for path in sorted((folder / "model").iterdir()) if path.name != "README.md"]
    (folder / "report.json").write_bytes(
        replace(
            _report(), version=f"v{version}", files=tuple(model), quants=tuple(quants), recipe_identity=f"{version:064}"
        ).to_json()
    )
    return folder


def _noise(rng: random.Random, size: int) -> bytes:
    """Random bytes; one call gives at most 2 GiB of bits."""
    return b"".join(rng.randbytes(min(1 << 20, size - start)) for start in range(0, size, 1 << 20))


def _made(path: Path) -> FileMade:
    return FileMade(path.name, path.stat().st_size, file_sha256(path))


def _report() -> Report:
    text = "base_model: a/b\nexperts: [{source_model: a/b}]\n"
    values: dict[str, Any] = {
        "name": "Fault-2x1M", "repo": REPO, "family": "mixtral", "family_title": "Mixtral", "moerge_version": "0",
        "recipe_text": text, "recipe_identity": "", "gate_mode": "random", "gates_key": "0" * 64, "dtype": "BF16",
        "parameters": {"total": 1, "active": 1, "shared": 1, "per_expert": 1}, "experts_per_token": 2,
        "context_length": 256, "license": "mit", "license_name": None, "license_link": None, "language": (), "tags": (),
        "title": None, "description": None, "private": False, "version": None, "base": "a/b",
        "sources": (SourceUsed("a/b", "0" * 40, "", "mit", 1, 0),), "experts": (), "files": (), "quants": (),
    }  # fmt: skip
    return Report(**values)


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """The client gives up soon and does not sleep long between its tries; nothing else of it is another."""
    import httpx2
    from huggingface_hub.utils import _http

    import bot.publish.patience as patience

    class Clock:
        sleep = staticmethod(lambda seconds: time.sleep(min(seconds, 1.0) / 100))

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    def client() -> httpx2.Client:
        made = _http.default_client_factory()
        made.timeout = httpx2.Timeout(GIVEN_UP)
        return made

    kept = _http.time, patience.PAUSE, constants.HF_HUB_CACHE
    with tempfile.TemporaryDirectory() as cache:
        _http.time, patience.PAUSE, constants.HF_HUB_CACHE = Clock(), 0.01, cache  # type: ignore[assignment]
        _http.set_client_factory(client)
        try:
            yield
        finally:
            _http.time, patience.PAUSE, constants.HF_HUB_CACHE = kept
            _http.set_client_factory(_http.default_client_factory)


def run_kinds(stage: Stage, every: int = 1, kinds: tuple[Kind, ...] = KINDS) -> dict[str, Count]:
    """Every kind of fault at each `every`th request."""
    counts = {}
    for offset, kind in enumerate(kinds):
        count = counts[kind.name] = Count()
        numbers = [number for number, request in enumerate(stage.requests, 1) if meets(kind, *request)]
        for number in numbers[offset % min(every, len(numbers)) :: every]:
            _add(count, *run_fault(stage, kind, number), what=f"{kind.name} at request {number}")
    return counts


def run_kills(stage: Stage, kills: int) -> Count:
    """Kills at random moments of a publication."""
    run_kill(stage, 60.0)  # the fork server starts
    started = time.monotonic()
    _, alive = run_kill(stage, 60.0)
    assert not alive
    whole, count = (time.monotonic() - started) * 0.7, Count()
    rng = random.Random(SEED)  # noqa: S311 - the same moments each time
    for number in range(kills):
        _add(count, *run_kill(stage, rng.uniform(0, whole)), what=f"kill {number}")
    return count


def _add(count: Count, lost: str | None, restarted: bool, what: str) -> None:
    count.tried += 1
    if lost is not None:
        count.lost += 1
        print(f"LOST: {what}: {lost}", file=sys.stderr)
    elif restarted:
        count.restarted += 1
    else:
        count.survived += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="a fault at each Nth request")
    parser.add_argument("--kills", type=int, default=40)
    args = parser.parse_args()
    multiprocessing.set_forkserver_preload(["bot.publish.release", "huggingface_hub.hf_api", __name__])
    with tempfile.TemporaryDirectory() as folder, hurried():
        stage = Stage(Path(folder))
        counts = run_kinds(stage, args.every)
        counts["SIGKILL at a random moment"] = run_kills(stage, args.kills)
    print(f"{len(stage.requests)} requests in a publication without faults\n")
    print("| fault | tried | survived | survived with one restart | lost |\n|---|---|---|---|---|")
    total = Count()
    for name, count in counts.items():
        print(f"| {name} | {count.tried} | {count.survived} | {count.restarted} | {count.lost} |")
        for field in vars(total):
            setattr(total, field, getattr(total, field) + getattr(count, field))
    print(f"| all | {total.tried} | {total.survived} | {total.restarted} | {total.lost} |")
    return 1 if total.lost else 0


if __name__ == "__main__":
    sys.exit(main())
