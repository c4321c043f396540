"""Runs `moerge` again and again, killed before its first change to the disk, before its second, and so on; each time it is
run once more, to its end: `python -m tests.bot.kills FOLDER BEGIN END COMMAND…`.

Changes are counted from the first one to a path with BEGIN in it to the first one to a path with END in it. The command's
output is FOLDER/<number of the change>, its place in COMMAND is `OUT`. A process is forked for each run, so that what is
imported is imported once; the kill is a real SIGKILL. Prints how many kills there were.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bot.checkpoints
import bot.merging  # noqa: F401
import evals.weights  # noqa: F401
from bot.cli import main
from merge.writer import write_checkpoint

# Small enough for several shards.
SHARD_BYTES = 100_000
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def changed(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an audit event of Python changes, if it does."""
    if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
        return str(args[0])
    return None


def kill_at(number: int, begin: str, end: str) -> None:
    """Kill this process before change `number`."""
    seen, counting = 0, False

    def count(path: str) -> None:
        nonlocal seen, counting
        counting = (counting or begin in path) and end not in path
        seen += counting
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if (path := changed(event, args)) is not None:
            count(path)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            count("")
            return call(*args)

        return wrapper

    sys.addaudithook(audit)
    os.pwrite, os.fsync = counted(os.pwrite), counted(os.fsync)


def run(command: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """The wait status of a process that runs `moerge` with these arguments."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        prepare()
        os._exit(main(command))
    return os.waitpid(child, 0)[1]


def shards(out: Path) -> dict[str, int]:
    """When the finished shards of a checkpoint under way were written."""
    found = [*out.parent.glob(f"{out.name}*/*.safetensors"), *out.glob("model*/*.safetensors")]
    return {path.name: path.stat().st_mtime_ns for path in found}


def kill_everywhere(folder: Path, begin: str, end: str, command: list[str]) -> int:
    """Returns the number of kills."""
    assert write_checkpoint.__kwdefaults__ is not None
    write_checkpoint.__kwdefaults__["shard_bytes"] = SHARD_BYTES
    for number in itertools.count(1):
        out = folder / str(number)
        here = [str(out) if word == "OUT" else word for word in command]
        status = run(here, lambda number=number: kill_at(number, begin, end))  # type: ignore[misc]
        if status == 0:
            return number - 1
        assert os.WIFSIGNALED(status), f"change {number}: the run ended with {status}"
        before = {name: when for name, when in shards(out).items() if name.startswith("model")}
        assert run(here) == 0, f"change {number}: the second run failed"
        after = shards(out)
        assert {name: after[name] for name in before} == before, f"change {number}: a finished shard was written again"
    raise AssertionError


if __name__ == "__main__":
    print(kill_everywhere(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
