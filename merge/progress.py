"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Seconds between two plain lines of one piece of work.
LINE_EVERY = 10.0


class Progress(Protocol):
    """Told of bytes done; `message` is for a stage that has none to count."""

    def advance(self, count: int) -> None: ...


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._said = title, max(total, 1), 0, time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said >= LINE_EVERY:
            self._said = time.monotonic()
            say(f"{self._title}: {100 * self._done // self._total} %")


class _Bar:
    def __init__(self, title: str, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True, leave=False, file=sys.stderr)

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def progress(title: str, total: int, unit: str = "B") -> Iterator[Progress]:
    """Progress of one piece of work of `total` units, shown on standard error."""
    started = time.monotonic()
    if sys.stderr.isatty():
        bar = _Bar(title, total, unit)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield _Lines(title, total)
    say(f"{title}: done in {time.monotonic() - started:.1f} s")


def say(line: str) -> None:
    """One line to the person or the log that watches."""
    print(line, file=sys.stderr, flush=True)
