"""From a build's folder to the Hub: every file uploaded first, then one commit a repository, then the tag.

The GGUF repository is committed first; the model repository's commit carries the lock file and is the release. Readers see
the old release or the new one. Files that an earlier release of ours has and this one has not are removed in the same commit;
files that we did not write are left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.pipeline import GGUF, MODEL
from evals.results import REPORT, Report, read_report
from merge.errors import DestinationError, UsageError
from merge.progress import say

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

LOCK = "moerge.lock.json"
RECIPE = "recipe.yaml"
MAX_LOCK = 10_000_000


@dataclass(frozen=True)
class RepositoryChange:
    """What one repository's commit holds. `bytes` are those of the added and changed files."""

    repo: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    bytes: int

    @property
    def is_empty(self) -> bool:
        return not (self.added or self.changed or self.removed)

    def to_text(self) -> str:
        """The commit as `--dry-run` prints it."""
        lines = [
            f"{self.repo}: {self.bytes / 1e6:,.1f} MB to upload" if not self.is_empty else f"{self.repo}: no change"
        ]
        for sign, names in (("+", self.added), ("~", self.changed), ("-", self.removed), ("=", self.unchanged)):
            lines += [f"  {sign} {name}" for name in names]
        return "\n".join(lines)


@dataclass(frozen=True)
class Publication:
    """A release on the Hub. `changed` is False where all of it was there already; `commit` is the model repository's."""

    repo: str
    url: str
    commit: str | None
    gguf_repo: str | None
    tag: str
    changed: bool
    repositories: tuple[RepositoryChange, ...]


def publish(
    folder: Path, *, token: str | None = None, endpoint: str | None = None, dry_run: bool = False
) -> Publication:
    """Publish what a build left in `folder` to the repository that its recipe names.

    `dry_run` only reads the Hub and says what the commits would be. Raises UsageError where there is nothing that can be
    published, DestinationError where the Hub refuses or cannot be reached: the previous release is then still whole.
    """
    from huggingface_hub import HfApi

    report = _report(folder)
    if report.repo is None:
        raise UsageError(f"{folder}: its recipe names no repository; add release: {{repo: owner/name}}")
    api = HfApi(endpoint=endpoint, token=token)
    tag = tag_name(report)
    built = {file.name: file.sha256 for file in (*report.files, *report.gguf_files)}
    # Everything is read and compared before the first byte is sent.
    targets = [
        _Target(api, repo, files, _previous_files(api, repo), built) for repo, files in _targets(folder, report).items()
    ]
    model_commit: str | None = None
    if not dry_run:
        for target in targets:
            target.create(private=report.private)
        for target in targets:
            model_commit = target.commit(_message(report))
            target.tag(tag, model_commit)
    return Publication(
        repo=report.repo,
        url=f"{api.endpoint}/{report.repo}",
        commit=model_commit,
        gguf_repo=gguf_repository(report.repo) if len(targets) > 1 else None,
        tag=tag,
        changed=any(not target.change.is_empty for target in targets),
        repositories=tuple(target.change for target in targets),
    )


def gguf_repository(repo: str) -> str:
    """Where the GGUF files of a model go."""
    return f"{repo}-GGUF"


def tag_name(report: Report) -> str:
    """The release's tag: the recipe's version, else the beginning of the recipe's identity."""
    return report.version or f"moerge-{report.recipe_identity[:8]}"


def lock_file(report: Report, files: dict[str, dict[str, Any]]) -> bytes:
    """moerge.lock.json: what the release was made from, and the checksum of every file in it, by repository."""
    lock = {
        "format": 1,
        "moerge": report.moerge_version,
        "recipe": report.recipe_identity,
        "gates": report.gates_key,
        "sources": {source.name: source.commit or f"local:{source.fingerprint}" for source in report.sources},
        "files": files,
    }
    return (json.dumps(lock, indent=2, sort_keys=True) + "\n").encode()


