"""Small files of a repository, as the Hub has them: what came is compared with the checksum that the Hub tells.

The client checks the length of what it downloads, not its checksum, and keeps it in its cache: a lock file that arrived with
a bit flipped would stand in the way of every later run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merge.errors import DestinationError
from merge.files import has_checksum

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRIES = 3


def read_small(api: HfApi, repo: str, name: str, revision: str | None = None) -> bytes:
    """The bytes of a small file. Raises DestinationError where it comes damaged each time; the client's errors pass through."""
    for tried in range(TRIES):
        path = Path(api.hf_hub_download(repo, name, revision=revision, force_download=tried > 0))
        data = path.read_bytes()
        # The cache names a file by its ETag, which is the checksum; without links it does not.
        if not path.is_symlink() or has_checksum(data, path.resolve().name):
            return data
    raise DestinationError(f"{repo}/{name}: what was downloaded is not the file on the Hub (checksum); try again")
