"""Publishing in order: compare everything, upload everything, commit the GGUF files, commit the model, tag, check.

The model's commit carries the lock file and is the release. Readers of either repository see the old release or the new one.
Files that an earlier release of ours has and this one has not are removed in the same commit; files that we did not write are
left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bot.publish.contents import Release, read_release
from bot.publish.lock import gguf_repository, tag_name
from bot.publish.patience import limit_waiting
from bot.publish.repository import Repository, RepositoryChange
from bot.publish.tokens import tokens_for


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
    limit_waiting()
    release = read_release(folder)
    tokens = tokens_for(endpoint, token)
    # Everything is read and compared before the first byte is sent.
    targets = [Repository(release, repo, tokens, endpoint, create_pr=False) for repo in release.files]
    commit = None if dry_run else _write(release, targets)
    return Publication(
        repo=release.repo,
        url=f"{targets[-1].endpoint}/{release.repo}",
        commit=commit,
        gguf_repo=gguf_repository(release.repo) if len(targets) > 1 else None,
        tag=tag_name(release.report),
        changed=any(not target.change.is_empty for target in targets),
        repositories=tuple(target.change for target in targets),
    )


def _write(release: Release, targets: list[Repository]) -> str | None:
    """Returns the model's commit."""
    for target in targets:
        target.create(private=release.report.private)
    for target in targets:
        target.upload()
    commit = None
    for target in targets:
        commit = target.verify(target.commit())
        target.tag(tag_name(release.report), commit)
    return commit
