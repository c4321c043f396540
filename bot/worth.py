"""What each expert is worth in a merge: whether it is measured, the measure, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bot.gates import dense_model, prompts_of
from evals.results import ExpertWorth
from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.families import WITHOUT_CLASS
from merge.plan import MergePlan
from merge.progress import progress
from merge.recipe import LoadedRecipe
from merge.source_files import open_files

# On a CPU models of more parameters are measured only where the recipe asks for it.
SMALL = 1_000_000_000


def is_measured(loaded: LoadedRecipe, plan: MergePlan, device: str, asked: bool | None = None) -> bool:
    """Whether the experts' worth is measured on `device`: as `asked` or else evals.worth says; without either where it takes
    no download beyond the merge's own, on a GPU or of a small model."""
    if not loaded.recipe.needs_prompts or plan.kept_experts or plan.family in WITHOUT_CLASS:
        return False
    asked = loaded.recipe.evals.worth if asked is None else asked
    if asked is not None:
        return asked
    needed = plan.needed_files
    if any(plan.sources[key].is_hub and not _weights(plan, key) <= set(needed[key]) for key in _keys(plan)):
        return False
    from merge.forward import resolve_device

    small = plan.parameters.shared + plan.parameters.per_expert <= SMALL
    return small or resolve_device(device).type == "cuda"


def measured(
    loaded: LoadedRecipe, plan: MergePlan, local: Mapping[str, Checkpoint], gates: Path, device: str
) -> tuple[ExpertWorth, ...]:
    """Each expert's losses on its calibration text, in the merged model with the routers in `gates`."""
    from merge.evaluate import Evaluator
    from merge.gates.expansion import Sample, with_samples
    from merge.gates.record import read_record
    from merge.gates.store import load_gates
    from merge.gates.worth import expert_worth

    record, base = read_record(gates), local[plan.base]
    assert base.folder is not None
    samples = [Sample(**asdict(one)) for one in record.written] if record else []
    prompts = with_samples(prompts_of(loaded, plan), samples)[: len(plan.experts)]
    merged = (
        plan.config,
        {tensor.name: tensor.expr for tensor in plan.tensors},
        Evaluator(open_files(local), load_gates(gates)),
    )
    rows = loaded.recipe.experts
    layers = plan.config["num_hidden_layers"] * (2 + len(plan.experts))
    with progress("what the experts are worth", layers, unit="layer") as shown:
        found = expert_worth(
            prompts,
            merged,
            dense_model(local, plan.base),
            lambda e: dense_model(local, *plan.models[e]) if rows[e].expert is None else None,
            base.folder,
            device,
            shown.advance,
        )
    return tuple(ExpertWorth(**asdict(one)) for one in found)


def worth_findings(loaded: LoadedRecipe, plan: MergePlan, worth: Sequence[ExpertWorth]) -> tuple[f.Finding, ...]:
    """The experts that do worse in this merge than the base does without them."""
    return tuple(
        f.ExpertLosesItsSkill(
            loaded.line("experts", one.expert),
            number=one.expert + 1,
            model=plan.sources[plan.experts[one.expert]].name,
            shared=f"{one.shared:.2f}",
            base=f"{one.base:.2f}",
            own="" if one.own is None else f"; as it is, {one.own:.2f}",
        )
        for one in worth
        if one.shared > one.base
    )


def worth_text(worth: Sequence[ExpertWorth]) -> str:
    """The losses as a table."""
    lines = [
        "Loss on each expert's own text, nats per token:",
        f"{'expert':>6}  {'base':>5}  {'as it is':>8}  {'in this merge':>13}",
    ]
    for one in worth:
        own = "-" if one.own is None else f"{one.own:.2f}"
        lines.append(f"{one.expert + 1:>6}  {one.base:>5.2f}  {own:>8}  {one.shared:>13.2f}")
    return "\n".join(lines)


def _keys(plan: MergePlan) -> set[str]:
    return {key for pair in plan.models for key in pair if key is not None}


def _weights(plan: MergePlan, key: str) -> set[str]:
    return {info.file for info in (plan.sources[key].tensors or {}).values() if info.file is not None}
