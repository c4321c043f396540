"""How a GGUF file is split: which tensors are in which part, from headers alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.expr import Expr
from quants.filetypes import FileType, padded, tensor_bytes
from quants.layout import VOCABULARY_BYTES, GgufTensor, Layout
from quants.mixtures import layer_of
from quants.nodes import GgufExpr, HeadRows, Part, Permute, RopeFactors, Stack

# Layers of a twin, beyond those without experts that a model may begin with.
TWIN_LAYERS = 2
# At most about what a tensor takes in the list of them, and what the keys of a file take beside its vocabulary.
ENTRY_BYTES, KEY_BYTES = 160, 64_000


@dataclass(frozen=True)
class SplitFile:
    """A GGUF file of one type, in parts. `types` are those of the whole file, whichever part is written."""

    layout: Layout
    file_type: FileType
    types: Mapping[str, str]
    parts: tuple[tuple[GgufTensor, ...], ...]
    paths: tuple[Path, ...]

    @classmethod
    def of(cls, layout: Layout, file_type: FileType, path: Path, max_bytes: int, imatrix: bool) -> SplitFile:
        """The parts of the file `path`, each with at most `max_bytes` of tensor data if its tensors allow."""
        types = layout.types(file_type, imatrix)
        parts = tuple(tuple(part) for part in shards(layout, types, max_bytes))
        return cls(layout, file_type, types, parts, tuple(shard_paths(path, len(parts))))

    def file_bytes(self, tensors: Sequence[GgufTensor], *, first: bool) -> int:
        """At most about the bytes of a file with some of its tensors; the first of a split file has the vocabulary."""
        data = sum(padded(tensor_bytes(self.types[tensor.name], tensor.expr.shape)) for tensor in tensors)
        keys = KEY_BYTES + 2 * VOCABULARY_BYTES * self.layout.shapes["token_embd.weight"][0] if first else 4096
        return data + ENTRY_BYTES * len(tensors) + keys

    def twin_tensors(self, first_layers: int) -> tuple[GgufTensor, ...]:
        """The tensors of its twin, of which the first `first_layers` layers have no experts."""
        layers = self.twin_layers(first_layers)
        return tuple(tensor for tensor in self.layout.tensors if (layer_of(tensor.name) or 0) < layers)

    def twin_layers(self, first_layers: int) -> int:
        """Layers of the twin."""
        return twin_layers(self.layout, first_layers)


def twin_layers(layout: Layout, first_layers: int) -> int:
    """Layers of a model's twin, where the first `first_layers` have no experts."""
    return min(first_layers + TWIN_LAYERS, layout.model.layers)


def shards(layout: Layout, types: Mapping[str, str], max_bytes: int | None) -> list[list[GgufTensor]]:
    """The tensors of each file of a split one, as llama.cpp's gguf-split divides them: by size, in order."""
    parts: list[list[GgufTensor]] = [[]]
    size = 0
    for tensor in layout.tensors:
        nbytes = padded(tensor_bytes(types[tensor.name], tensor.expr.shape))
        if max_bytes is not None and parts[-1] and size + nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += nbytes
    return parts


def shard_paths(path: Path, count: int) -> list[Path]:
    """The names that llama.cpp looks for: `name-00001-of-00003.gguf`; `path` itself where there is only one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]


def expressions_of(tensors: Iterable[GgufTensor]) -> Iterator[Expr]:
    """The plan's expressions that GGUF tensors are made of."""
    for tensor in tensors:
        yield from _expressions(tensor.expr)


def _expressions(x: GgufExpr) -> Iterator[Expr]:
    match x:
        case RopeFactors():
            return
        case Permute() | Part() | HeadRows():
            yield from _expressions(x.x)
        case Stack():
            for each in x.xs:
                yield from _expressions(each)
        case _:
            yield x