def _report(folder: Path) -> Report:
    try:
        return read_report(folder / REPORT)
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {REPORT} in it; run `moerge build` first") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder / REPORT}: cannot be read ({type(error).__name__}); run `moerge build` again"
        ) from None


def _targets(folder: Path, report: Report) -> dict[str, dict[str, Path | bytes]]:
    """By repository, the model's last: what its release holds, by name. The files are the ones the report lists."""
    assert report.repo is not None
    model: dict[str, Path | bytes] = {file.name: folder / MODEL / file.name for file in report.files}
    model |= {"README.md": folder / MODEL / "README.md", RECIPE: report.recipe_text.encode()}
    quants: dict[str, Path | bytes] = {file.name: folder / GGUF / file.name for file in report.gguf_files}
    for path in (model | quants).values():
        if isinstance(path, Path) and not path.is_file():
            raise UsageError(f"{path}: the report lists it, but it is not there; run `moerge build` again")
    targets: dict[str, dict[str, Path | bytes]] = {}
    locked = {report.repo: {file.name: {"sha256": file.sha256, "bytes": file.bytes} for file in report.files}}
    if quants:
        repo = gguf_repository(report.repo)
        targets[repo] = quants | {"README.md": folder / GGUF / "README.md"}
        locked[repo] = {file.name: {"sha256": file.sha256, "bytes": file.bytes} for file in report.gguf_files}
    targets[report.repo] = model
    # In both repositories: the model's is the release, the other tells which GGUF files are ours if that never came.
    lock = lock_file(report, locked)
    return {repo: files | {LOCK: lock} for repo, files in targets.items()}


class _Target:
    """One repository and the commit it is to get."""

    def __init__(
        self,
        api: HfApi,
        repo: str,
        files: dict[str, Path | bytes],
        ours: Sequence[str] | None,
        built: Mapping[str, str],
    ) -> None:
        """`ours` are the files of the release before, None where there was none; `built` has the SHA-256 of each file when
        it was built. Raises DestinationError where a model that is not ours would be overwritten."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self.api, self.repo = api, repo
        self.parent, present = _remote_files(api, repo)
        additions: list[CommitOperationAdd] = []
        added, changed, unchanged = [], [], []
        say(f"{repo}: comparing {len(files)} files")
        for name, content in sorted(files.items()):
            addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            digest = addition.upload_info.sha256.hex()
            if built.get(name, digest) != digest:
                raise UsageError(f"{repo}/{name}: not the file that was built; run `moerge build` again")
            digests = {digest, _git_blob_id(content) if _is_small(content) else ""}
            if name not in present:
                added.append(name)
            elif present[name] not in digests:
                changed.append(name)
            else:
                unchanged.append(name)
                continue
            additions.append(addition)
        # A README.md may be the Hub's own, made with the repository.
        if ours is None and (foreign := [name for name in changed if name != "README.md"]):
            raise DestinationError(
                f"{repo}: holds another model, which moerge did not publish ({foreign[0]} would be overwritten); "
                "choose another release.repo, or empty that repository"
            )
        removed = sorted(name for name in ours or () if name in present and name not in files)
        self.additions = additions
        self.deletions: list[CommitOperationDelete] = [CommitOperationDelete(path_in_repo=name) for name in removed]
        size = sum(addition.upload_info.size for addition in additions)
        self.change = RepositoryChange(repo, tuple(added), tuple(changed), tuple(removed), tuple(unchanged), size)

    def create(self, *, private: bool) -> None:
        """Make the repository where there is none."""
        if self.parent is None:
            with _writable(self.repo, self.api.endpoint):
                self.api.create_repo(self.repo, private=private, exist_ok=True)
                self.parent = self.api.model_info(self.repo).sha

    def commit(self, message: str) -> str | None:
        """Upload, then commit everything at once. Returns the repository's commit afterwards."""
        if self.change.is_empty:
            return self.parent
        for addition in self.additions:
            if addition.upload_info.size >= 1 << 20:
                say(f"{self.repo}: uploading {addition.path_in_repo} ({addition.upload_info.size / 1e6:,.0f} MB)")
            with _writable(self.repo, self.api.endpoint):
                self.api.preupload_lfs_files(self.repo, [addition])
        with _writable(self.repo, self.api.endpoint):
            info = self.api.create_commit(
                self.repo, [*self.additions, *self.deletions], commit_message=message, parent_commit=self.parent
            )
        say(f"{self.repo}: committed {info.oid[:8]}")
        return info.oid

    def tag(self, tag: str, commit: str | None) -> None:
        """Put the release's tag on the commit; a tag that is there already is moved only when the release changed."""
        with _writable(self.repo, self.api.endpoint):
            tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo).tags}
            if tags.get(tag) == commit or (tag in tags and self.change.is_empty):
                return
            if tag in tags:
                self.api.delete_tag(self.repo, tag=tag)
            self.api.create_tag(self.repo, tag=tag, revision=commit)


