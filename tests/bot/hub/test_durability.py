"""A history survives whatever happens to the process that serves it, and git itself finds no fault with it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from bot.hub.server import running
from bot.hub.store import Store, StoreError

from .conftest import contents, lasting_port

SERVE = """
import sys
from pathlib import Path
from bot.hub.server import prepare
from bot.hub.uploads import Limits
server = prepare(Path(sys.argv[1]), port=int(sys.argv[2]), limits=Limits(multipart=1 << 20, part=300_000))
print(server.endpoint, server.token(), flush=True)
server.serve()
"""


class Process:
    """A Hub in a process of its own, which can be killed."""

    def __init__(self, root: Path, port: int) -> None:
        command = [sys.executable, "-c", SERVE, str(root), str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        endpoint, token = self.process.stdout.readline().split()
        self.port = int(endpoint.rpartition(":")[2])
        self.api = HfApi(endpoint=endpoint, token=token)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[object]:
    started: list[Process] = []

    def start(port: int = 0) -> Process:
        started.append(Process(tmp_path / "root", port))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()


def fsck(repository: Path) -> None:
    """Git's own check of every object and reference. Raises CalledProcessError."""
    subprocess.run(["git", "fsck", "--full", "--strict"], cwd=repository, check=True, capture_output=True)


def test_git_reads_every_repository(api: HfApi, hub, repo: str, model: Path):
    api.upload_folder(repo_id=repo, folder_path=model)
    api.create_tag(repo, tag="v1")
    commit = api.create_commit(repo, [CommitOperationAdd("a", b"1")], commit_message="A\nB", commit_description="C")
    folder = hub.root / "repos" / "models" / repo
    fsck(folder)
    log = subprocess.run(["git", "log", "--format=%H %s %b"], cwd=folder, check=True, capture_output=True, text=True)
    assert log.stdout.splitlines()[0] == f"{commit.oid} A B C"
    names = subprocess.run(
        ["git", "ls-tree", "-r", "-z", "--name-only", "v1"], cwd=folder, check=True, capture_output=True
    )
    assert set(names.stdout.decode().split("\0")[:-1]) == set(api.list_repo_files(repo, revision="v1"))
    blobs = subprocess.run(
        ["git", "rev-parse", "v1:config.json"], cwd=folder, check=True, capture_output=True, text=True
    )
    assert blobs.stdout.strip() == api.get_paths_info(repo, "config.json", revision="v1")[0].blob_id


def test_a_server_killed_amid_uploads_keeps_every_commit_it_confirmed(processes, tmp_path: Path):
    confirmed: dict[str, dict[str, bytes]] = {}
    server = processes(lasting_port())
    server.api.create_repo("acme/model")
    for round_ in range(2):
        stop = threading.Event()

        def publish(worker: int, api: HfApi = server.api, stop: threading.Event = stop, round_: int = round_) -> None:
            for number in itertools.count():
                name = f"{round_}-{worker}-{number}"
                files = {f"{name}.bin": os.urandom(1_200_000), f"{name}.txt": os.urandom(50).hex().encode()}
                operations = [CommitOperationAdd(path, data) for path, data in files.items()]
                try:
                    commit = api.create_commit("acme/model", operations, commit_message=name)
                except (httpx2.HTTPError, RuntimeError):  # the client sends a commit once
                    return
                confirmed[commit.oid] = files
                if stop.is_set():
                    return

        before = len(confirmed)
        with ThreadPoolExecutor(3) as pool:
            for worker in range(3):
                pool.submit(publish, worker)
            deadline = time.monotonic() + 10
            while len(confirmed) < before + 5 and time.monotonic() < deadline:
                time.sleep(0.003)
            server.kill()
            stop.set()
            server = processes(server.port)  # uploads that were cut off go on with this one
        assert len(confirmed) >= before + 5
        fsck(tmp_path / "root" / "repos" / "models" / "acme" / "model")
        assert confirmed.keys() <= {each.commit_id for each in server.api.list_repo_commits("acme/model")}
    oid, files = next(iter(confirmed.items()))
    old = server.api.snapshot_download("acme/model", revision=oid, local_dir=tmp_path / "old")
    assert contents(Path(old)).items() >= files.items()
    latest = contents(Path(server.api.snapshot_download("acme/model", local_dir=tmp_path / "new")))
    for files in confirmed.values():
        assert latest.items() >= files.items()


def test_two_processes_on_one_folder_do_not_lose_each_others_commits(processes):
    first, second = processes(), processes()
    first.api.create_repo("acme/model")

    def commit(number: int) -> None:
        api = (first, second)[number % 2].api
        api.upload_file(repo_id="acme/model", path_in_repo=f"{number}.bin", path_or_fileobj=bytes([number]) * 1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(commit, range(20)))
    for process in (first, second):
        assert len(process.api.list_repo_files("acme/model")) == 21
        assert len(process.api.list_repo_commits("acme/model")) == 21


def test_a_repository_is_made_by_one_of_many_who_try(tmp_path: Path):
    with running(tmp_path) as hub:

        def create(_: int) -> int:
            try:
                HfApi(endpoint=hub.endpoint, token=hub.token()).create_repo("acme/model")
            except HfHubHTTPError as error:
                return error.response.status_code
            return 200

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(create, range(12))) == [200] + [409] * 11


def test_what_a_killed_upload_left_is_removed_when_it_is_stale(tmp_path: Path):
    store = Store(tmp_path)
    old, new = store.temporary(), store.temporary()
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    Store(tmp_path)
    assert [path.exists() for path in (old, new)] == [False, True]


def test_a_folder_of_another_format_is_refused(tmp_path: Path):
    for content in ('{"format": 99}', "nonsense", "[]"):
        (tmp_path / "hub.json").write_text(content)
        with pytest.raises(StoreError, match="format"):
            Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file" / "below")


def test_a_server_that_is_stopped_lets_go_of_its_port(tmp_path: Path):
    port = lasting_port()
    for _ in range(2):
        with running(tmp_path, port=port) as hub:
            assert hub.endpoint == f"http://127.0.0.1:{port}"
            assert HfApi(endpoint=hub.endpoint, token=hub.token()).whoami()["name"] == "admin"
