"""The Hub's folder on disk: its repositories by name, a secret for signing, and a place for what is not finished.

hub.json           the format's number
secret             signs upload addresses and short-lived tokens (mode 0600)
repos/models/OWNER/NAME/, repos/datasets/…, repos/spaces/…
collections/       see bot/hub/collection.py
incoming/          uploads and repositories that are being made or deleted; emptied as they grow stale
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bot.hub import errors, names
from bot.hub.names import KINDS, RepoKind, RepoName
from bot.hub.repository import Repository, Settings

FORMAT = 1
_STALE_SECONDS = 24 * 3600

# What the real Hub puts into a new model repository: these are stored as large files whatever their size.
_LARGE = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gguf *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite
*.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LARGE.split())


class StoreError(Exception):
    """The folder cannot be used as a Hub's: it is of another format, or not readable and writable."""


class Store:
    """Repositories under one root folder. Several processes may serve the same root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        try:
            self._open()
        except OSError as error:
            raise StoreError(f"{root} cannot be used as the Hub's folder: {error.strerror or error}") from error

    def _open(self) -> None:
        for folder in (self.incoming, self.root / "repos", self.root / "collections"):
            folder.mkdir(parents=True, exist_ok=True)
        marker = self.root / "hub.json"
        create_once(marker, json.dumps({"format": FORMAT}).encode(), mode=0o644)
        try:
            found = json.loads(marker.read_bytes())["format"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != FORMAT:
            raise StoreError(f"{marker} names format {found}, this program reads format {FORMAT}.")
        create_once(self.root / "secret", secrets.token_bytes(32), mode=0o600)
        self.secret = (self.root / "secret").read_bytes()
        self._sweep(time.time() - _STALE_SECONDS)

    # -- repositories

    def folder(self, name: RepoName) -> Path:
        """Where a repository lies, or would lie."""
        return self.root / "repos" / f"{name.kind}s" / name.owner / name.name

    def get(self, name: RepoName) -> Repository:
        """A repository. Raises HubError(404)."""
        repository = Repository(self.folder(name), name)
        if not (repository.folder / "repo.json").is_file():
            raise errors.repo_not_found()
        return repository

    def create(self, name: RepoName, settings: Settings, author: str) -> Repository:
        """A new repository with one commit, which holds ``.gitattributes``. Raises HubError(409) where it exists."""
        building = self.temporary()
        target = self.folder(name)
        try:
            files = {".gitattributes": GITATTRIBUTES.encode()}
            Repository.initialise(building, name, settings, files, author)
            self._rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return Repository(target, name)

    def delete(self, repository: Repository) -> None:
        """Delete a repository and everything in it."""
        doomed = self.temporary()
        with repository.locked():
            repository.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):
            repository.folder.parent.rmdir()  # the owner's folder, if this was the last

    def move(self, repository: Repository, name: RepoName) -> Repository:
        """Give a repository another name. Raises HubError(409) where that is taken."""
        with repository.locked():
            self._rename(repository.folder, self.folder(name))
        return Repository(self.folder(name), name)

    def all(self, kind: RepoKind | None = None) -> Iterator[Repository]:
        """Every repository (of one kind), by name."""
        for each in KINDS if kind is None else (kind,):
            for marker in sorted((self.root / "repos" / f"{each}s").glob("*/*/repo.json")):
                owner, name = marker.parts[-3:-1]
                with contextlib.suppress(errors.HubError):
                    yield Repository(marker.parent, names.repo(each, owner, name))

    # -- unfinished things

    def temporary(self) -> Path:
        """A path under ``incoming`` that nothing uses."""
        return self.incoming / secrets.token_hex(16)

    def _rename(self, source: Path, target: Path) -> None:
        for _ in range(10):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                source.rename(target)
            except FileNotFoundError:  # the owner's folder was just removed with its last repository
                continue
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise errors.conflict("You already created this repo") from None
                raise
            return
        raise errors.HubError(503, "The repository could not be placed; try again.")

    def _sweep(self, older_than: float) -> None:
        for path in self.incoming.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < older_than:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def create_once(path: Path, data: bytes, *, mode: int) -> bool:
    """Write a file unless it exists, whole even if several processes start at once. Whether this call wrote it."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        return True
    finally:
        temporary.unlink()
