"""What a build released, as a value that later jobs of the workflow read, and as a release on GitHub.

A recipe is released on GitHub where it has a version, or where a tag NAME-vVERSION was pushed. The release's tag is
NAME-vVERSION, and its text has what the card begins with, and the size and SHA-256 of every file on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cards.markdown import code, escape, link
from cards.words import billions, counted

if TYPE_CHECKING:
    from bot.jobs import JobRelease
    from bot.publish import Publication
    from evals.results import Report
    from merge.plan import MergePlan
    from merge.recipe import LoadedRecipe

# GitHub takes 125,000 characters of text for a release.
MAX_TEXT = 120_000
MARKER = "<!-- moerge release -->"
# A version as it can stand in the name of a tag, of git and of the Hub alike.
VERSION = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z._+-]{0,62}[0-9A-Za-z])?")


@dataclass(frozen=True)
class ReleasedFile:
    """A file on the Hub: `repo` is the repository it is in."""

    repo: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class About:
    """What a release says of its model. `parameters` are all of them, `active` those of one token."""

    name: str
    title: str | None
    description: str | None
    family: str
    parameters: int
    active: int
    experts: tuple[str, ...]
    experts_per_token: int
    license: str | None
    version: str | None


@dataclass(frozen=True)
class Release:
    """A release on the Hub: `commit` is the model repository's. `changed` is False where it was there already."""

    about: About
    repo: str
    url: str
    commit: str | None
    gguf_repo: str | None
    changed: bool
    files: tuple[ReleasedFile, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def release_of(value: Any) -> Release:
    """A release from `to_json`, as another job wrote it. Raises ValueError, TypeError or KeyError where it is none."""
    about = {**value["about"], "experts": tuple(str(name) for name in value["about"]["experts"])}
    files = tuple(ReleasedFile(**file) for file in value["files"])
    return Release(**{**value, "about": About(**about), "files": files})


def released_here(report: Report, publication: Publication) -> Release:
    """The release of a build on this machine."""
    about = About(
        name=report.name,
        title=report.title,
        description=report.description,
        family=report.family_title,
        parameters=report.parameters["total"],
        active=report.parameters["active"],
        experts=tuple(expert.source for expert in report.experts),
        experts_per_token=report.experts_per_token,
        license=report.license,
        version=report.version,
    )
    gguf = publication.gguf_repo or publication.repo
    files = [ReleasedFile(publication.repo, file.name, file.bytes, file.sha256) for file in report.files]
    files += [ReleasedFile(gguf, file.name, file.bytes, file.sha256) for file in report.gguf_files]
    return Release(
        about,
        publication.repo,
        publication.url,
        publication.commit,
        publication.gguf_repo,
        publication.changed,
        tuple(files),
    )


def released_in_job(loaded: LoadedRecipe, plan: MergePlan, made: JobRelease) -> Release:
    """The release of a build in a Hugging Face Job; its files are those of the lock file on the Hub."""
    recipe = loaded.recipe
    about = About(
        name=plan.name,
        title=recipe.card.title,
        description=recipe.card.description,
        family=plan.family_title,
        parameters=plan.parameters.total,
        active=plan.parameters.active,
        experts=(
            *[plan.sources[plan.base].name] * plan.kept_experts,
            *(plan.sources[key].name for key in plan.experts),
        ),
        experts_per_token=plan.experts_per_token,
        license=plan.license,
        version=recipe.release.version,
    )
    files = tuple(
        ReleasedFile(repo, name, int(entry["bytes"]), str(entry["sha256"]))
        for repo, entries in made.files.items()
        for name, entry in entries.items()
    )
    return Release(about, made.repo, made.url, made.commit, made.gguf_repo, made.changed, files)


def tag_of(name: str, version: str) -> str:
    """The tag in the recipe repository of a recipe's version."""
    return f"{name}-v{version.removeprefix('v')}"


def tagged_recipe(tag: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Which of the recipes `names` a tag NAME-vVERSION means, and the version; None where it means none of them."""
    for name in sorted(names, key=len, reverse=True):
        version = tag.removeprefix(f"{name}-v")
        if version != tag and VERSION.fullmatch(version):
            return name, version
    return None


def tag_on_hub(release: Release, version: str, token: str | None, endpoint: str | None) -> None:
    """Put a version's tag on both repositories of a release; what is still a pull request there has none yet.

    Raises DestinationError.
    """
    from bot.publish.destination import Destination
    from bot.publish.repository import put_tag
    from bot.publish.tokens import tokens_for

    if release.commit is None:
        return
    tokens = tokens_for(endpoint, token)
    for repo, commit in ((release.gguf_repo, None), (release.repo, release.commit)):
        if repo is not None:
            put_tag(Destination(repo, tokens, endpoint, create_pr=False), version, commit)


def release_text(release: Release, marker: str = MARKER) -> str:
    """The text of the release on GitHub, in Markdown in which nothing of a recipe is markup."""
    about = release.about
    lines = [marker, ""]
    if about.description:
        lines += [escape(about.description.strip().split("\n\n")[0]), ""]
    experts = ", ".join(
        link(name, f"https://huggingface.co/{name}") for name in dict.fromkeys(about.experts) if _is_hub(name)
    )
    lines += [
        f"{link(release.repo, release.url)} on the Hub"
        + (f" at {code(release.commit[:9])}" if release.commit else "")
        + (f", GGUF files in {link(release.gguf_repo, f'{release.url}-GGUF')}" if release.gguf_repo else ""),
        "",
        "| | |",
        "|---|---|",
        f"| Parameters | {billions(about.parameters)}, {billions(about.active)} active per token |",
        f"| Family | {escape(about.family)}, {counted(len(about.experts), 'expert')}, {about.experts_per_token} per token |",
        f"| Experts | {experts or '-'} |",
        f"| Licence | {escape(about.license or 'not known')} |",
        "",
        "| File | Bytes | SHA-256 |",
        "|---|--:|---|",
    ]
    for index, file in enumerate(release.files):
        row = f"| {code(f'{file.repo}/{file.name}')} | {file.bytes:,} | {code(file.sha256)} |"
        if sum(len(line) + 1 for line in lines) + len(row) > MAX_TEXT:
            lines.append(f"| and {len(release.files) - index} more, in the repository's moerge.lock.json | | |")
            break
        lines.append(row)
    return "\n".join(lines)


def release_request(release: Release, tag: str, sha: str) -> Mapping[str, Any]:
    """The body of `POST /repos/{owner}/{repo}/releases`."""
    about = release.about
    return {
        "tag_name": tag,
        "target_commitish": sha,
        "name": f"{about.title or about.name} {tag.rpartition('-v')[2]}",
        "body": release_text(release),
        "draft": False,
        "prerelease": False,
    }


def _is_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None
