"""Prompts from a slice of a dataset's file on the Hub: pinned to a commit, read from its beginning by ranges, kilobytes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.errors import SourceError
from merge.gates.prompts import PromptError, read_prompts
from merge.reference import parse_reference

if TYPE_CHECKING:
    from merge.hub import Hub
    from merge.recipe import PromptSlice

# What is read of a file at first, and at most: a text of a megabyte is no prompt.
FIRST_BYTES, MAX_BYTES = 64 << 10, 4 << 20
ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".md")


@dataclass(frozen=True)
class PromptsRead:
    """Texts from a dataset's file at a commit, and how many bytes of it were read for them."""

    dataset: str
    commit: str
    file: str
    bytes: int
    texts: tuple[str, ...]


def read_slice(hub: Hub, slice_: PromptSlice) -> PromptsRead:
    """The first `limit` texts of the file. Raises SourceError where it cannot be had, PromptError where it is none of ours."""
    try:
        reference = parse_reference(slice_.dataset)
    except ValueError as error:
        raise PromptError(f"{slice_.dataset!r} is no dataset: {error}") from None
    if reference.is_local or reference.adapter is not None:
        raise PromptError(f"{slice_.dataset!r} is no dataset on the Hub; a file beside the recipe is a prompts_file")
    if not slice_.file.endswith(ENDINGS):
        raise PromptError(f"{slice_.file}: not one of {', '.join(ENDINGS)}")
    commit, files = hub.dataset(reference)
    shown = f"{reference}/{slice_.file}"
    if slice_.file not in files:
        raise SourceError(f"{shown}: there is no such file in the dataset")
    size = files[slice_.file]
    raw, wanted = b"", min(size, FIRST_BYTES)
    while True:
        raw += hub.dataset_range(reference, commit, slice_.file, len(raw), wanted) if wanted > len(raw) else b""
        cut = len(raw) < size
        more = cut and len(raw) < MAX_BYTES
        try:
            texts = read_prompts(raw, slice_.file, slice_.field, slice_.limit, cut)
        except PromptError:
            if not more:
                raise
            texts = ()
        if not more or len(texts) >= slice_.limit:
            return PromptsRead(reference.path, commit, slice_.file, len(raw), texts)
        wanted = min(size, MAX_BYTES, 4 * wanted)
