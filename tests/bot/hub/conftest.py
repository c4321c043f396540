"""A Hub for the tests: one server for all of them, each test with repositories of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars

from bot.hub.faults import Faults
from bot.hub.server import Server, running
from bot.hub.uploads import Limits

# Small sizes, so that a small file is one that is sent in parts.
LIMITS = Limits(multipart=1 << 20, part=300_000, regular=100_000)
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def quiet_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client as moerge uses it, without anything of the machine's own settings."""
    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("hub") / "root", limits=LIMITS) as server:
        yield server


@pytest.fixture
def api(hub: Server) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token())


@pytest.fixture
def client(hub: Server) -> Callable[..., HfApi]:
    """A client with a new token of some rights: client("bob", "write")."""
    return lambda *rights, **scope: HfApi(endpoint=hub.endpoint, token=hub.token(*rights, **scope))


@pytest.fixture
def repo(api: HfApi) -> str:
    """A new repository's id."""
    return api.create_repo(f"acme/model-{next(_numbers)}").repo_id


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like a small model's: text, a large file in one piece, one in parts, folders, odd names."""
    folder = tmp_path / "model"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [moe]\nbase_model: [acme/a, acme/b]\n---\n# A model\n")
    (folder / "config.json").write_text('{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}')
    (folder / "small.gguf").write_bytes(os.urandom(50_000))
    (folder / "large.gguf").write_bytes(os.urandom(1_234_567))
    (folder / "sub" / "text é.txt").write_text("größer")
    (folder / "sub" / "deep" / "a+b %20#.txt").write_text("odd")
    (folder / "empty.txt").touch()
    return folder


@contextlib.contextmanager
def failing(hub: Server, faults: Faults) -> Iterator[None]:
    """The Hub with some faults, for the length of the block."""
    hub.faults = faults
    try:
        yield
    finally:
        hub.faults = None


def lasting_port() -> int:
    """A free port that the system gives to nobody else: a server that is started again finds it free still."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no free port")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without what the client and the Hub add."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {path: data for path, data in found.items() if not path.startswith((".cache", ".gitattributes"))}
