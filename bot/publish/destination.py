"""A repository that is written to: the client with its own token, large files sent, by whoever has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bot.publish.contents import Content, Uploaded
from bot.publish.patience import patiently
from bot.publish.tokens import Tokens
from merge.errors import DestinationError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# An upload larger than this is told of.
NAMED = 1 << 20
# An upload that arrives damaged is refused with this status, and sent again.
DAMAGED = 400


class Destination:
    """A repository on the Hub, and how it is reached. With `create_pr` the commit will be a pull request."""

    def __init__(self, repo: str, tokens: Tokens, endpoint: str | None, *, create_pr: bool) -> None:
        self.repo, self.create_pr = repo, create_pr
        self._tokens, self._endpoint = tokens, endpoint

    @property
    def api(self) -> HfApi:
        """The client, with this repository's own token."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint, token=self._tokens.of(self.repo))

    def api_with(self, account: str | None) -> HfApi:
        """The client with a token that may do more, where there is one."""
        from huggingface_hub import HfApi

        return self.api if account is None else HfApi(endpoint=self._endpoint, token=account)

    @property
    def has_token(self) -> bool:
        """Whether it is asked with a token of ours."""
        return self._tokens.of(self.repo) is not None

    @property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return self._endpoint or constants.ENDPOINT

    def create(self, *, private: bool) -> None:
        """Make the repository where there is none."""

        def create() -> None:
            if self.api.repo_exists(self.repo):
                return
            self._tokens.check_creation(self.repo)
            self.api.create_repo(self.repo, private=private, exist_ok=True)

        patiently(self.repo, self.endpoint, create)


def addition_of(name: str, content: Content, digest: str) -> CommitOperationAdd:
    """The client's operation that adds a file whose SHA-256 is known."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    if not isinstance(content, Uploaded):
        addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        addition.upload_info.sha256 = bytes.fromhex(digest)
        return addition
    # What the client itself leaves of a file after `preupload_lfs_files`: the commit needs no more.
    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
    addition.upload_info = UploadInfo(size=content.bytes, sample=b"", sha256=bytes.fromhex(content.sha256))
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition


def preupload(repository: Destination, additions: Sequence[CommitOperationAdd]) -> None:
    """Send the large files that the Hub does not have. A file that arrives damaged is sent again."""

    def send() -> None:
        repository.api.preupload_lfs_files(repository.repo, additions, create_pr=repository.create_pr)

    if additions:
        patiently(repository.repo, repository.endpoint, send, also=(DAMAGED,))
    if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
        raise DestinationError(
            f"{repository.repo}: its .gitignore keeps {ignored[0]} out; take that line away on the Hub"
        )


def not_there(repository: Destination, additions: Sequence[CommitOperationAdd]) -> list[str]:
    """Those of some uploaded files that the Hub does not have any more: without a commit nothing holds them for ever."""
    from huggingface_hub.lfs import post_lfs_batch_info
    from huggingface_hub.utils._headers import build_hf_headers

    def ask() -> list[str]:
        answers, errors, _ = post_lfs_batch_info(
            upload_infos=[addition.upload_info for addition in additions],
            token=None,
            repo_type="model",
            repo_id=repository.repo,
            endpoint=repository.endpoint,
            headers=build_hf_headers(token=repository.api.token),
        )
        missing = {answer["oid"] for answer in answers if answer.get("actions")} | {error["oid"] for error in errors}
        return [each.path_in_repo for each in additions if each.upload_info.sha256.hex() in missing]

    return patiently(repository.repo, repository.endpoint, ask) if additions else []
