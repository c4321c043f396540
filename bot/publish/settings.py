"""What a release asks for beside its files: visibility, gating, a collection, a word in the previous model's card."""

from __future__ import annotations

from collections.abc import Sequence

from bot.publish.destination import Destination
from bot.publish.patience import patiently
from bot.publish.small_files import read_small
from evals.results import Report


def is_private_first(report: Report) -> bool:
    """Whether a new repository is made private: for good, or until all of the release is there."""
    return report.private or report.release.private_first


def finish(report: Report, repositories: Sequence[Destination], account: str | None) -> None:
    """Everything that comes after the commits. `account` is a token that may do more than write to one repository, where there
    is one. What is as it should be is left alone."""
    for repository in repositories:
        _set(report, repository, account)
    if report.release.collection is not None:
        _collect(report, repositories, account)
    if report.release.replaces is not None and report.repo is not None:
        _announce(report.release.replaces, report.repo, repositories[-1], account)


def _set(report: Report, repository: Destination, account: str | None) -> None:
    """Gating, then visibility: a gated model is never public without its gate."""
    gated, reveal = report.release.gated, report.release.private_first and not report.private

    def settings() -> None:
        api = repository.api_with(account)
        info = api.model_info(repository.repo)
        if gated is not None and info.gated != gated:
            api.update_repo_settings(repository.repo, gated=gated)
        if reveal and info.private:
            api.update_repo_settings(repository.repo, private=False)

    if gated is not None or reveal:
        patiently(repository.repo, repository.endpoint, settings)


def _collect(report: Report, repositories: Sequence[Destination], account: str | None) -> None:
    """Both repositories into the collection, which is made where a title names none."""
    wanted, owner = report.release.collection or "", (report.repo or "").split("/")[0]
    api = repositories[-1].api_with(account)

    def collect() -> None:
        if "/" in wanted:
            slug = wanted
        else:
            mine = [each.slug for each in api.list_collections(owner=owner) if each.title == wanted]
            slug = mine[0] if mine else api.create_collection(wanted, namespace=owner, exists_ok=True).slug
        there = {item.item_id for item in api.get_collection(slug).items}
        for repository in reversed(repositories):
            if repository.repo not in there:
                api.add_collection_item(slug, repository.repo, "model", exists_ok=True)

    patiently(f"collection {wanted}", repositories[-1].endpoint, collect)


def _announce(previous: str, repo: str, repository: Destination, account: str | None) -> None:
    """The previous model's card names `repo` as its new version."""
    from huggingface_hub import ModelCard

    api = repository.api_with(account)

    def announce() -> None:
        head = api.model_info(previous).sha
        card = ModelCard(_text(repository, account, previous, head))
        if getattr(card.data, "new_version", None) == repo:
            return
        card.data["new_version"] = repo
        api.upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo="README.md",
            repo_id=previous,
            commit_message=f"Name {repo} as the new version",
            parent_commit=head,
        )

    patiently(previous, repository.endpoint, announce)


def _text(repository: Destination, account: str | None, repo: str, revision: str | None) -> str:
    return read_small(repository.api_with(account), repo, "README.md", revision).decode()