def _message(report: Report) -> str:
    version = f" {report.version}" if report.version else ""
    return f"Release {report.name}{version} (moerge {report.moerge_version})"


def _remote_files(api: HfApi, repo: str) -> tuple[str | None, dict[str, str]]:
    """The head commit of `repo`, and each file's checksum as the Hub tells it: SHA-256 for LFS, else git's blob id."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _writable(repo, api.endpoint):
        try:
            info = api.model_info(repo, files_metadata=True)
        except RepositoryNotFoundError:
            return None, {}
    files = {}
    for file in info.siblings or []:
        files[file.rfilename] = file.lfs.sha256 if file.lfs is not None else file.blob_id or ""
    return info.sha, files


def _previous_files(api: HfApi, repo: str) -> list[str] | None:
    """The files that the release before wrote to `repo`; None where no release of ours is there."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with _writable(repo, api.endpoint):
        try:
            path = Path(api.hf_hub_download(repo, LOCK))
        except LocalEntryNotFoundError:  # the Hub did not answer, which says nothing about the file
            raise
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
    try:
        if path.stat().st_size > MAX_LOCK:
            raise ValueError("too large")
        return [str(file) for file in json.loads(path.read_bytes())["files"].get(repo, ())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DestinationError(f"{repo}/{LOCK}: not a lock file of ours; remove or rename it on the Hub") from None


def _is_small(content: Path | bytes) -> bool:
    """Whether the Hub may keep it as a regular file, known by its git blob id."""
    return isinstance(content, bytes) or content.stat().st_size < 10 << 20


def _git_blob_id(content: Path | bytes) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def _writable(repo: str, endpoint: str) -> Iterator[None]:
    """Turn the client's exceptions into one sentence each, the right that is missing named."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    # LocalEntryNotFoundError, the client's word for a Hub that did not answer, is an EntryNotFoundError too.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DestinationError(f"{repo}: {endpoint} cannot be reached ({type(error).__name__})") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if _status(error) == 401:
            raise DestinationError(f"{repo}: the Hub does not know the token; check HF_TOKEN") from None
        raise DestinationError(f"{repo}: not on the Hub, or the token may not see it") from None
    except errors.HfHubHTTPError as error:
        status = _status(error)
        sentences = {
            401: "the Hub does not know the token; check HF_TOKEN",
            403: "the token has no right to write there; it needs write access to the repository",
            409: "the name is taken by something else, or another commit came in between; try again",
            412: "the repository was changed while we uploaded; try again",
            413: "the Hub finds a file too large",
            429: "the Hub asks for a pause (rate limit); try again later",
        }
        raise DestinationError(
            f"{repo}: {sentences.get(status or 0, f'the Hub answered with status {status}')}"
        ) from None
    except httpx2.HTTPError as error:  # the base of the Hub's own errors above, so it comes last
        raise DestinationError(f"{repo}: {endpoint} cannot be reached ({type(error).__name__})") from None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
