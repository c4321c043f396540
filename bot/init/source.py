"""Which moerge a new recipe repository calls: a repository on GitHub and a whole commit, never a branch or a tag."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from merge.errors import UsageError

ROOT = Path(__file__).parents[2]
_GIVEN = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)@([0-9a-f]{40})")
_GITHUB = re.compile(r"(?:git\+)?(?:https://(?:[^@/]*@)?|ssh://git@|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?")


@dataclass(frozen=True)
class Source:
    """A repository (owner/name) on GitHub and a commit of it."""

    repository: str
    commit: str


def parse_source(text: str) -> Source:
    """From OWNER/NAME@COMMIT. Raises UsageError."""
    found = _GIVEN.fullmatch(text)
    if not found:
        raise UsageError(f"--moerge {text}: it is written OWNER/NAME@COMMIT, with all 40 digits of the commit")
    return Source(found[1], found[2])


def installed_source() -> Source:
    """Where this very moerge comes from: as pip recorded it (PEP 610), or the checkout it runs from. Raises UsageError."""
    found = _from_pip() or _from_checkout()
    if found is None:
        raise UsageError(
            "it is not known which moerge the workflows are to call: this one comes from no repository on GitHub; "
            "give --moerge OWNER/NAME@COMMIT"
        )
    return found


def _from_pip() -> Source | None:
    try:
        text = metadata.distribution("moerge").read_text("direct_url.json")
        value = json.loads(text or "{}")
        repository, commit = _GITHUB.fullmatch(value["url"]), value["vcs_info"]["commit_id"]
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Source(repository[1], commit) if repository and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _from_checkout() -> Source | None:
    if not (ROOT / ".git").exists():
        return None
    said = []
    for arguments in (["remote", "get-url", "origin"], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    repository = _GITHUB.fullmatch(said[0])
    return Source(repository[1], said[1]) if repository else None
