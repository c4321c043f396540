"""How a recipe names a model: `owner/name`, `owner/name@revision`, or a local folder; `model+adapter` for a model with a LoRA
adapter, as in mergekit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9_-])?")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """`path` is the Hub's `owner/name`, or the folder as written; `revision` a branch, tag or commit. `adapter` is the LoRA
    adapter on top of that model."""

    path: str
    revision: str | None = None
    is_local: bool = False
    adapter: ModelReference | None = None

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{text}+{self.adapter}" if self.adapter else text

    @property
    def model(self) -> ModelReference:
        """The model without its adapter."""
        return replace(self, adapter=None)

    @property
    def parts(self) -> tuple[ModelReference, ...]:
        """The model, and its adapter where it has one."""
        return (self,) if self.adapter is None else (self.model, self.adapter)


def parse_reference(text: str) -> ModelReference:
    """Parse a model reference. Raises ValueError saying what is wrong with it."""
    if not text.strip():
        raise ValueError("it is empty")
    if any(not c.isprintable() for c in text):
        raise ValueError("it has control characters")
    text, plus, adapter = text.partition("+")
    if plus:
        if "+" in adapter:
            raise ValueError("a model takes one adapter: model+adapter")
        return replace(parse_reference(text), adapter=parse_reference(adapter))
    if text.startswith((".", "/", "~")):
        return ModelReference(text, is_local=True)
    if text.startswith(("http:", "https:")):
        raise ValueError("a web address is not needed")
    path, at, revision = text.partition("@")
    parts = path.split("/")
    if len(parts) != 2:
        raise ValueError("a model on the Hub has one slash, a local folder begins with ./ or /")
    for part in parts:
        if not _PART.fullmatch(part) or ".." in part or "--" in part:
            raise ValueError(f"{part!r} is not a name the Hub allows")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ValueError(f"{revision!r} is not a revision")
    return ModelReference(path, revision or None)
