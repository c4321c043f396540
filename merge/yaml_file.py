"""YAML from strangers: a size cap, no aliases, no tags, no duplicate keys, and the line of every value.

PyYAML's safe loader builds no objects, but it follows aliases and merge keys (a 300-byte file can hold it for a quarter of a
minute), keeps the last of two equal keys, and forgets where a value stood. So each event is checked before a
node is made of it, and the value is built from the node tree here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from merge.errors import RecipeError
from merge.findings import AliasUsed, DuplicateKey, Finding, NotText, NotYaml, TagUsed, TooDeep, TooLarge

MAX_BYTES = 256 * 1024
MAX_DEPTH = 24
MAX_BITS = 256

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A YAML document: its plain value, and for each path into it the line (from 1) and the scalar as written."""

    value: Any
    lines: Mapping[Path, int]
    written: Mapping[Path, str]

    def line(self, path: Path) -> int | None:
        """The line of `path`, or of the nearest thing around it that has one."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def load(raw: bytes, path: str) -> Document:
    """Parse one YAML document. Raises RecipeError with a finding at its line where it is broken or hostile."""
    try:
        return _load(raw)
    except _Refused as refused:
        raise RecipeError([refused.finding], path) from None


class _Refused(Exception):
    def __init__(self, finding: Finding) -> None:
        self.finding = finding


def _load(raw: bytes) -> Document:
    if len(raw) > MAX_BYTES:
        raise _Refused(TooLarge(size=len(raw), limit=MAX_BYTES))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Refused(NotText(line, problem=f"byte {error.start} is not UTF-8")) from None
    try:
        node = _compose(text)
        lines: dict[Path, int] = {}
        written: dict[Path, str] = {}
        value = None if node is None else _build(node, (), lines, written, SafeConstructor())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Refused(NotText(line, problem=f"character U+{int(error.character):04X} is not allowed")) from None
    except yaml.MarkedYAMLError as error:
        marks: list[Any] = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
        place = marks[0].line + 1 if marks else None
        problem = " ".join(part for part in (error.problem, error.context) if part)
        raise _Refused(NotYaml(place, problem=problem)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is no date
        raise _Refused(NotYaml(problem=str(error))) from None
    return Document(value, lines, written)


def _compose(text: str) -> yaml.Node | None:
    """The one document of a text, refused at the first event that no recipe needs: nothing has been built of it by then."""
    loader = _Loader(text)
    try:
        # The stream's start.
        loader.get_event()  # type: ignore[no-untyped-call]
        if loader.check_event(yaml.StreamEndEvent):
            return None
        node = loader.compose_document()
        if not loader.check_event(yaml.StreamEndEvent):
            line = loader.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise _Refused(NotYaml(line, problem="a second document begins here; a recipe is one document"))
        return node
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's own, without aliases, tags and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(AliasUsed(line, shown=f"*{event.anchor}"))
        if event.tag is not None:
            raise _Refused(TagUsed(line, tag=event.tag))
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise _Refused(TooDeep(line, limit=MAX_DEPTH))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _build(
    node: yaml.Node, path: Path, lines: dict[Path, int], written: dict[Path, str], scalars: SafeConstructor
) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    match node:
        case yaml.MappingNode():
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise _Refused(NotYaml(line, problem="a key must be a plain word"))
                key = key_node.value
                if key == "<<":
                    raise _Refused(AliasUsed(line, shown="<<"))
                if key in result:
                    raise _Refused(DuplicateKey(line, key=key, first=lines[(*path, key)]))
                lines[(*path, key)] = line
                result[key] = _build(value_node, (*path, key), lines, written, scalars)
            return result
        case yaml.SequenceNode():
            return [_build(item, (*path, index), lines, written, scalars) for index, item in enumerate(node.value)]
        case _:
            written[path] = node.value
            try:
                value = scalars.construct_object(node)
                # No number of a recipe needs more; Python refuses to write out one of thousands of digits.
                if isinstance(value, int) and value.bit_length() > MAX_BITS:
                    raise ValueError
            except (ValueError, OverflowError):
                line, shown = node.start_mark.line + 1, _short(node.value)
                raise _Refused(NotYaml(line, problem=f"{shown!r} cannot be read as a value; quote it")) from None
            return value


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
