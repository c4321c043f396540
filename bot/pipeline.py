"""A build: gates, checkpoint, GGUF, report and cards, one stage after the other, each only if its inputs changed."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.checkpoints import check_weights, checkpoint
from bot.evals import Inputs, evaluated, read_inputs
from bot.gates import gate_findings, gates_key_of, make_gates, routers_of, routing_of, written_in
from bot.ggufs import GgufMade, gguf_files
from bot.image import CardImage, read_image, with_image
from bot.preview import plan_recipe
from bot.quants import check_tokenizer
from bot.report import planned_report, said
from bot.state import State, locked, stage_key
from bot.work import GGUF, MODEL, Work
from bot.worth import is_measured, measured, worth_findings
from cards.render import write_cards
from evals.results import REPORT, ExpertWorth, FileMade, Report
from merge import __version__
from merge import findings as f
from merge.errors import UsageError
from merge.files import write_atomically, writing
from merge.progress import say
from merge.recipe import LoadedRecipe
from merge.sources import Sources

if TYPE_CHECKING:
    from bot.publish import Publication
    from merge.plan import MergePlan

__all__ = ["GGUF", "MODEL", "build", "build_and_publish"]


def build(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> Report:
    """Build `loaded` into `out`: `model/`, `gguf/`, `report.json` and `state.json`.

    What an earlier run of the same inputs finished is kept. `device` overrides the recipe's. Raises RecipeError,
    SourceError, DestinationError, ProofError or UsageError; what was finished by then stays and is used by the next run.
    """
    plan = plan_recipe(loaded, sources)
    _say_findings(loaded, plan)
    with locked(out):
        return _build(Work(loaded, plan, sources, out, device, State(out)))


def build_and_publish(
    loaded: LoadedRecipe,
    sources: Sources,
    out: Path,
    *,
    device: str | None = None,
    max_disk: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> tuple[Report, Publication]:
    """Build `loaded` into `out` and publish it; a release that is on the Hub already is not built again.

    With `max_disk`, the recipe's where None, the build is bounded: what is made is uploaded and deleted. Raises what `build`
    and `publish` raise.
    """
    from bot.disk import parse_size
    from bot.publish.release import destinations, publish, released
    from bot.publish.tokens import tokens_for

    plan = plan_recipe(loaded, sources)
    repo = loaded.recipe.release.repo
    if repo is None:
        raise UsageError(f"{loaded.path}: names no repository to publish to; add release: {{repo: owner/name}}")
    limit = max_disk or loaded.recipe.build.max_disk
    planned = planned_report(loaded, plan, gates_key_of(loaded, plan))
    tokens = tokens_for(endpoint, token)
    if (there := released(planned, plan.quants, tokens, endpoint, token)) is not None:
        return there
    _say_findings(loaded, plan)
    with locked(out):
        if limit is None:
            report = _build(Work(loaded, plan, sources, out, device, State(out)))
        else:
            from bot.bounded import build_bounded

            work = Work(loaded, plan, sources, out, device, State(out), out / "sources")
            report = build_bounded(work, parse_size(limit), destinations(planned, plan.quants, tokens, endpoint))
            shutil.rmtree(out / "sources", ignore_errors=True)
    return report, publish(out, token=token, endpoint=endpoint, tokens=tokens)


def _say_findings(loaded: LoadedRecipe, plan: MergePlan) -> None:
    """The plan's findings, at their lines."""
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))


def _build(work: Work) -> Report:
    beside = read_beside_recipe(work.loaded)
    gates = gates_of(work)
    files = checkpoint(work, gates)
    check_weights(work)
    gguf = gguf_files(work)
    return finish(work, evaluated(work, beside.inputs, report_of(work, gates, files, gguf)), beside)


def finish(work: Work, report: Report, beside: Beside) -> Report:
    """The report and the cards of a build whose stages are done."""
    report = with_image(report, beside.image, work.model)
    with writing(work.out):
        write_atomically(work.out / REPORT, report.to_json())
        write_cards(work.out, report)
    return report


@dataclass(frozen=True)
class Beside:
    """What a build reads beside its recipe, all of it checked before anything is built."""

    inputs: Inputs
    image: CardImage | None


def read_beside_recipe(loaded: LoadedRecipe) -> Beside:
    """Raises RecipeError where a file that the recipe names cannot be used, UsageError where a program is missing."""
    return Beside(read_inputs(loaded), read_image(loaded))


def gates_of(work: Work) -> Path:
    """The router's file, calibrated where it is not there already."""
    from merge.gates import gates_path

    if work.state.result("gates", work.gates_key) is None:
        started = time.monotonic()
        if work.plan.quants:
            check_tokenizer(work.plan, work.local)
        made = make_gates(work.loaded, work.plan, work.local, work.out, work.gates_key, work.device)
        for old in set(work.out.glob("gates-*.safetensors")) - {made}:
            old.unlink()
        work.state.finish("gates", work.gates_key, [made], {"seconds": time.monotonic() - started})
    return gates_path(work.out, work.gates_key)


def _worth(work: Work, gates: Path) -> tuple[ExpertWorth, ...]:
    """What each expert is worth in this merge, measured where it is not known already."""
    if not is_measured(work.loaded, work.plan, work.on_device) or (
        work.ranges is not None and not work.loaded.recipe.evals.worth
    ):
        return ()
    key = stage_key("worth", work.merge_key, __version__)
    done = work.state.result("worth", key)
    if done is None:
        found = measured(work.loaded, work.plan, work.local, gates, work.on_device)
        done = {"experts": [asdict(one) for one in found]}
        work.state.finish("worth", key, [], done)
    return tuple(ExpertWorth(**one) for one in done["experts"])


def report_of(work: Work, gates: Path, files: tuple[FileMade, ...], gguf: GgufMade) -> Report:
    """The report of a build whose stages left these; without what the recipe's `evals` ask for."""
    worth = _worth(work, gates)
    found = (
        *work.plan.findings,
        *gate_findings(work.loaded, work.plan, gates),
        *worth_findings(work.loaded, work.plan, worth),
        *_unreached(work, gguf),
    )
    return replace(
        planned_report(work.loaded, work.plan, work.gates_key),
        files=files,
        quants=gguf.quants,
        failed_quants=gguf.failed,
        imatrix=gguf.imatrix,
        quants_measured=gguf.measured,
        routing=routing_of(gates, work.plan.expert_count),
        routers=routers_of(gates),
        worth=worth,
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
