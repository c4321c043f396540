"""What the headers of pinned commits said, kept between runs: a commit never changes, so neither does what it holds.

A folder of JSON files that may be kept from job to job. What a token could read is found again only with that token. Used
by previews alone: a build asks again. A file that cannot be read is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint, Layout
from merge.tensors import TensorInfo

# Bound to the fields of Checkpoint and TensorInfo: another number makes old files unknown.
FORMAT = 3
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HeaderCache:
    """The headers of one Hub's models, as one token reads them."""

    def __init__(self, folder: Path, endpoint: str, token: str | None) -> None:
        reader = hashlib.sha256(f"{FORMAT}\0{endpoint}\0{token or ''}".encode()).hexdigest()[:16]
        self._folder = folder / reader

    def commit(self, path: str, revision: str | None) -> str | None:
        """The commit that a revision meant when it was last asked for; the revision itself where it is a commit."""
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        commit = (self._load(self._file(path, f"revision {revision or ''}")) or {}).get("commit")
        return commit if isinstance(commit, str) else None

    def is_recent(self, path: str, revision: str | None, seconds: float) -> bool:
        """Whether the Hub said within so many seconds which commit a revision means."""
        with suppress(OSError):
            return 0 <= time.time() - self._file(path, f"revision {revision or ''}").stat().st_mtime < seconds
        return False

    def confirm(self, path: str, revision: str | None) -> None:
        """The Hub said once more that a revision means what it meant."""
        with suppress(OSError):
            os.utime(self._file(path, f"revision {revision or ''}"))

    def get(self, path: str, commit: str, layout: Layout, name: str) -> Checkpoint | None:
        """The checkpoint of a commit under the name a recipe has for it; None where it is not here."""
        value = self._load(self._file(path, f"{commit} {layout.config}"))
        try:
            return None if value is None else replace(_checkpoint(value), name=name)
        except (KeyError, TypeError, ValueError):
            return None

    def put(self, path: str, revision: str | None, layout: Layout, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and which commit its revision means. A full disk is no reason to fail."""
        if checkpoint.commit is not None:
            with suppress(OSError):
                self._save(self._file(path, f"{checkpoint.commit} {layout.config}"), _value(checkpoint))
                self._save(self._file(path, f"revision {revision or ''}"), {"commit": checkpoint.commit})

    def _file(self, path: str, what: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{path} {what}'.encode()).hexdigest()[:40]}.json"

    def _load(self, file: Path) -> dict[str, Any] | None:
        try:
            value = json.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _save(self, file: Path, value: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(value, out, separators=(",", ":"))
        Path(name).replace(file)


def _value(checkpoint: Checkpoint) -> dict[str, Any]:
    shown = asdict(replace(checkpoint, tensors=None)) | {"folder": None}
    if checkpoint.tensors is None:
        return shown
    listed = [[name, x.dtype, x.shape, x.file, x.start] for name, x in checkpoint.tensors.items()]
    return shown | {"tensors": json.dumps(listed, separators=(",", ":"))}


def _checkpoint(value: dict[str, Any]) -> Checkpoint:
    listed = value["tensors"]
    return Checkpoint(**value | {"tensors": None if listed is None else _tensors(listed)})


@lru_cache(maxsize=64)
def _tensors(listed: str) -> Mapping[str, TensorInfo]:
    """The tensors of a checkpoint. They are a text in its file because most fine-tunes of a model have the very same."""
    return {
        name: TensorInfo(dtype, tuple(shape), file, start) for name, dtype, shape, file, start in json.loads(listed)
    }
