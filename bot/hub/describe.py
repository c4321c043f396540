"""What the API says of a repository, a file, a commit: JSON in the Hub's words."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bot.hub import card
from bot.hub.objects import Commit
from bot.hub.repository import File, Folder, Repository, iso

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEADER_BYTES = 64 << 20
_TEXT_BYTES = 4 << 20


def repository(repo: Repository, commit: str, *, blobs: bool = False, expand: Sequence[str] = ()) -> dict[str, Any]:
    """A repository at a commit; `blobs` adds size and hashes to each of its files. With `expand` nothing but the properties
    of these names is told, or looked up."""
    seen = _Seen(repo, commit, blobs)
    names = [name for name in (expand or PROPERTIES) if repo.name.kind == "model" or name not in _OF_MODELS]
    answer = {"_id": commit[:24], "id": repo.name.id} | {name: PROPERTIES[name](seen) for name in names}
    return {name: value for name, value in answer.items() if value is not None}


@dataclass(frozen=True)
class _Seen:
    """What the properties of a repository at a commit are found in."""

    repo: Repository
    commit: str
    blobs: bool

    @cached_property
    def files(self) -> dict[str, File]:
        return {file.path: file for file in self.repo.files(self.commit)}

    @cached_property
    def card(self) -> dict[str, Any] | None:
        return card_data(self.repo, self.files.get("README.md"))

    @property
    def tags(self) -> list[str]:
        kinds = {kind for kind in ("safetensors", "gguf") if any(path.endswith(f".{kind}") for path in self.files)}
        return list(dict.fromkeys([*sorted(kinds), *card.tags(self.card or {})]))

    @property
    def config(self) -> dict[str, Any] | None:
        config = _json(self.repo, self.files.get("config.json"))
        if not isinstance(config, dict):
            return None
        return {key: config[key] for key in ("architectures", "model_type") if key in config}

    @property
    def safetensors(self) -> dict[str, Any] | None:
        headers = safetensors_headers(self.repo, self.files, INDEX if INDEX in self.files else SINGLE)
        return _parameters(headers) if headers else None


# By its name in `expand`; what is None is left out.
PROPERTIES: dict[str, Callable[[_Seen], Any]] = {
    "author": lambda seen: seen.repo.name.owner,
    "sha": lambda seen: seen.commit,
    "createdAt": lambda seen: seen.repo.settings.created_at,
    "lastModified": lambda seen: iso(seen.repo.objects.commit(seen.commit).date),
    "private": lambda seen: seen.repo.settings.private,
    "gated": lambda seen: seen.repo.settings.gated,
    "disabled": lambda seen: False,
    "downloads": lambda seen: 0,
    "likes": lambda seen: 0,
    "tags": lambda seen: seen.tags,
    "siblings": lambda seen: [_sibling(file, seen.blobs) for file in seen.files.values()],
    "usedStorage": lambda seen: sum(file.size for file in seen.files.values() if file.lfs),
    "cardData": lambda seen: seen.card,
    "modelId": lambda seen: seen.repo.name.id,
    "pipeline_tag": lambda seen: (seen.card or {}).get("pipeline_tag"),
    "library_name": lambda seen: (seen.card or {}).get("library_name"),
    "model-index": lambda seen: (seen.card or {}).get("model-index"),
    "config": lambda seen: seen.config,
    "safetensors": lambda seen: seen.safetensors,
}
_OF_MODELS = frozenset({"modelId", "pipeline_tag", "library_name", "model-index", "config", "safetensors"})


def item(entry: File | Folder) -> dict[str, Any]:
    """A file or a folder, as in tree and paths-info."""
    if isinstance(entry, Folder):
        return {"type": "directory", "oid": entry.oid, "size": 0, "path": entry.path}
    answer: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.lfs:
        pointer_size = len(entry.lfs.encode())
        answer["lfs"] = {"oid": entry.lfs.sha256, "size": entry.lfs.size, "pointerSize": pointer_size}
    return answer


def items(repo: Repository, commit: str, entries: Sequence[File | Folder], *, expand: bool) -> list[dict[str, Any]]:
    """Files and folders; `expand` adds the commit that last changed each."""
    answers = [item(entry) for entry in entries]
    if expand:
        last = repo.last_commits(commit, [entry.path for entry in entries])
        for answer in answers:
            oid = last[answer["path"]]
            value = repo.objects.commit(oid)
            answer["lastCommit"] = {"id": oid, "title": value.title, "date": iso(value.date)}
    return answers


def commit(oid: str, value: Commit) -> dict[str, Any]:
    """A commit, as in the list of commits."""
    return {
        "id": oid,
        "title": value.title,
        "message": value.body,
        "authors": [{"user": value.author, "avatar": ""}],
        "date": iso(value.date),
    }


def text(repo: Repository, file: File | None) -> str | None:
    """The text of a small file, with what is not UTF-8 replaced; None where there is none or it is large."""
    if file is None or file.lfs or file.size > _TEXT_BYTES:
        return None
    return repo.objects.read(file.oid, "blob").decode("utf-8", "replace")


def card_data(repo: Repository, readme: File | None) -> dict[str, Any] | None:
    """The card's metadata, if it can be read."""
    content = text(repo, readme)
    try:
        return card.metadata(content) if content is not None else None
    except card.CardError:
        return None


def safetensors_headers(repo: Repository, by_path: dict[str, File], name: str) -> dict[str, dict[str, Any]]:
    """The headers of a safetensors model by file: of the shards of an index, or of one file. Empty where unreadable."""
    shards = [name]
    if name.endswith(".index.json"):
        index = _json(repo, by_path.get(name))
        weights = index.get("weight_map") if isinstance(index, dict) else None
        shards = sorted({str(each) for each in weights.values()}) if isinstance(weights, dict) else []
    found = {}
    for shard in shards:
        file = by_path.get(shard)
        header = _header(repo.lfs_path(file.lfs.sha256)) if file is not None and file.lfs else None
        if header is None:
            return {}
        found[shard] = header
    return found


@functools.lru_cache(maxsize=64)
def _header(path: Path) -> dict[str, Any] | None:
    """The JSON header of a safetensors file (https://huggingface.co/docs/safetensors/index#format)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            value = json.loads(file.read(length)) if length <= _HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parameters(headers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    count: Counter[str] = Counter()
    for header in headers.values():
        for name, tensor in header.items():
            shape = tensor.get("shape") if isinstance(tensor, dict) else None
            if (
                name != "__metadata__"
                and isinstance(shape, list)
                and all(isinstance(n, int) and 0 <= n < 1 << 40 for n in shape)
            ):
                count[str(tensor.get("dtype"))] += math.prod(shape)
    return {"parameters": dict(count), "total": count.total()}


def _json(repo: Repository, file: File | None) -> Any:
    content = text(repo, file)
    try:
        return json.loads(content) if content is not None else None
    except (ValueError, RecursionError):
        return None


def _sibling(file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    answer: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        answer["lfs"] = {"sha256": file.lfs.sha256, "size": file.size, "pointerSize": len(file.lfs.encode())}
    return answer
