"""Where a recipe's models come from: a local folder, a folder of models kept beside the Hub's names, or the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from merge.checkpoint import ADAPTER, MODEL, Checkpoint, Layout, open_folder
from merge.errors import SourceError
from merge.hub import Hub
from merge.reference import ModelReference


class LocalNotAllowedError(SourceError):
    """A local folder named where only the Hub may be."""


class Sources:
    """Opens the models that recipes name.

    `folder`: where relative local paths begin. `models`: a folder with models as `owner/name/`, looked into before the Hub
    is asked. `local_root`: local folders must lie inside it; None lets them lie anywhere. `allow_local=False` refuses all.
    `pins`: by a model's name in the recipe the commit that is meant, whatever its revision means now.
    `hub`: one that other recipes use too, instead of one of its own at `endpoint`, asked with `token`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        models: Path | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        allow_local: bool = True,
        local_root: Path | None = None,
        hub: Hub | None = None,
        pins: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._models = models
        self._endpoint = endpoint
        self._token = token
        self._allow_local = allow_local
        self._local_root = local_root
        self._pins = pins or {}
        if hub is not None:
            self.hub = hub

    @cached_property
    def hub(self) -> Hub:
        """Made at the first model that is on no disk: a run on local models needs no Hub client."""
        return Hub(self._endpoint, self._token)

    def open(self, reference: ModelReference) -> Checkpoint:
        """The checkpoint at `reference`, from its headers, with its adapter where it names one. Raises SourceError."""
        model, *adapters = (self._open(*part) for part in _parts(reference))
        return _with_adapter(model, *adapters)

    def begin(self, references: Iterable[ModelReference]) -> list[ModelReference]:
        """Ask the Hub for several at once, without waiting for its answers; each once."""
        wanted = list(dict.fromkeys(references))
        for part, layout in _all_parts(wanted):
            if not part.is_local and self._kept(part) is None:
                self.hub.begin(self._pinned(part), layout)
        return wanted

    def open_all(
        self, references: Iterable[ModelReference]
    ) -> tuple[dict[ModelReference, Checkpoint], dict[ModelReference, SourceError]]:
        """Open several at once, each model and adapter once: those that could be, and the error of each that could not."""
        wanted = self.begin(references)
        outcomes = {part: self._try_open(*part) for part in _all_parts(wanted)}
        opened: dict[ModelReference, Checkpoint] = {}
        failed: dict[ModelReference, SourceError] = {}
        for reference in wanted:
            checkpoints = []
            for part in _parts(reference):
                outcome = outcomes[part]
                if isinstance(outcome, SourceError):
                    failed.setdefault(reference, outcome)
                else:
                    checkpoints.append(outcome)
            if reference not in failed:
                opened[reference] = _with_adapter(*checkpoints)
        return opened, failed

    def fetch(
        self,
        needed: Mapping[str, Iterable[str]],
        checkpoints: Mapping[str, Checkpoint],
    ) -> dict[str, Checkpoint]:
        """Bring the needed files of each checkpoint (by key) to this machine; local ones are there already."""
        return {
            key: self.hub.download(checkpoint, needed[key]) if checkpoint.is_hub else checkpoint
            for key, checkpoint in checkpoints.items()
        }

    def ranged(
        self,
        companions: Mapping[str, Iterable[str]],
        checkpoints: Mapping[str, Checkpoint],
        folder: Path,
        capacity: int,
    ) -> dict[str, Checkpoint]:
        """The checkpoints with their small `companions` on this machine, and the tensors of those on the Hub fetched one by
        one into `folder` when they are read, at most about `capacity` bytes at a time."""
        from merge.ranged import RangeStore

        if not any(checkpoint.is_hub for checkpoint in checkpoints.values()):
            return dict(checkpoints)
        store = RangeStore(folder, capacity, self.hub.fetch_range)
        return {
            key: replace(self.hub.placed(self.hub.download(checkpoint, companions.get(key, ()))), ranges=store)
            if checkpoint.is_hub
            else checkpoint
            for key, checkpoint in checkpoints.items()
        }

    def _open(self, reference: ModelReference, layout: Layout) -> Checkpoint:
        if reference.is_local:
            return open_folder(self._local_folder(reference), str(reference), layout)
        if (kept := self._kept(reference)) is not None:
            return open_folder(kept, str(reference), layout)
        return replace(self.hub.open(self._pinned(reference), layout), name=str(reference))

    def _kept(self, reference: ModelReference) -> Path | None:
        """Where a model lies that is kept under its name on the Hub."""
        folder = self._models / reference.path if self._models is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def _pinned(self, reference: ModelReference) -> ModelReference:
        commit = self._pins.get(str(reference))
        return replace(reference, revision=commit) if commit is not None else reference

    def _try_open(self, reference: ModelReference, layout: Layout) -> Checkpoint | SourceError:
        try:
            return self._open(reference, layout)
        except SourceError as error:
            return error

    def _local_folder(self, reference: ModelReference) -> Path:
        folder = (self._folder / Path(reference.path).expanduser()).resolve()
        inside = self._local_root is None or folder.is_relative_to(self._local_root.resolve())
        if not self._allow_local or not inside:
            raise LocalNotAllowedError(str(reference))
        return folder


def _parts(reference: ModelReference) -> list[tuple[ModelReference, Layout]]:
    return list(zip(reference.parts, (MODEL, ADAPTER), strict=False))


def _all_parts(references: Iterable[ModelReference]) -> list[tuple[ModelReference, Layout]]:
    return list(dict.fromkeys(part for reference in references for part in _parts(reference)))


def _with_adapter(model: Checkpoint, adapter: Checkpoint | None = None) -> Checkpoint:
    return replace(model, adapter=adapter)
