"""GitHub's events: which commit's recipes are meant, and which commit they are compared with.

The event's payload comes from GitHub, but parts of it (branch names, titles) were written by anyone: only commits, names of
repositories and the default branch are read here. https://docs.github.com/en/webhooks/webhook-events-and-payloads
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.git import NO_COMMIT, Commits
from merge.errors import UsageError

PULL_REQUESTS = ("pull_request", "pull_request_target")
MAX_EVENT_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Event:
    """An event: its name, its payload, and the commit that GitHub names with it."""

    name: str
    payload: dict[str, Any]
    sha: str

    @property
    def is_pull_request(self) -> bool:
        """Whether its recipes have not been accepted yet: they are only previewed."""
        return self.name in PULL_REQUESTS or self.name == "merge_group"

    @property
    def pull_request(self) -> tuple[int | None, str | None]:
        """The number of the event's pull request and its newest commit."""
        if self.name not in PULL_REQUESTS:
            return None, None
        pull = self.payload.get("pull_request")
        number = pull.get("number") if isinstance(pull, dict) else None
        return number if isinstance(number, int) else None, _at(pull, "head", "sha")

    @property
    def commits(self) -> tuple[str, str]:
        """The tip of a pull request's base branch, and its newest commit; empty where the event has none."""
        pull = self.payload.get("pull_request")
        return _at(pull, "base", "sha") or "", _at(pull, "head", "sha") or ""

    @property
    def tag(self) -> str | None:
        """The tag that was pushed."""
        ref = _at(self.payload, "ref") if self.name == "push" and self.payload.get("deleted") is not True else None
        return ref.removeprefix("refs/tags/") if ref and ref.startswith("refs/tags/") else None

    @property
    def is_from_fork(self) -> bool:
        """Whether its recipes come from another repository than the one it happened in, or from nobody knows where."""
        if self.name not in PULL_REQUESTS:
            return False
        head = _at(self.payload, "pull_request", "head", "repo", "full_name")
        return head is None or head != _at(self.payload, "repository", "full_name")


@dataclass(frozen=True)
class Comparison:
    """`head` is the commit whose recipes are meant; `base` the one they are compared with, None where every recipe counts.

    `why` says so in words. `head` is None where the event leaves nothing to do.
    """

    head: str | None
    base: str | None
    why: str


def read_event(name: str, path: Path | None, sha: str) -> Event:
    """The event of this run. Raises UsageError where the file is not one of GitHub's."""
    if path is None:
        return Event(name, {}, sha)
    try:
        with path.open("rb") as file:
            payload = json.loads(file.read(MAX_EVENT_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the event cannot be read ({error}); GITHUB_EVENT_PATH must name its JSON") from None
    if not isinstance(payload, dict):
        raise UsageError(f"{path}: this is not the payload of an event")
    return Event(name, payload, sha)


def compare(event: Event, repository: Commits) -> Comparison:
    """Which commits the event is about. Raises UsageError where the checkout lacks what is needed to tell."""
    if event.name in PULL_REQUESTS:
        return _pull_request(event, repository)
    if event.name == "merge_group":
        base, head = _at(event.payload, "merge_group", "base_sha"), _at(event.payload, "merge_group", "head_sha")
        return _parted(repository, base or "", head or "", "the merge queue's base")
    if event.name == "push":
        return _push(event, repository)
    head = _head(event, repository)
    return Comparison(head, None, f"all recipes that match, asked for by {event.name or 'hand'}")


def _head(event: Event, repository: Commits) -> str:
    head = repository.commit(event.sha) or repository.commit("HEAD") or _there(repository, event.sha)
    if head is None:
        raise UsageError("the checkout has no commit; run actions/checkout before this step")
    return head


def _pull_request(event: Event, repository: Commits) -> Comparison:
    base, head = event.commits
    return _parted(repository, base, head, "the base branch")


def _parted(repository: Commits, base: str, head: str, what: str) -> Comparison:
    """The changes of a line of history since it parted from another."""
    # actions/checkout brings the merge of both; with a depth of 2 its parents are here, without their histories.
    tip = _there(repository, head)
    if tip and _is_commit(base) and (parted := repository.merge_base(base, tip)):
        return Comparison(tip, parted, f"compared with {parted[:9]}, where it left {what}")
    merge = repository.commit("HEAD")
    if tip and merge and (parents := repository.parents(merge))[1:] == [tip]:
        return Comparison(merge, parents[0], f"compared with {what} at {parents[0][:9]}, as merged")
    raise _too_shallow(base if tip else head)


def _there(repository: Commits, commit: str) -> str | None:
    """A commit's id, where it is here or could be brought."""
    return repository.commit(commit) or (repository.commit(commit) if repository.fetch(commit) else None)


def _is_commit(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def _push(event: Event, repository: Commits) -> Comparison:
    after = _at(event.payload, "after") or event.sha
    if after == NO_COMMIT or event.payload.get("deleted") is True:
        return Comparison(None, None, "the branch was deleted: there is nothing to build")
    head = _there(repository, after)
    if head is None:
        raise _too_shallow(after)
    before = _at(event.payload, "before") or NO_COMMIT
    if before == NO_COMMIT:
        return _new_branch(event, repository, head, "the first push of this branch")
    if base := _there(repository, before):
        return Comparison(head, base, f"compared with {before[:9]}, the commit before this push")
    if event.payload.get("forced") is not True and repository.is_shallow:
        raise _too_shallow(before)
    return _new_branch(event, repository, head, f"history was rewritten and {before[:9]}, the commit before, is gone")


def _new_branch(event: Event, repository: Commits, head: str, why: str) -> Comparison:
    """A push without a commit before it: what differs from the default branch counts; on that branch, everything."""
    default = _at(event.payload, "repository", "default_branch")
    if default and _at(event.payload, "ref") != f"refs/heads/{default}":
        tip = repository.commit(f"refs/remotes/origin/{default}")
        if tip and (parted := repository.merge_base(tip, head)):
            return Comparison(head, parted, f"{why}: compared with {parted[:9]}, where it left the default branch")
    return Comparison(head, None, f"{why}: every recipe counts")


def _too_shallow(commit: str) -> UsageError:
    return UsageError(
        f"which recipes changed cannot be told: commit {commit[:9] or 'of the event'} is not in this checkout; "
        "give actions/checkout `fetch-depth: 0`"
    )


def _at(value: Any, *keys: str) -> str | None:
    """The text at a path of the payload; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None
