"""What a release holds: by repository every file, from the build's folder or uploaded already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bot.publish.lock import LOCK, gguf_repository, identity, lock_file
from bot.state import State
from bot.work import GGUF, MODEL
from cards.render import model_files
from evals.results import REPORT, FileMade, Report, read_report
from merge.errors import UsageError

RECIPE, README = "recipe.yaml", "README.md"
# In a folder of their own: some readers of models load every *.safetensors that lies beside config.json.
GATES, PUBLISHED_REPORT = "moerge/gates.safetensors", "moerge/report.json"
# Written with each release, and no reason for one: it tells how long things took.
NO_REASON = frozenset({PUBLISHED_REPORT})


@dataclass(frozen=True)
class Uploaded:
    """A large file whose bytes are on the Hub already, and perhaps nowhere else."""

    sha256: str
    bytes: int


Content = Path | bytes | Uploaded


@dataclass(frozen=True)
class Release:
    """A release, ready to be compared with the Hub. `files` are by repository, the model's last; `built` has the SHA-256
    that files had when they were built."""

    folder: Path
    report: Report
    repo: str
    identity: str
    files: Mapping[str, Mapping[str, Content]]
    built: Mapping[str, str]

    @property
    def message(self) -> str:
        """The commit's title."""
        version = f" {self.report.version}" if self.report.version else ""
        return f"Release {self.report.name}{version} (moerge {self.report.moerge_version})"


def read_release(folder: Path) -> Release:
    """What a build left in `folder`. Raises UsageError where it is not a whole build, or names no repository."""
    report = read_built(folder)
    if report.repo is None:
        raise UsageError(f"{folder}: its recipe names no repository; add release: {{repo: owner/name}}")
    state, gguf = State(folder), gguf_repository(report.repo)
    model: dict[str, Content] = {
        file.name: _content(state, report.repo, folder / MODEL / file.name, file) for file in report.files
    }
    model |= {name: folder / MODEL / name for name in model_files(report)}
    model[RECIPE] = report.recipe_text.encode()
    gates = folder / f"gates-{report.gates_key[:16]}.safetensors"
    if gates.is_file():
        model[GATES] = gates
    quants: dict[str, Content] = {
        file.name: _content(state, gguf, folder / GGUF / file.name, file) for file in report.gguf_files
    }
    files = ({gguf: quants | {README: folder / GGUF / README}} if quants else {}) | {report.repo: model}
    for path in (content for contents in files.values() for content in contents.values()):
        if isinstance(path, Path) and not path.is_file():
            raise UsageError(f"{path}: the report lists it, but it is not there; run `moerge build` again")
    built = {file.name: file.sha256 for file in (*report.files, *report.gguf_files)}
    sums = {
        repo: {
            name: {"sha256": built.get(name) or sha256_of(content), "bytes": size_of(content)}
            for name, content in contents.items()
        }
        for repo, contents in files.items()
    }
    # In both repositories: the model's is the release, the other tells which GGUF files are ours if that never came. A card
    # stands in its own repository's lock alone, so that a new one is one commit.
    files = {
        repo: contents
        | {
            LOCK: lock_file(
                report,
                {other: {n: e for n, e in sums[other].items() if other == repo or n != README} for other in sums},
            )
        }
        for repo, contents in files.items()
    }
    files[report.repo] = files[report.repo] | {PUBLISHED_REPORT: folder / REPORT}
    return Release(folder, report, report.repo, identity(report), files, built)


def upload_stage(repo: str, name: str) -> str:
    """The name under which a build's state keeps that a file was uploaded."""
    return f"uploaded/{repo}/{name}"


def item_stage(name: str) -> str:
    """The name under which a build's state keeps that a file was made."""
    return f"item/{name}"


def forget_uploads(folder: Path, repo: str, names: Sequence[str]) -> None:
    """Let the next build make and upload these files again."""
    State(folder).drop(*(stage for name in names for stage in (upload_stage(repo, name), item_stage(name))))


def _content(state: State, repo: str, path: Path, file: FileMade) -> Content:
    """A built file: here, or uploaded by the build and deleted to make room."""
    if not path.is_file() and state.result(upload_stage(repo, file.name), file.sha256) is not None:
        return Uploaded(file.sha256, file.bytes)
    return path


def sha256_of(content: Content) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    if isinstance(content, Uploaded):
        return content.sha256
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(content: Content) -> int:
    """Bytes of a file."""
    if isinstance(content, Uploaded):
        return content.bytes
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def read_built(folder: Path) -> Report:
    """The report of a build. Raises UsageError where there is none."""
    try:
        return read_report(folder / REPORT)
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {REPORT} in it; run `moerge build` first") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder / REPORT}: cannot be read ({type(error).__name__}); run `moerge build` again"
        ) from None
