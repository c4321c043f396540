"""How much memory a process may take on this machine: of all of it, or of the control group that holds us (a container's)."""

from __future__ import annotations

import os
from pathlib import Path


def all_memory() -> int:
    """Bytes that a process could take were it alone."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group("max")])


def available_memory() -> int:
    """Bytes that a process may take here now."""
    free = next(int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:"))
    limit, used = _group("max"), _group("current")
    if limit and used:
        # Pages of files that are only cached are given back when they are needed.
        cached = next((int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line[:5] == "file "), 0)
        free = min(free, limit[0] - used[0] + cached)
    return free


def _group(name: str) -> list[int]:
    """The control group's number of that name, if it has one."""
    return [int(line) for line in _lines(f"/sys/fs/cgroup/memory.{name}") if line.strip().isdigit()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
