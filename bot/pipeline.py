"""A build: gates, checkpoint, GGUF, report and cards, one stage after the other, each only if its inputs changed."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from bot.checkpoints import check_weights, checkpoint, make_checkpoint
from bot.gates import gate_findings, gates_key_of, make_gates, routing_of, written_in
from bot.ggufs import GgufMade, gguf_files
from bot.preview import plan_recipe
from bot.report import planned_report, said
from bot.state import State, locked
from bot.work import GGUF, MODEL, Work, fetched
from cards.render import write_cards
from evals.results import REPORT, FileMade, Report
from merge import findings as f
from merge.errors import DestinationError
from merge.files import write_atomically, writing
from merge.plan import MergePlan
from merge.progress import say
from merge.recipe import LoadedRecipe
from merge.sources import Sources
from merge.writer import is_cut_off

__all__ = ["GGUF", "MODEL", "build", "merge"]


def build(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> Report:
    """Build `loaded` into `out`: `model/`, `gguf/`, `report.json` and `state.json`.

    What an earlier run of the same inputs finished is kept. `device` overrides the recipe's. Raises RecipeError,
    SourceError, DestinationError, ProofError or UsageError; what was finished by then stays and is used by the next run.
    """
    plan = plan_recipe(loaded, sources)
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))
    with locked(out):
        return _build(Work(loaded, plan, sources, out, device, State(out)))


def merge(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> MergePlan:
    """The checkpoint alone, in the new folder `out`. The gates are calibrated into the folder beside it and removed."""
    from merge.gates.store import gates_path

    plan = plan_recipe(loaded, sources)
    if out.exists() and not is_cut_off(out):
        raise DestinationError(f"{out}: exists already; choose another folder, or remove it to merge again")
    local = fetched(plan, sources)
    gates = out.with_name(out.name + ".gates")
    key = gates_key_of(loaded, plan)
    path = gates_path(gates, key)
    if not path.is_file():  # a run that was cut off may have left them
        make_gates(loaded, plan, local, gates, key, device)
    make_checkpoint(plan, local, path, key, out)
    shutil.rmtree(gates)
    return plan


def _build(work: Work) -> Report:
    gates = _gates(work)
    files = checkpoint(work, gates)
    check_weights(work)
    report = _report(work, gates, files, gguf_files(work))
    with writing(work.out):
        write_atomically(work.out / REPORT, report.to_json())
        write_cards(work.out, report)
    return report


def _gates(work: Work) -> Path:
    """The router's file, calibrated where it is not there already."""
    from merge.gates import gates_path

    if work.state.result("gates", work.gates_key) is None:
        started = time.monotonic()
        made = make_gates(work.loaded, work.plan, work.local, work.out, work.gates_key, work.device)
        for old in set(work.out.glob("gates-*.safetensors")) - {made}:
            old.unlink()
        work.state.finish("gates", work.gates_key, [made], {"seconds": time.monotonic() - started})
    return gates_path(work.out, work.gates_key)


def _report(work: Work, gates: Path, files: tuple[FileMade, ...], gguf: GgufMade) -> Report:
    found = (*work.plan.findings, *gate_findings(work.loaded, work.plan, gates), *_unreached(work, gguf))
    return replace(
        planned_report(work.loaded, work.plan, work.gates_key),
        files=files,
        quants=gguf.quants,
        failed_quants=gguf.failed,
        imatrix=gguf.imatrix,
        quants_measured=gguf.measured,
        routing=routing_of(gates),
        written_prompts=written_in(gates),
        findings=tuple(map(said, found)),
        seconds={
            stage: (work.state.result(stage, key) or {}).get("seconds", 0.0)
            for stage, key in (("gates", work.gates_key), ("merge", work.merge_key))
        },
    )


def _unreached(work: Work, gguf: GgufMade) -> list[f.Finding]:
    """Experts that no token reached, which only the finished model shows."""
    return [
        f.ExpertUnreached(
            work.loaded.line("experts", expert, "source_model"),
            expert=expert + 1,
            layers=f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, the first of them {layers[0]}",
        )
        for expert, layers in gguf.unreached.items()
    ]
