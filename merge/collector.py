"""Python's garbage collector, paused.

A tokenizer's files are parsed into objects by the hundred thousand, none of them garbage, among which the collector would look
again and again: more than half of the time that loading one with transformers takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """No collection for the time of a `with`."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
