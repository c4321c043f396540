"""Publishing in order: compare everything, upload everything, commit the GGUF files, commit the model, tag, check.

The model's commit carries the lock file and is the release. Readers of either repository see the old release or the new one.
Files that an earlier release of ours has and this one has not are removed in the same commit; files that we did not write are
left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.publish import settings
from bot.publish.contents import PUBLISHED_REPORT, Release, read_built, read_release
from bot.publish.destination import Destination
from bot.publish.lock import gguf_repository, identity, tag_name
from bot.publish.patience import limit_waiting, patiently
from bot.publish.repository import Found, Repository, RepositoryChange, found_at, put_tag, small_file
from bot.publish.tokens import Tokens, tokens_for
from evals.results import Report, parse_report
from merge.errors import DestinationError


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
    folder: Path,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    tokens: Tokens | None = None,
) -> Publication:
    """Publish what a build left in `folder` to the repository that its recipe names.

    `tokens` are those that the build of it had already. `dry_run` only reads the Hub and says what the commits would be. Raises UsageError where there is nothing that can be
    published, DestinationError where the Hub refuses or cannot be reached: the previous release is then still whole.
    """
    limit_waiting()
    tokens = tokens or tokens_for(endpoint, token)
    _compare(folder, tokens, endpoint)
    release = read_release(folder)
    create_pr = release.report.release.create_pr
    # Everything is read and compared before the first byte is sent.
    targets = [Repository(release, repo, tokens, endpoint, create_pr=create_pr) for repo in release.files]
    commit = None if dry_run else _write(release, targets, token)
    return Publication(
        repo=release.repo,
        url=f"{targets[-1].endpoint}/{release.repo}",
        commit=commit,
        gguf_repo=gguf_repository(release.repo) if len(targets) > 1 else None,
        tag=tag_name(release.report),
        changed=any(not target.change.is_empty for target in targets),
        repositories=tuple(target.change for target in targets),
    )


def released(
    planned: Report, quants: Sequence[str], tokens: Tokens, endpoint: str | None, account: str | None
) -> tuple[Report, Publication] | None:
    """The release on the Hub that has the very identity of what is about to be built, with its report; None where there is
    none, or where files of it are missing or damaged. A run that was cut off after the last commit is finished: tag and
    settings are put right. `planned` is the report before the build, `quants` are the GGUF types asked for; `account` as in
    `settings.finish`."""
    limit_waiting()
    wanted = identity(planned, quants)
    found: dict[str, Found] = {}
    lock = None
    for repo in _repositories(planned, quants)[::-1]:  # the model's lock tells of all
        there = found_at(Destination(repo, tokens, endpoint, create_pr=False))
        lock = lock or there.lock
        if lock is None or lock.identity != wanted or not _has_all(there, lock.files(repo)):
            return None
        if lock.files(repo):  # of GGUF types of which none could be made there is no repository
            found[repo] = there
    repo = planned.repo or ""
    gguf = gguf_repository(repo) if gguf_repository(repo) in found else None
    kept = [Destination(each, tokens, endpoint, create_pr=False) for each in reversed(found)]
    if not planned.release.create_pr:
        for each in kept:
            put_tag(each, tag_name(planned), found[each.repo].head)
        settings.finish(planned, kept, account)
    changes = tuple(RepositoryChange(each, (), (), (), tuple(sorted(found[each].files)), 0) for each in reversed(found))
    model = kept[-1]
    publication = Publication(
        repo, f"{model.endpoint}/{repo}", found[repo].head, gguf, tag_name(planned), False, changes
    )
    if PUBLISHED_REPORT not in found[repo].files:
        return planned, publication
    raw = patiently(repo, model.endpoint, lambda: small_file(model, PUBLISHED_REPORT, found[repo].head))
    try:
        return parse_report(raw), publication
    except ValueError:  # of another version: the plan says enough
        return planned, publication


def _has_all(found: Found, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the files of a lock are there. Of large ones the Hub tells the SHA-256, which must be the lock's."""
    return all(
        name in found.files and (len(found.files[name]) != 64 or found.files[name] == entry["sha256"])
        for name, entry in files.items()
    )


def destinations(
    planned: Report, quants: Sequence[str], tokens: Tokens, endpoint: str | None
) -> dict[str, Destination]:
    """The repositories of a release, made where there are none, for files that are uploaded before all are there.

    Raises DestinationError where one holds a model that is not ours, or may not be written to.
    """
    limit_waiting()
    made = {}
    for repo in _repositories(planned, quants):
        made[repo] = Destination(repo, tokens, endpoint, create_pr=planned.release.create_pr)
        there = found_at(made[repo])
        weights = [name for name in there.files if name.endswith((".safetensors", ".gguf", ".bin"))]
        if there.lock is None and weights:
            raise DestinationError(
                f"{repo}: holds another model, which moerge did not publish ({weights[0]}); choose another release.repo, "
                "or empty that repository"
            )
        if there.head is None:
            made[repo].create(private=settings.is_private_first(planned))
    return made


def _repositories(planned: Report, quants: Sequence[str]) -> list[str]:
    repo = planned.repo or ""
    return [gguf_repository(repo), repo] if quants else [repo]


def _compare(folder: Path, tokens: Tokens, endpoint: str | None) -> None:
    """The card says what became better and worse since the release that is on the Hub now."""
    from huggingface_hub import HfApi

    from bot.previous import compare, published_report

    report = read_built(folder)
    if report.repo is None:
        return
    repo, api = report.repo, HfApi(endpoint=endpoint, token=tokens.of(report.repo))
    compare(folder, report, patiently(repo, api.endpoint, lambda: published_report(api, repo)))


def _write(release: Release, targets: list[Repository], account: str | None) -> str | None:
    """Returns the model's commit."""
    report = release.report
    for target in targets:
        if target.planned.parent is None:
            target.create(private=settings.is_private_first(report))
    for target in targets:
        target.upload()
    commit = None
    for target in targets:
        commit = target.commit()
        if not target.create_pr:
            commit = target.verify(commit)
            put_tag(target, tag_name(report), commit)
    if not report.release.create_pr:
        settings.finish(report, targets, account)
    return commit
