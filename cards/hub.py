"""Names and addresses on the Hugging Face Hub."""

from __future__ import annotations

import re

from evals.results import Report, SourceUsed

HUB = "https://huggingface.co"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def hub_id(name: str) -> str | None:
    """`owner/name` of a source named `owner/name` or `owner/name@revision`; None for a folder."""
    path = name.partition("@")[0]
    return path if _NAME.fullmatch(path) and ".." not in path else None


def model_url(name: str, commit: str | None = None) -> str | None:
    """Where a source is on the Hub, at its commit where that is known; None for a folder."""
    path = hub_id(name)
    if path is None:
        return None
    return f"{HUB}/{path}/tree/{commit}" if commit and _COMMIT.fullmatch(commit) else f"{HUB}/{path}"


def gguf_repo(repo: str) -> str:
    """The repository of a model's GGUF files."""
    return f"{repo}-GGUF"


def file_url(repo: str, file: str) -> str:
    """The page of a file in a repository."""
    return f"{HUB}/{repo}/blob/main/{file}"


def source_of(report: Report, name: str) -> SourceUsed | None:
    """The pinned source of this name: the very same one, or else the one at the same place."""
    place = name.partition("@")[0]
    same = [source for source in report.sources if source.name == name]
    return next(iter(same or [source for source in report.sources if source.name.partition("@")[0] == place]), None)
