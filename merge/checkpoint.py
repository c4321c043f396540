"""A checkpoint as its headers tell it: config.json, the tensors with dtype, shape and place, and the list of files.

The safetensors header is parsed here, strictly: it comes from strangers. Older checkpoints are pickles; `merge.pickles` reads
those, and where a repository has both the safetensors are taken.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.dtypes import SIZES
from merge.errors import SourceError
from merge.tensors import TensorInfo

if TYPE_CHECKING:
    from merge.ranged import RangeStore

# The safetensors library's own limit for a header, in bytes.
MAX_HEADER = 100_000_000
MAX_JSON = 64_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
# What a merge copies along from the base, when it is there.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True)
class Layout:
    """What the files of a kind of checkpoint are called. `weights`: the index of the shards (none for an adapter) and the
    single file, the preferred format first."""

    what: str
    config: str
    weights: tuple[tuple[str | None, str], ...]


MODEL = Layout("a model", "config.json", ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)))
# https://huggingface.co/docs/peft/developer_guides/checkpoint
ADAPTER = Layout(
    "a PEFT adapter", "adapter_config.json", ((None, "adapter_model.safetensors"), (None, "adapter_model.bin"))
)


@dataclass(frozen=True)
class Checkpoint:
    """A source model, known from its headers.

    `key` names it in a plan: `owner/name@commit`, or the folder. `commit` is None for a local folder, whose `fingerprint`
    then tells a changed file. `tensors` is None where the headers could not be had (`why_no_headers` says why). `adapter` is
    the LoRA adapter that a recipe names with the model.
    """

    key: str
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] | None
    files: Mapping[str, int]
    commit: str | None = None
    folder: Path | None = None
    license: str | None = None
    why_no_headers: str | None = None
    fingerprint: str = field(default="")
    adapter: Checkpoint | None = None
    # SHA-256 by file name, where the Hub tells it (LFS files).
    sha256: Mapping[str, str] = field(default_factory=dict)
    # git's blob id of the others.
    blob_ids: Mapping[str, str] = field(default_factory=dict)
    # Reads its tensors where they are not all on this machine.
    ranges: RangeStore | None = field(default=None, compare=False, repr=False)

    @property
    def is_hub(self) -> bool:
        return self.folder is None

    @property
    def companions(self) -> tuple[str, ...]:
        """The tokenizer and generation files that a merge copies from this checkpoint."""
        return tuple(name for name in COMPANION_FILES if name in self.files)


def parse_header(raw: bytes, file: str, data_start: int, file_size: int) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    `raw` is the JSON header, `data_start` the offset of the data behind it, `file_size` in bytes. Raises SourceError
    where the header does not describe the file: an unknown dtype, an overlap, bytes beyond the end.
    """
    header = load_json(raw, file)
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise SourceError(f"{file}: the header entry of tensor {name!r} is not one of safetensors'") from None
        if dtype not in SIZES:
            raise SourceError(f"{file}: tensor {name!r} has dtype {dtype!r}, which no merge can read")
        if not _whole_numbers(shape) or not _whole_numbers([begin, end]):
            raise SourceError(f"{file}: tensor {name!r} has a shape or offset that is not a list of whole numbers")
        info = TensorInfo(dtype, tuple(shape), file, data_start + begin)
        if end - begin != info.nbytes or data_start + end > file_size:
            raise SourceError(f"{file}: tensor {name!r} does not fit its bytes; the file is truncated or damaged")
        tensors[name] = info
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise SourceError(f"{file}: tensors {name!r} and {other!r} overlap; the file is damaged")
    return tensors


def header_length(first8: bytes, file: str, file_size: int) -> int:
    """Length of the JSON header that the first eight bytes of a safetensors file announce."""
    if len(first8) < 8:
        raise SourceError(f"{file}: not a safetensors file (shorter than eight bytes)")
    length: int = struct.unpack("<Q", first8)[0]
    if length > MAX_HEADER or length + 8 > file_size:
        raise SourceError(f"{file}: not a safetensors file, or truncated (its header claims {length} bytes)")
    return length


def check_config(files: Mapping[str, int], layout: Layout, where: str, holder: str) -> None:
    """Raises SourceError where the configuration that makes a repository or folder (`holder`) a model's, or an adapter's, is
    not among its files."""
    if layout.config in files:
        return
    hint = ""
    if layout is MODEL and ADAPTER.config in files:
        hint = f"; it is a PEFT adapter: name it with its base, as base+{where}"
    elif layout is ADAPTER and MODEL.config in files:
        hint = "; it is a model of its own"
    raise SourceError(f"{where}: no {layout.config} in the {holder}, so it is not {layout.what}{hint}")


