"""The checkpoint stages of a build: the merged model in its folder, and a look at all of its weights."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path

from bot.merging import make_checkpoint
from bot.state import stage_key
from bot.work import CARD, Work
from evals.results import FileMade
from merge import __version__
from merge.errors import DestinationError, SourceError
from merge.expr import reads
from merge.files import file_sha256
from merge.progress import progress
from merge.writer import is_cut_off

# So many of the tensors that are not numbers are named; the first tells where to look.
SAID = 5


def checkpoint(work: Work, gates: Path) -> tuple[FileMade, ...]:
    """The merged checkpoint in `model/`, written where it is not there already; its files."""
    folder, state = work.model, work.state
    done = state.result("merge", work.merge_key)
    if done is None:
        if folder.exists():
            if not (state.knows("merge") or state.knows("merging")):
                raise DestinationError(f"{folder}: not from a build; choose another folder, or remove it")
            # It has its name only when all of it is there; what is left after a kill is to take its checksums.
            if state.result("merging", work.merge_key) is None or state.knows("merge"):
                shutil.rmtree(folder)
        started = time.monotonic()
        if not folder.exists() or is_cut_off(folder):
            state.finish("merging", work.merge_key, [], {})
            state.drop("merge")
            make_checkpoint(work.plan, work.local, gates, work.gates_key, folder)
        made = sorted(path for path in folder.iterdir() if path.name != CARD)
        files = [FileMade(path.name, path.stat().st_size, file_sha256(path)) for path in made]
        done = {"seconds": time.monotonic() - started, "files": [asdict(file) for file in files]}
        state.finish("merge", work.merge_key, made, done)
    return tuple(FileMade(**file) for file in done["files"])


def check_weights(work: Work) -> None:
    """Raise SourceError where the merged model has weights that are not numbers: named with the tensors they are from."""
    key = stage_key("weights", work.merge_key, __version__)
    if work.state.result("weights", key) is not None:
        return
    from evals.weights import broken_tensors
    from merge.evaluate import checkpoint_expressions

    tensors, _, evaluator = checkpoint_expressions(work.model)
    with progress("weights looked through", work.plan.checkpoint_bytes) as shown:
        broken = broken_tensors(tensors, evaluator, shown.advance)
    if broken:
        made_of = {tensor.name: tensor.expr for tensor in work.plan.tensors}
        named = []
        for tensor in broken[:SAID]:
            origins = {
                f"{read.tensor} of {work.plan.sources[read.source].name}": None for read in reads(made_of[tensor.name])
            }
            named.append(
                f"{tensor.name} ({tensor.broken} of {tensor.elements}; from {', '.join(origins) or 'the gates'})"
            )
        more = f"; and {len(broken) - SAID} tensors more" if len(broken) > SAID else ""
        raise SourceError(f"weights that are NaN or infinite: {'; '.join(named)}{more}; no model can be made of them")
    work.state.finish("weights", key, [], {})
