"""Fixtures of the whole test suite."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with the demo's models as moerge-demo/NAME: SmolLM2-135M-Instruct and its three experts."""
    from demo.models import make_models

    models = ROOT / "build" / "demo" / "models"
    make_models(models / "moerge-demo")
    return models
