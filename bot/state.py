"""What a build has done so far, so that a killed one goes on where it was.

DIR/state.json names each finished stage with the hash of its inputs: a stage whose inputs are the same is not run again, one
whose inputs changed is. The file is replaced whole after every stage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge.errors import UsageError
from merge.files import write_atomically, writing

STATE = "state.json"
LOCK = ".moerge.lock"
FORMAT = 1


class State:
    """The finished stages of the build in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATE
        self._stages: dict[str, dict[str, Any]] = {}
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            if value["format"] == FORMAT:
                self._stages = dict(value["stages"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self._path}: not a build's state; choose another folder, or remove it") from None

    def result(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `stage` left when it ran with these inputs, if all its files are still there; else None."""
        entry = self._stages.get(stage)
        if entry is None or entry["key"] != key:
            return None
        for name, size in entry["files"].items():
            path = self._path.parent / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return dict(entry["result"])

    def finish(self, stage: str, key: str, files: list[Path], result: dict[str, Any]) -> None:
        """Record that `stage` ran with these inputs and made these files."""
        folder = self._path.parent
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        self._stages[stage] = {"key": key, "files": sizes, "result": result}
        self._write()

    def drop(self, *stages: str) -> None:
        """Take stages out of the record at once: what they left is not there any more."""
        for stage in stages:
            self._stages.pop(stage, None)
        self._write()

    def _write(self) -> None:
        value = {"format": FORMAT, "stages": self._stages}
        with writing(self._path):
            write_atomically(self._path, (json.dumps(value, indent=2) + "\n").encode())

    def files(self, stage: str) -> list[str]:
        """The files that `stage` left, as paths in the build's folder."""
        return list(self._stages[stage]["files"])

    def knows(self, stage: str) -> bool:
        """Whether `stage` ever finished here, with whatever inputs: what it left is ours to replace."""
        return stage in self._stages

    def stages(self, prefix: str) -> list[str]:
        """The finished stages whose name begins with `prefix`."""
        return [stage for stage in self._stages if stage.startswith(prefix)]


def stage_key(*inputs: object) -> str:
    """The hash of a stage's inputs; each input by its `repr`, so values that print alike are alike."""
    return hashlib.sha256("\0".join(repr(item) for item in inputs).encode()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a build's folder: a second build in it is refused instead of mixed in."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another moerge is building here; wait for it, or choose another folder"
            ) from None
        yield
