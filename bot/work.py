"""One build in its folder: what every stage of it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bot.gates import gates_key_of
from bot.state import State, stage_key
from merge.checkpoint import Checkpoint
from merge.errors import SourceError
from merge.plan import MergePlan
from merge.recipe import LoadedRecipe
from merge.sources import Sources

MODEL, GGUF = "model", "gguf"
# Files of DIR/model/ that the card stage writes; the rest is the checkpoint.
CARD = "README.md"


@dataclass(frozen=True)
class Work:
    """A recipe, its plan, and the folder that it is built into. `device` is the one asked for on the command line."""

    loaded: LoadedRecipe
    plan: MergePlan
    sources: Sources
    out: Path
    device: str | None
    state: State
    # Sources come tensor by tensor into this folder, where there is no room for all of them.
    ranges: Path | None = None

    @cached_property
    def gates_key(self) -> str:
        """The content address of the gates."""
        return gates_key_of(self.loaded, self.plan)

    @cached_property
    def merge_key(self) -> str:
        """What the checkpoint is made from, as the state knows it."""
        return stage_key("merge", self.plan.identity(), self.gates_key)

    @cached_property
    def local(self) -> Mapping[str, Checkpoint]:
        """The sources, brought to this machine at the first stage that needs them, and not at all if none does."""
        if self.ranges is None:
            return fetched(self.plan, self.sources)
        check_weights_there(self.plan)
        return self.sources.ranged(self.plan.needed_companions, self.plan.sources, self.ranges, 0)

    @property
    def on_device(self) -> str:
        """Where forward passes run."""
        return self.device or self.loaded.recipe.build.device

    @property
    def model(self) -> Path:
        """The merged checkpoint's folder."""
        return self.out / MODEL

    @property
    def gguf(self) -> Path:
        """The GGUF files' folder."""
        return self.out / GGUF


def fetched(plan: MergePlan, sources: Sources) -> dict[str, Checkpoint]:
    """The plan's sources with every file that is needed on this machine. Raises SourceError."""
    check_weights_there(plan)
    return sources.fetch(plan.needed_files, plan.sources)


def check_weights_there(plan: MergePlan) -> None:
    """Raises SourceError for a source that has no weights."""
    for source in plan.sources.values():
        if source.why_no_headers is not None:
            raise SourceError(f"{source.name}: its weights are not there, only its config.json")