def weight_files(
    files: Mapping[str, int], layout: Layout, read_json: Callable[[str], dict[str, Any]], where: str
) -> list[str]:
    """The files that hold a checkpoint's tensors, in order; none where there are only other files.

    `read_json` reads one of `files`. Raises SourceError for an index that names a file that is not there.
    """
    if layout is MODEL and (shards := complete_set(files)):
        return shards
    for index, single in layout.weights:
        if index is not None and index in files:
            names = shard_names(read_json(index), f"{where}/{index}", Path(single).suffix)
            for name in names:
                if name not in files:
                    raise SourceError(f"{where}: the index names {name}, which is not there")
            return names
        if single in files:
            return [single]
    return []


def complete_set(files: Mapping[str, int]) -> list[str]:
    """The shards of a model whose files say by their names alone that they are all: no index is needed, and none fetched.
    Empty where there is another file of weights beside them, or one is missing."""
    found = sorted(name for name in files if name.endswith(".safetensors"))
    whole = [f"model-{number:05}-of-{len(found):05}.safetensors" for number in range(1, len(found) + 1)]
    return found if found == whole else []


def shard_names(index: Mapping[str, Any], where: str, suffix: str) -> list[str]:
    """The shard files that an index names, in order. Raises SourceError on a name with a path in it."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: no weight_map in it")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(suffix):
            raise SourceError(f"{where}: {name!r} is not the name of a {suffix} file beside it")
    return names


def load_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes."""
    if len(raw) > MAX_HEADER:
        raise SourceError(f"{where}: larger than any header we read ({len(raw)} bytes)")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: a JSON object was expected")
    return value


def open_folder(folder: Path, name: str | None = None, layout: Layout = MODEL) -> Checkpoint:
    """The checkpoint in a local folder, from its headers. Raises SourceError where there is none."""
    shown = name or str(folder)
    if not folder.is_dir():
        raise SourceError(f"{shown}: there is no such folder ({folder})")
    config_file = folder / layout.config
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    check_config(files, layout, shown, "folder")
    config = load_json(_read_small(config_file), f"{shown}/{layout.config}")
    shards = weight_files(files, layout, lambda file: load_json(_read_small(folder / file), f"{shown}/{file}"), shown)
    digest = hashlib.sha256(_read_small(config_file))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        header, found = open_shard(folder / shard, f"{shown}/{shard}")
        stat = (folder / shard).stat()
        digest.update(header + f"{stat.st_size}:{stat.st_mtime_ns}".encode())
        add_shard(tensors, found, shard, shown)
    for companion in COMPANION_FILES:
        if companion in files:
            digest.update(companion.encode() + (folder / companion).read_bytes())
    return Checkpoint(
        key=shown,
        name=shown,
        config=config,
        tensors=tensors if shards else None,
        files=files,
        folder=folder,
        license=front_matter_license(folder / "README.md"),
        why_no_headers=None if shards else missing_weights(files),
        fingerprint=digest.hexdigest(),
    )


def missing_weights(files: Mapping[str, int]) -> str:
    """Why a list of files holds no checkpoint: `pickle` (shards of one, but no index of them) or `config-only`."""
    return (
        "pickle" if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files) else "config-only"
    )


def front_matter_license(readme: Path) -> str | None:
    """The `license:` line of a model card's front matter."""
    if not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as lines:
        if lines.readline().rstrip() != "---":
            return None
        for _, line in zip(range(500), lines, strict=False):
            if line.rstrip() == "---":
                return None
            if line.startswith("license:"):
                return line.removeprefix("license:").strip().strip("'\"") or None
    return None


def add_shard(tensors: dict[str, TensorInfo], found: Mapping[str, TensorInfo], shard: str, where: str) -> None:
    """Add the tensors `found` in a file to those of the checkpoint. Raises SourceError for one that is there already."""
    if twice := tensors.keys() & found.keys():
        raise SourceError(f"{where}: tensor {min(twice)!r} stands in two shards")
    tensors.update((name, replace(info, file=shard)) for name, info in found.items())


def open_shard(path: Path, shown: str) -> tuple[bytes, dict[str, TensorInfo]]:
    """The tensors of one file on this machine, safetensors or pickle, and the bytes that say so."""
    if path.suffix == ".bin":
        from merge.pickles import read_pickle_file

        found = read_pickle_file(path, shown)
        return repr(list(found.items())).encode(), found
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = header_length(file.read(8), shown, size)
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{shown}: cannot be read ({error.strerror})") from None
    return raw, parse_header(raw, shown, 8 + length, size)


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON:
            raise SourceError(f"{path}: larger than any {path.name} we read")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)
