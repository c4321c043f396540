"""Fixtures of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The client reads these when it is first imported; no test may reach further than this machine.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def written_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where text from short prompts is kept: not where the user's is, who may have it from other code."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge.hub.written_cache", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with the demo's models as moerge-demo/NAME: SmolLM2-135M-Instruct and its three experts."""
    from demo.models import make_models

    models = ROOT / "build" / "demo" / "models"
    make_models(models / "moerge-demo")
    return models
