"""What a step says to GitHub: annotations, masks, groups, outputs and the summary.

A line of the log that begins with `::` is a command to the runner, whoever wrote it. So every value is escaped here, and
what comes from recipes, models or libraries is printed only inside `untrusted`.
https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import ctypes
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge.errors import DestinationError
from merge.findings import printable

# GitHub keeps this many annotations of each level per step, and this many characters of each.
ANNOTATIONS = 10
ANNOTATION_CHARACTERS = 4096
SUMMARY_BYTES = 1024 * 1024
OUTPUT_BYTES = 1024 * 1024
LEVELS = ("error", "warning", "notice")


def escape_data(text: str) -> str:
    """`text` as the message of a command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """`text` as the value of a command's property."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def emit(line: str) -> None:
    """One command to the runner, on its own line whatever was printed before."""
    sys.stderr.flush()
    print(line, flush=True)


def mask(secret: str | None) -> None:
    """Have the runner replace a secret in everything that is printed from now on."""
    for line in (secret or "").splitlines():
        if line.strip():
            emit(f"::add-mask::{escape_data(line.strip())}")


@contextmanager
def group(title: str) -> Iterator[None]:
    """What is printed in the block can be folded away in the log."""
    emit(f"::group::{escape_data(printable(title))}")
    try:
        yield
    finally:
        emit("::endgroup::")


@contextmanager
def untrusted() -> Iterator[None]:
    """Nothing that is printed in the block, by whomever, is a command: the word that ends it cannot be guessed."""
    word = secrets.token_hex(16)
    emit(f"::stop-commands::{word}")
    try:
        yield
    finally:
        # Libraries in C keep what they print in a buffer of their own; flushed later, it would be read as commands.
        ctypes.CDLL(None).fflush(None)
        emit(f"::{word}::")


class Annotations:
    """Annotations of this step. What is over GitHub's limits is printed to the log, and the last one kept says so."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(
        self, level: str, message: str, *, file: str | None = None, line: int | None = None, title: str = ""
    ) -> None:
        """One annotation of `level` error, warning or notice, at a line of a file where it has one."""
        assert level in LEVELS
        self.counts[level] += 1
        count = self.counts[level]
        if count > ANNOTATIONS:
            with untrusted():
                place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
                print(printable(f"{place}{level}: {message}"), flush=True)
            return
        if count == ANNOTATIONS:
            message = (
                f"{_cut(message, ANNOTATION_CHARACTERS - 100)}\nIf there are more, they are in the log and the summary."
            )
        properties = {"file": file, "line": str(line) if line else None, "title": title or None}
        said = ",".join(f"{name}={escape_property(value)}" for name, value in properties.items() if value)
        emit(f"::{level}{' ' if said else ''}{said}::{escape_data(_cut(message, ANNOTATION_CHARACTERS))}")


def write_output(path: Path | None, name: str, value: str) -> None:
    """Set an output of the step. Its end is marked by a word that the value cannot know. Without a file, it is printed.

    Raises DestinationError where it is too long for GitHub.
    """
    if len(value.encode(errors="backslashreplace")) > OUTPUT_BYTES:
        raise DestinationError(f"output {name} is longer than the {OUTPUT_BYTES} bytes that GitHub takes")
    if path is None:
        with untrusted():
            print(f"{name}={value}", flush=True)
        return
    word = f"end-{secrets.token_hex(16)}"
    _append(path, f"{name}<<{word}\n{value}\n{word}\n")


def read_outputs(path: Path) -> dict[str, str]:
    """The outputs of a step that has ended, as GitHub's runner reads them."""
    found: dict[str, str] = {}
    lines = iter(path.read_text(encoding="utf-8").split("\n")) if path.is_file() else iter(())
    for line in lines:
        name, marker, word = line.partition("<<")
        if not marker:
            continue
        value = []
        for part in lines:
            if part == word:
                break
            value.append(part)
        found[name] = "\n".join(value)
    return found


class Summary:
    """The step's summary in Markdown, from whole sections: one that would pass GitHub's limit is left out, and counted."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sections: list[str] = []
        self._bytes = 0
        self._left_out = 0

    def add(self, section: str) -> None:
        """Add a section, which must be whole Markdown and safe already."""
        size = len(section.encode(errors="backslashreplace")) + 2
        if self._bytes + size > SUMMARY_BYTES - 1024:
            self._left_out += 1
            return
        self._bytes += size
        self._sections.append(section)

    def write(self) -> None:
        """Write it once, at the end. Without a file there is nobody to read it."""
        sections = list(self._sections)
        if self._left_out:
            sections.append(
                f"*{self._left_out} more sections are left out: a summary has at most 1 MiB. The log and the outputs have all.*"
            )
        if self._path is not None and sections:
            _append(self._path, "\n\n".join(sections) + "\n")


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise DestinationError(f"{path}: {error.strerror}; it is where GitHub reads what a step says") from None


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
