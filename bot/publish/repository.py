"""One repository of a release: what its commit holds, the upload, the commit made once whatever happens, tag and check."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bot.publish.contents import NO_REASON, README, Content, Release, Uploaded, forget_uploads, sha256_of, size_of
from bot.publish.destination import NAMED, Destination, addition_of, not_there, preupload
from bot.publish.lock import LOCK, Lock, read_lock
from bot.publish.patience import patiently, status_of
from bot.publish.readme import with_kept
from bot.publish.small_files import read_small
from bot.publish.tokens import Tokens
from merge.errors import DestinationError, UsageError
from merge.files import has_checksum
from merge.progress import say

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

# Files of up to so many bytes may be kept by the Hub as regular ones, which are known by git's id of them.
REGULAR = 10 << 20
HASHED_AT_ONCE = 4
# Ends the description of a commit: by it a release's commit is found again.
MARK = "moerge-release: "


@dataclass(frozen=True)
class RepositoryChange:
    """What one repository's commit holds. `bytes` are those of the added and changed files that are not on the Hub."""

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
class Found:
    """A repository as the Hub shows it: its head (None where there is no repository), the checksum of each file (SHA-256
    of a large one, git's blob id of another), and the release that is there."""

    head: str | None
    files: Mapping[str, str]
    lock: Lock | None


def found_at(destination: Destination, revision: str | None = None) -> Found:
    """The repository at a revision, or at its head; asked as often as it takes."""
    return patiently(destination.repo, destination.endpoint, lambda: look(destination, revision))


def look(destination: Destination, revision: str | None = None) -> Found:
    """The repository at a revision, or at its head; the client's errors pass through."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        head, files = checksums(destination, revision)
    except RepositoryNotFoundError as error:
        if status_of(error) == 401 and destination.has_token:
            raise  # not the repository is unknown, the token is
        return Found(None, {}, None)
    lock = None
    if LOCK in files:
        lock = read_lock(small_file(destination, LOCK, head), f"{destination.repo}/{LOCK}")
    return Found(head, files, lock)


def checksums(destination: Destination, revision: str | None) -> tuple[str | None, dict[str, str]]:
    """The commit that a revision means, and the checksum of each file there."""
    info = destination.api.model_info(destination.repo, revision=revision, files_metadata=True)
    return info.sha, {
        file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id or "" for file in info.siblings or []
    }


def small_file(destination: Destination, name: str, revision: str | None) -> bytes:
    """The bytes of a small file in the repository."""
    return read_small(destination.api, destination.repo, name, revision)


def put_tag(destination: Destination, tag: str, commit: str | None) -> None:
    """Put a release's tag on its commit. A tag that stands on the same release stays: by its lock, since a card is edited."""

    def put() -> None:
        tags = {ref.name: ref.target_commit for ref in destination.api.list_repo_refs(destination.repo).tags}
        if tag in tags:
            if tags[tag] == commit or lock_at(tags[tag]) == lock_at(commit):
                return
            destination.api.delete_tag(destination.repo, tag=tag)
        destination.api.create_tag(destination.repo, tag=tag, revision=commit)

    def lock_at(revision: str | None) -> str | None:
        return checksums(destination, revision)[1].get(LOCK)

    patiently(destination.repo, destination.endpoint, put)


@dataclass(frozen=True)
class Commit:
    """The next commit: on which parent, and which contents."""

    parent: str | None
    contents: Mapping[str, Content]
    change: RepositoryChange


