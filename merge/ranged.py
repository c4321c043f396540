"""Sources read by ranges: only the tensors that are asked for come to this machine, and go again to make room.

Each tensor is a file of its own in the store's folder. A transfer that was cut off goes on where it stopped, also after the
process was killed. A range of a file has no checksum on the Hub; each tensor's is kept when it comes, and what comes a second
time must be the same. Sources are pinned to commits, so a branch that moves changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from merge.checkpoint import Checkpoint
from merge.dtypes import SIZES, TORCH_TYPE
from merge.errors import DestinationError, SourceError
from merge.files import writing
from merge.source_files import Files
from merge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

# So many tensors used last stay when nothing is known of what will be wanted.
RECENT = 8
# A source's key in the plan, and a tensor of it.
Key = tuple[str, str]
# Fetches some bytes of a checkpoint's file into a file here: (checkpoint, file, first byte, count, path).
Fetch = Callable[[Checkpoint, str, int, int, Path], None]


class RangeStore:
    """Tensors of sources in `folder`, together at most about `capacity` bytes.

    Which go first to make room: those that `expect` says will be wanted last or never; without that those that came
    last, but for the last few. Threads may share it. `fetched` counts the bytes that came from the Hub.
    """

    def __init__(self, folder: Path, capacity: int, fetch: Fetch) -> None:
        self.folder, self.capacity, self.fetched = folder, capacity, 0
        self._fetch, self._lock = fetch, threading.RLock()
        self._next_use: Callable[[Key], float] | None = None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._index = folder / "index.jsonl"
        self._keys: dict[str, Key] = {}
        self._sums: dict[Key, str] = {}
        self._held: OrderedDict[Key, int] = OrderedDict()
        self._read_index()

    def expect(self, next_use: Callable[[Key], float] | None, needed: Collection[Key] = ()) -> None:
        """From here on a tensor is wanted next after `next_use(key)` steps (infinity: never again); the `needed` ones now."""
        with self._lock:
            self._next_use, self._needed = next_use, frozenset(needed)
            if next_use is not None:
                for key in [key for key in self._held if next_use(key) == float("inf") and key not in self._needed]:
                    self._drop(key)

    def make_room(self, count: int) -> None:
        """Let tensors go until `count` bytes more fit."""
        with self._lock:
            while self._held and sum(self._held.values()) + count > self.capacity:
                free = [key for key in self._held if self._next_use is None or key not in self._needed]
                if not free:
                    return
                rank = self._next_use
                # Who reads a model from its beginning to its end will begin again: what came first stays.
                self._drop((free[:-RECENT] or free)[-1] if rank is None else max(free, key=rank))

    def open(self, checkpoint: Checkpoint, tensor: str, info: TensorInfo) -> int:
        """An open file with the bytes of a tensor, fetched if need be."""
        key = (checkpoint.key, tensor)
        with self._lock:
            path = self._path(key)
            if self._held.get(key) == info.nbytes:
                self._held.move_to_end(key)
            else:
                self._held.pop(key, None)  # cut off, as a crash of the machine can leave it
                self.make_room(info.nbytes)
                self._bring(checkpoint, key, info, path)
                self._held[key] = info.nbytes
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            for key in list(self._held):
                self._drop(key)

    def _bring(self, checkpoint: Checkpoint, key: Key, info: TensorInfo, path: Path) -> None:
        if info.file is None or info.start is None:
            raise SourceError(f"{checkpoint.name}: where tensor {key[1]!r} lies is not known")
        if not info.nbytes:
            path.touch()
        else:
            self._fetch(checkpoint, info.file, info.start, info.nbytes, path)
        self.fetched += info.nbytes
        with writing(path), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        known = self._sums.get(key)
        if known is not None and known != found:
            path.unlink()
            raise SourceError(f"{checkpoint.name}: tensor {key[1]!r} came otherwise than the first time; run again")
        if known is None:
            self._sums[key] = found
            line = json.dumps({"source": key[0], "tensor": key[1], "sha256": found}) + "\n"
            with writing(self._index), self._index.open("a", encoding="utf-8") as index:
                index.write(line)

    def _drop(self, key: Key) -> None:
        del self._held[key]
        with writing(self.folder):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return self.folder / hashlib.sha256("\0".join(key).encode()).hexdigest()[:40]

    def _read_index(self) -> None:
        """What an earlier run left. A line that was cut off, and a tensor whose line never came, are as good as none."""
        if self._index.is_file():
            for line in self._index.read_text(encoding="utf-8").splitlines():
                try:
                    value = json.loads(line)
                    key = (str(value["source"]), str(value["tensor"]))
                    self._sums[key] = str(value["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue
        known = {self._path(key).name: key for key in self._sums}
        for path in self.folder.iterdir():
            if path.name in known:
                self._held[known[path.name]] = path.stat().st_size
            elif path != self._index and not path.name.endswith(".partial"):
                path.unlink()


class RangedFiles(Files):
    """The bytes of one checkpoint's tensors, from a `RangeStore`."""

    def __init__(self, checkpoint: Checkpoint, store: RangeStore) -> None:
        if checkpoint.tensors is None:
            raise SourceError(f"{checkpoint.name}: its weights are not there")
        self._checkpoint, self._store = checkpoint, store
        self._tensors: Mapping[str, TensorInfo] = checkpoint.tensors

    def fill(self, place: memoryview, tensor: str, start: int) -> None:
        """Fill `place` with the bytes of `tensor` from `start` on."""
        info = self._tensors.get(tensor)
        if info is None:
            raise SourceError(f"{self._checkpoint.name}: tensor {tensor!r} is not in it")
        descriptor = self._store.open(self._checkpoint, tensor, info)
        try:
            done = 0
            while done < place.nbytes:
                got = os.preadv(descriptor, [place[done:]], start + done)
                if got == 0:
                    raise SourceError(
                        f"{self._checkpoint.name}: tensor {tensor!r} is cut off on this machine; run again"
                    )
                done += got
        except OSError as error:
            raise DestinationError(f"{self._store.folder}: cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def flat(self, tensor: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of `tensor` in its own dtype, flattened; not to be written to."""
        import torch

        info = self._tensors[tensor]
        dtype, size = getattr(torch, TORCH_TYPE[info.dtype]), SIZES[info.dtype]
        if start == stop:
            return torch.empty(0, dtype=dtype)
        data = np.empty((stop - start) * size, dtype=np.uint8)
        self.fill(data.data, tensor, start * size)
        return torch.frombuffer(data, dtype=dtype)

    def check_unchanged(self) -> None:
        """A pinned commit does not change."""


def bytes_of(keys: Iterable[Key], sources: Mapping[str, Checkpoint]) -> int:
    """Bytes of some tensors of sources on the Hub; those of local sources take no room in a store."""
    total = 0
    for source, tensor in keys:
        infos = sources[source].tensors
        if sources[source].is_hub and infos is not None:
            total += infos[tensor].nbytes
    return total
