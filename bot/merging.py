"""A merge alone, and the stage of a build that it is. Little is imported here: a copy of weights begins at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from bot.gates import gates_key_of, make_gates
from bot.preview import plan_recipe
from bot.work import fetched
from merge.checkpoint import Checkpoint
from merge.errors import DestinationError
from merge.gates.store import gates_path, read_gates
from merge.plan import MergePlan
from merge.progress import progress
from merge.recipe import LoadedRecipe
from merge.source_files import open_files
from merge.sources import Sources
from merge.stored import Stored
from merge.writer import is_cut_off, write_checkpoint


def merge(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> MergePlan:
    """The checkpoint alone, in the new folder `out`. The gates are calibrated into the folder beside it and removed."""
    plan = plan_recipe(loaded, sources)
    if out.exists() and not is_cut_off(out):
        raise DestinationError(f"{out}: exists already; choose another folder, or remove it to merge again")
    local = fetched(plan, sources)
    gates = out.with_name(out.name + ".gates")
    key = gates_key_of(loaded, plan)
    path = gates_path(gates, key)
    if not path.is_file() and not out.exists():  # a run that was cut off may have left them
        make_gates(loaded, plan, local, gates, key, device)
    make_checkpoint(plan, local, path, key, out, lambda: shutil.rmtree(gates, ignore_errors=True))
    return plan


def make_checkpoint(
    plan: MergePlan,
    local: Mapping[str, Checkpoint],
    gates: Path,
    key: str,
    out: Path,
    clean_up: Callable[[], None] = lambda: None,
) -> None:
    """Write the merged checkpoint to the new folder `out`. `clean_up` is called when it is there, before the run is done."""
    # Where only the end of an earlier run is missing, the gates may be gone.
    contents = Stored(open_files(local), {} if out.exists() else read_gates(gates))
    with progress("checkpoint", plan.checkpoint_bytes) as shown:
        write_checkpoint(plan, local[plan.base], contents, out, gates_key=key, advance=shown.advance, clean_up=clean_up)