class Repository(Destination):
    """One repository and the release's files for it. Everything that can be read and compared is, before a byte is sent."""

    def __init__(self, release: Release, repo: str, tokens: Tokens, endpoint: str | None, *, create_pr: bool) -> None:
        super().__init__(repo, tokens, endpoint, create_pr=create_pr)
        self.release, self.files = release, release.files[repo]
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            self._digests = dict(zip(self.files, pool.map(sha256_of, self.files.values()), strict=True))
        for name, built in release.built.items():
            if name in self._digests and self._digests[name] != built:
                raise UsageError(f"{repo}/{name}: not the file that was built; run `moerge build` again")
        # What the last attempt at the commit holds; nothing where none was needed.
        self._sent: Mapping[str, Content] = {}
        self._additions: dict[tuple[str, str], CommitOperationAdd] = {}
        # What is to be committed, whoever asks: the same files give the same.
        text = "".join(f"{name}\0{self._digests[name]}\n" for name in sorted(self.files) if name not in NO_REASON)
        self._mark = MARK + hashlib.sha256(text.encode()).hexdigest()
        self.planned = patiently(repo, self.endpoint, self._plan)

    @property
    def change(self) -> RepositoryChange:
        """What the commit holds, as first planned."""
        return self.planned.change

    # -- planning

    def _plan(self, revision: str | None = None) -> Commit:
        """The commit on top of a revision, or of the head. Raises DestinationError where it would overwrite a model that is
        not ours."""
        there = look(self, revision)
        ours = there.lock.files(self.repo) if there.lock is not None else None
        contents = dict(self.files)
        same = there.lock is not None and there.lock.identity == self.release.identity
        if README in there.files and same and ours and ours.get(README, {}).get("sha256") == self._digests[README]:
            del contents[README]  # the card is the one that was published; what is there now, somebody wrote
        elif README in there.files and not _is(there.files[README], self.files[README], self._digests[README]):
            contents[README] = self._card(small_file(self, README, there.head).decode("utf-8", errors="replace"))
        added, changed, unchanged = [], [], []
        for name, content in sorted(contents.items()):
            if name not in there.files:
                added.append(name)
            elif not _is(there.files[name], content, self._digest(name, content)):
                changed.append(name)
            else:
                unchanged.append(name)
        if README not in contents:
            unchanged = sorted([*unchanged, README])
        # A README.md may be the Hub's own, made with the repository.
        if ours is None and (foreign := [name for name in changed if name != README]):
            raise DestinationError(
                f"{self.repo}: holds another model, which moerge did not publish ({foreign[0]} would be overwritten); "
                "choose another release.repo, or empty that repository"
            )
        removed = sorted(name for name in ours or () if name in there.files and name not in self.files)
        if not removed and not set(added) | set(changed) > NO_REASON & (set(added) | set(changed)):
            added, changed = [], []
            unchanged = sorted(contents)
        size = sum(size_of(contents[name]) for name in (*added, *changed) if not isinstance(contents[name], Uploaded))
        change = RepositoryChange(self.repo, tuple(added), tuple(changed), tuple(removed), tuple(unchanged), size)
        return Commit(there.head, contents, change)

    def _card(self, there: str) -> bytes:
        card = self.files[README]
        assert isinstance(card, Path | bytes)
        text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8")
        return with_kept(text, there).encode()

    def _digest(self, name: str, content: Content) -> str:
        return self._digests[name] if content is self.files[name] else sha256_of(content)

    # -- writing

    def upload(self) -> None:
        """Send every large file that the Hub does not have; nobody sees them before the commit."""
        names = (*self.change.added, *self.change.changed)
        if self.change.bytes >= NAMED:
            say(f"{self.repo}: uploading {len(names)} files ({self.change.bytes / 1e6:,.0f} MB)")
        additions = [self._addition(name, self.planned.contents[name]) for name in names]
        preupload(self, additions)
        gone = not_there(
            self, [each for each in additions if isinstance(self.planned.contents[each.path_in_repo], Uploaded)]
        )
        if gone:
            forget_uploads(self.release.folder, self.repo, gone)
            raise DestinationError(
                f"{self.repo}: {gone[0]} was uploaded, and the Hub does not have it any more; build again to upload it anew"
            )

    def commit(self) -> str | None:
        """Commit everything at once; returns the repository's commit with the release, None for a pull request.

        Each attempt looks at the Hub first: after an answer that was lost, whether the commit was made; after somebody
        else's commit, what is to be done on top of that.
        """
        from huggingface_hub import CommitOperationDelete

        if self.change.is_empty:
            return patiently(self.repo, self.endpoint, self.find) or self.planned.parent
        first = True

        def commit() -> str | None:
            nonlocal first
            planned = self.planned if first and self.planned.parent is not None else self._plan()
            first = False
            if planned.change.is_empty:
                return self.find() or planned.parent
            if self.create_pr and self._has_pull_request():
                return None
            additions = [
                self._addition(name, planned.contents[name])
                for name in (*planned.change.added, *planned.change.changed)
            ]
            preupload(self, additions)
            self._sent = planned.contents
            deletions = [CommitOperationDelete(path_in_repo=name) for name in planned.change.removed]
            info = self.api.create_commit(
                self.repo,
                [*additions, *deletions],
                commit_message=self.release.message,
                commit_description=self._mark,
                parent_commit=planned.parent,
                create_pr=self.create_pr,
            )
            if self.create_pr:
                say(f"{self.repo}: opened {info.pr_url}")
                return None
            say(f"{self.repo}: committed {info.oid[:8]}")
            return str(info.oid)

        return patiently(self.repo, self.endpoint, commit)

    def find(self) -> str | None:
        """The newest commit that made this very release."""
        for commit in self.api.list_repo_commits(self.repo):
            if self._mark in commit.message.splitlines():
                return commit.commit_id
        return None

    def verify(self, commit: str | None) -> str | None:
        """Compare every checksum that the Hub tells at `commit` with the release's; what arrived damaged is sent once more.

        Returns the commit where all is right. Raises DestinationError where that does not help.
        """
        sent = self._sent or self.planned.contents

        def wrong() -> list[str]:
            _, there = checksums(self, commit)
            return [
                name
                for name, content in sent.items()
                if name not in NO_REASON
                and (name not in there or not _is(there[name], content, self._digest(name, content)))
            ]

        def repair() -> str:
            head, _ = checksums(self, None)
            additions = [addition_of(name, sent[name], self._digest(name, sent[name])) for name in damaged]
            info = self.api.create_commit(
                self.repo,
                additions,
                commit_message=self.release.message,
                commit_description=self._mark,
                parent_commit=head,
            )
            return str(info.oid)

        if damaged := patiently(self.repo, self.endpoint, wrong):
            say(f"{self.repo}: {damaged[0]} on the Hub is not what was sent (checksum); sending it again")
            commit = patiently(self.repo, self.endpoint, repair)
            if damaged := patiently(self.repo, self.endpoint, wrong):
                raise DestinationError(f"{self.repo}: {damaged[0]} on the Hub is not what was sent (checksum)")
        return commit

    def _has_pull_request(self) -> bool:
        """Whether a pull request with this very release is open already. Others' may hold anything."""

        def is_this(ref: str) -> bool:
            try:
                return self._plan(ref).change.is_empty
            except DestinationError:
                return False

        refs = self.api.list_repo_refs(self.repo, include_pull_requests=True)
        return any(is_this(ref.ref) for ref in refs.pull_requests or [])

    def _addition(self, name: str, content: Content) -> CommitOperationAdd:
        digest = self._digest(name, content)
        if (name, digest) not in self._additions:
            self._additions[name, digest] = addition_of(name, content, digest)
        return self._additions[name, digest]


def _is(there: str, content: Content, digest: str) -> bool:
    """Whether a checksum that the Hub tells is this content's."""
    if there == digest:
        return True
    if isinstance(content, Uploaded) or size_of(content) >= REGULAR:
        return False
    return has_checksum(content, there)
