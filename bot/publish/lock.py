"""moerge.lock.json: what a release was made from, and the checksum of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.results import Report
from merge.errors import DestinationError

LOCK = "moerge.lock.json"
MAX_LOCK = 10_000_000
FORMAT = 2

# By repository, by name: {"sha256": …, "bytes": …}.
Checksums = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Lock:
    """A release as its lock file tells it. `identity` is None in a lock of an early moerge."""

    identity: str | None
    value: Mapping[str, Any]

    def files(self, repo: str) -> dict[str, dict[str, Any]]:
        """The files of ours in a repository, by name."""
        return dict(self.value["files"].get(repo, {}))


def identity(report: Report, quants: Sequence[str] | None = None) -> str:
    """The identity of a release: parsed recipe, pinned sources, version of moerge, GGUF types.

    `quants` are the types that were asked for; without them those that were made, or could not be.
    """
    made = [quant.type for quant in report.quants] + [quant.type for quant in report.failed_quants]
    asked = made if quants is None else quants
    said = {
        "moerge": report.moerge_version,
        "recipe": report.recipe_identity,
        "sources": _sources(report),
        "gates": report.gates_key,
        "quants": sorted(asked),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def lock_file(report: Report, files: Checksums) -> bytes:
    """The lock's bytes: the same for the same release. `files` are those of every repository, the lock itself left out."""
    value = {
        "format": FORMAT,
        "moerge": report.moerge_version,
        "identity": identity(report),
        "recipe": report.recipe_identity,
        "gates": report.gates_key,
        "gate_mode": report.gate_mode,
        "sources": _sources(report),
        "quants": [quant.type for quant in report.quants],
        "files": files,
        "rebuild": "moerge build recipe.yaml --lock moerge.lock.json --out DIR",
    }
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_lock(data: bytes, where: str) -> Lock:
    """A lock file from the Hub, which anybody may have written. Raises DestinationError where it is not one of ours."""
    try:
        if len(data) > MAX_LOCK:
            raise ValueError("too large")
        value = json.loads(data)
        for files in value["files"].values():
            for name, entry in files.items():
                if not isinstance(name, str) or not (
                    isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int)
                ):
                    raise TypeError
        found = value.get("identity")
        return Lock(found if isinstance(found, str) else None, value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DestinationError(f"{where}: not a lock file of ours; remove or rename it on the Hub") from None


def gguf_repository(repo: str) -> str:
    """Where the GGUF files of a model go."""
    return f"{repo}-GGUF"


def tag_name(report: Report) -> str:
    """The release's tag: the recipe's version, else the beginning of the recipe's identity."""
    return report.version or f"moerge-{report.recipe_identity[:8]}"


def _sources(report: Report) -> dict[str, dict[str, Any]]:
    """By name the commit of each source (None for a local folder), its fingerprint, and the checksums of its files."""
    return {
        source.name: {"commit": source.commit, "fingerprint": source.fingerprint, "files": dict(source.files)}
        for source in report.sources
    }
