"""What the server knows: accounts, tokens, repositories, and all that is said in them. Kept in memory, git aside."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo.github.git import Bare

LEVELS = ("none", "read", "write", "admin")
# What GITHUB_TOKEN has where a workflow names no permissions and the repository is not restricted.
ALL_WRITE = dict.fromkeys(
    ("contents", "pull_requests", "issues", "checks", "statuses", "actions", "deployments", "packages"), "write"
)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Account:
    """Someone who may act: a person, an organisation, or an app's bot."""

    id: int
    login: str
    kind: str = "User"


@dataclass
class Token:
    """A token: whose it is, and what it may do.

    `permissions` are those of an installation of an app on `repository`, such as a workflow's GITHUB_TOKEN; None is a
    person's token, which may do what the person may.
    """

    account: Account
    permissions: dict[str, str] | None = None
    repository: str | None = None
    used: int = 0
    resets: float = field(default_factory=lambda: time.time() + 3600)


@dataclass
class Comment:
    id: int
    author: Account
    body: str
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)
    reactions: list[tuple[str, Account]] = field(default_factory=list)


@dataclass
class Issue:
    """An issue, or a pull request where `head` is set: branch and repository of both sides."""

    id: int
    number: int
    author: Account
    title: str
    body: str
    comments: list[Comment] = field(default_factory=list)
    state: str = "open"
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)
    head: tuple[str, str] | None = None
    base: str = ""
    base_sha: str = ""
    merged: str | None = None
    draft: bool = False
    labels: list[str] = field(default_factory=list)


@dataclass
class Check:
    """A check run; `annotations` are as they were sent."""

    id: int
    head_sha: str
    fields: dict[str, Any]
    annotations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Release:
    id: int
    author: Account
    fields: dict[str, Any]
    created: str = field(default_factory=now)
    assets: dict[int, tuple[str, str, bytes]] = field(default_factory=dict)


@dataclass
class Repository:
    """A repository and what belongs to it. `roles` are of people beside the owner."""

    id: int
    owner: Account
    name: str
    git: Bare
    branch: str
    private: bool = False
    parent: str | None = None
    roles: dict[str, str] = field(default_factory=dict)
    issues: dict[int, Issue] = field(default_factory=dict)
    checks: dict[int, Check] = field(default_factory=dict)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    releases: dict[int, Release] = field(default_factory=dict)
    pushed: str = field(default_factory=now)

    @property
    def full_name(self) -> str:
        return f"{self.owner.login}/{self.name}"


@dataclass
class Limits:
    """GitHub's own limits; smaller ones make them testable. `writes` is of writes in a minute by one token, 0 for none."""

    requests: int = 5000
    writes: int = 80
    compared_files: int = 300
    pull_files: int = 3000
    tree_entries: int = 100_000
    comment_characters: int = 65_536
    check_characters: int = 65_535
    annotations: int = 50


class State:
    """Everything, behind one lock."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root = root
        self.limits = limits
        self.lock = threading.RLock()
        self.accounts: dict[str, Account] = {}
        self.tokens: dict[str, Token] = {}
        self.repositories: dict[str, Repository] = {}
        self.written: dict[str, list[float]] = {}
        self._ids = itertools.count(1001)

    def new_id(self) -> int:
        return next(self._ids)

    def account(self, login: str, kind: str | None = None) -> Account:
        """The account of this name, made if need be."""
        found = self.accounts.get(login.lower())
        if found is None:
            kind = kind or ("Bot" if login.endswith("[bot]") else "User")
            found = self.accounts[login.lower()] = Account(self.new_id(), login, kind)
        return found

    def repository(self, full_name: str) -> Repository | None:
        return self.repositories.get(full_name.lower())

    def create(
        self, full_name: str, *, branch: str = "main", private: bool = False, parent: str | None = None
    ) -> Repository:
        """A new, empty repository; a fork where it has a parent."""
        owner, name = full_name.split("/")
        made = Repository(
            self.new_id(),
            self.account(owner),
            name,
            Bare(self.root / f"{full_name}.git", branch),
            branch,
            private,
            parent,
        )
        self.repositories[full_name.lower()] = made
        return made

    def role(self, repository: Repository, account: Account) -> str:
        """What a person may do: none, read, write or admin."""
        if account.login == repository.owner.login:
            return "admin"
        return repository.roles.get(account.login, "none" if repository.private else "read")

    def sync(self, repository: Repository, issue: Issue) -> tuple[str, str]:
        """The ids of a pull request's head and base now; its refs follow the head's branch as long as it is open."""
        git = repository.git
        ref = f"refs/pull/{issue.number}/head"
        if issue.state == "open" and issue.head is not None:
            other = self.repository(issue.head[0])
            tip = other.git.resolve(f"refs/heads/{issue.head[1]}") if other else None
            if other is not None and tip is not None and tip != git.resolve(ref):
                git.fetch(other.git.path, f"+{tip}:{ref}")
                issue.updated = now()
            issue.base_sha = git.resolve(f"refs/heads/{issue.base}") or issue.base_sha
        return git.resolve(ref) or "", issue.base_sha
