"""The gates of a recipe: its prompts from wherever they stand, their content address, their calibration, what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.errors import RecipeError
from merge.expr import Expr, LowRank, Read
from merge.files import write_atomically, writing
from merge.gates.prompts import PromptError, read_prompts, read_prompts_by_expert
from merge.plan import MergePlan
from merge.progress import progress
from merge.recipe import DISCRIMINANT, RANDOM_GATES, LoadedRecipe
from merge.source_files import Files, open_files

if TYPE_CHECKING:
    from evals.results import LayerGroup, LayerRouting, RouterMeasured
    from merge.gates.added import Rows
    from merge.gates.expansion import Sample
    from merge.gates.figures import LayerFigures
    from merge.gates.prompts import ExpertPrompts
    from merge.gates.worth import Model

T = TypeVar("T")
# A file of prompts is text somebody chose; a larger one is a mistake.
MAX_PROMPTS_BYTES = 64 << 20
# The routers that a discriminant one is compared with, in the report's order.
PEERS = ("hidden", "random")
# The report has a confusion matrix for each third of the layers.
GROUPS = 3


def prompts_of(loaded: LoadedRecipe, plan: MergePlan) -> list[ExpertPrompts]:
    """The prompts that the gates are made from, by row: the experts, and a shared expert that has a gate. Raises RecipeError
    where a file of them cannot be used, or an expert has none."""
    from merge.gates.prompts import ExpertPrompts

    if not loaded.recipe.needs_prompts:
        return [ExpertPrompts(expert.positive_prompts, expert.negative_prompts) for expert in plan.gated]
    by_expert = _of_router(loaded, plan)
    found, missing = [], []
    for row, expert in enumerate(plan.gated):
        place = _place(loaded, row)
        positive = expert.positive_prompts
        if expert.prompts_file is not None:
            positive += _read(loaded, expert.prompts_file, loaded.line(*place, "prompts_file"), read_prompts)
        if place in plan.slices:
            positive += plan.slices[place].texts
        positive += by_expert.get(row, ())
        if not positive:
            missing.append(f.PromptsMissing(loaded.line(*place), number=row + 1, mode=plan.gate_mode))
        found.append(ExpertPrompts(positive, expert.negative_prompts))
    if missing:
        raise RecipeError(missing, str(loaded.path))
    return found


def _place(loaded: LoadedRecipe, row: int) -> tuple[str, int]:
    """Where the expert of a row of the gates stands in the recipe."""
    experts = len(loaded.recipe.experts)
    return ("experts", row) if row < experts else ("shared_experts", row - experts)


def _of_router(loaded: LoadedRecipe, plan: MergePlan) -> dict[int, tuple[str, ...]]:
    """The prompts of `router.prompts_file`, by row."""
    name, line = loaded.recipe.router.prompts_file, loaded.line("router", "prompts_file")
    if name is None:
        return {}
    rows = {str(row + 1): row for row in range(len(plan.gated))}
    # A role that two experts have names neither.
    roles = [expert.role for expert in plan.gated]
    rows |= {role: row for row, role in enumerate(roles) if role is not None and roles.count(role) == 1}
    found: dict[int, tuple[str, ...]] = {}
    for expert, texts in _read(loaded, name, line, read_prompts_by_expert).items():
        if expert not in rows:
            problem = f"{expert!r} is not one expert's role or number; there are {', '.join(rows)}"
            raise RecipeError([f.BadPromptsFile(line, file=name, problem=problem)], str(loaded.path))
        found[rows[expert]] = found.get(rows[expert], ()) + texts
    return found


def _read(loaded: LoadedRecipe, name: str, line: int | None, read: Callable[[bytes, str], T]) -> T:
    """What a file beside the recipe holds. Raises RecipeError."""
    path = (loaded.folder / name).resolve()
    try:
        if not path.is_relative_to(loaded.folder.resolve()):
            raise PromptError(f"{name}: outside the recipe's folder")
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise PromptError(f"{name}: larger than {MAX_PROMPTS_BYTES >> 20} MiB")
        return read(path.read_bytes(), name)
    except (OSError, PromptError) as error:
        problem = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise RecipeError([f.BadPromptsFile(line, file=name, problem=problem)], str(loaded.path)) from None


def expands(loaded: LoadedRecipe) -> str | None:
    """Who writes text from short prompts: `base`, `experts` or nobody (None)."""
    expand = loaded.recipe.router.expand
    if expand is False:
        return None
    return expand if isinstance(expand, str) else "base"


def gates_key_of(loaded: LoadedRecipe, plan: MergePlan) -> str:
    """The content address of a recipe's gates."""
    from merge.gates.store import gates_key

    prompts, seed = prompts_of(loaded, plan), loaded.recipe.build.seed
    if plan.gate_mode == DISCRIMINANT:
        from merge.gates.record import routed_key

        return routed_key(prompts, plan.identity(), seed, loaded.recipe.router.regularisation, expands(loaded))
    return gates_key(plan.gate_mode, prompts, seed, plan.sources[plan.base].fingerprint)


def make_gates(
    loaded: LoadedRecipe, plan: MergePlan, local: Mapping[str, Checkpoint], folder: Path, key: str, device: str | None
) -> Path:
    """Calibrate the router into `folder`; returns the file, content-addressed by `key`."""
    if plan.gate_mode in RANDOM_GATES:  # these need no torch
        from merge.gates.random import random_gates
        from merge.gates.store import save_gates

        layers, hidden = plan.config["num_hidden_layers"], plan.config["hidden_size"]
        rows, seed = len(plan.gated), loaded.recipe.build.seed
        drawn = behind_kept(plan, open_files(local), random_gates(plan.gate_mode, layers, rows, hidden, seed))
        return save_gates(drawn, folder, key, {"mode": plan.gate_mode})
    from merge.evaluate import Evaluator
    from merge.gates.mergekit import calibrate
    from merge.gates.store import save_gates

    base = local[plan.base]
    assert base.folder is not None
    device = device or loaded.recipe.build.device
    if plan.gate_mode == DISCRIMINANT:
        return _make_discriminant(loaded, plan, local, folder, key, device)
    with progress(f"gates ({plan.gate_mode})", plan.config["num_hidden_layers"], unit="layer") as shown:
        gates = calibrate(
            plan.gate_mode,
            prompts_of(loaded, plan),
            base.config,
            plan.dense_tensors,
            Evaluator(open_files({plan.base: base})),
            base.folder,
            loaded.recipe.build.seed,
            device,
            progress=lambda done: shown.advance(1),
        )
    made = behind_kept(plan, open_files(local), {layer: gate.numpy() for layer, gate in gates.items()})
    return save_gates(made, folder, key, {"mode": plan.gate_mode})


def behind_kept(plan: MergePlan, files: Mapping[str, Files], gates: Mapping[int, Rows]) -> Mapping[int, Rows]:
    """The gates, behind the router's rows of a base that is a mixture already."""
    if not plan.kept_experts:
        return gates
    from merge.gates.added import kept_rows, with_kept

    kept = kept_rows(plan, files)
    return {layer: with_kept(kept[layer], gate) for layer, gate in gates.items()}


def _make_discriminant(
    loaded: LoadedRecipe, plan: MergePlan, local: Mapping[str, Checkpoint], folder: Path, key: str, device: str
) -> Path:
    from merge.evaluate import Evaluator
    from merge.gates.added import kept_rows
    from merge.gates.comparison import hidden_peer, random_peer
    from merge.gates.expansion import with_samples
    from merge.gates.prompts import ExpertPrompts
    from merge.gates.record import record_of, to_metadata
    from merge.gates.routed import calibrate_discriminant
    from merge.gates.store import save_gates

    base = local[plan.base]
    assert base.folder is not None
    samples = _written(loaded, plan, local, folder, device)
    raw, experts = prompts_of(loaded, plan), len(plan.experts)
    prompts = with_samples(raw, samples)
    files, peers = open_files(local), {}
    if not plan.kept_experts:
        layers, hidden = plan.config["num_hidden_layers"], plan.config["hidden_size"]
        dense, of_base = plan.dense_tensors, Evaluator(open_files({plan.base: base}))
        peers = {
            "hidden": hidden_peer(raw[:experts], prompts, base.config, dense, of_base, base.folder, device),
            "random": random_peer(layers, experts, hidden, loaded.recipe.build.seed),
        }
    with progress(f"gates ({plan.gate_mode})", plan.config["num_hidden_layers"], unit="layer") as shown:
        made = calibrate_discriminant(
            prompts[:experts],
            plan.config,
            {tensor.name: tensor.expr for tensor in plan.tensors},
            Evaluator(files),
            base.folder,
            device,
            loaded.recipe.router.regularisation,
            shown.advance,
            shared=prompts[experts:],
            kept=kept_rows(plan, files),
            others=ExpertPrompts(_general_text()) if plan.kept_experts else None,
            peers=peers,
        )
    record = record_of(made, samples)
    if plan.kept_experts:  # how the new rows do against the kept ones was not measured
        record = replace(record, held_out=False)
    return save_gates(made.gates, folder, key, to_metadata(record))


def _general_text() -> tuple[str, ...]:
    """Paragraphs of all kinds: what the experts of a mixture are for is not known, so general text stands for it."""
    from merge.gates.prompts import read_prompts

    name = "calibration.txt"
    return read_prompts(resources.files("quants").joinpath(name).read_bytes(), name)


def _written(
    loaded: LoadedRecipe, plan: MergePlan, local: Mapping[str, Checkpoint], folder: Path, device: str
) -> tuple[Sample, ...]:
    """The text written from short prompts; kept under its content address in `folder` and in the user's cache, and taken
    from there. A file that cannot be read is as good as none."""
    from pydantic import TypeAdapter, ValidationError

    from merge.gates.expansion import TOKENS, Sample, expand
    from merge.gates.record import written_key
    from merge.hub import written_cache

    who, prompts, seed = expands(loaded), prompts_of(loaded, plan), loaded.recipe.build.seed
    if who is None:
        return ()
    writers = [(plan.base, None)] * len(prompts) if who == "base" else plan.models[: len(prompts)]
    adapter = TypeAdapter(tuple[Sample, ...])
    prints = ["+".join(plan.sources[key].fingerprint for key in writer if key) for writer in writers]
    key = written_key(prompts, prints, seed)
    path, cached = folder / f"prompts-{key[:16]}.json", written_cache() / f"{key}.json"
    for kept in (path, cached):
        with suppress(OSError, ValidationError):
            return adapter.validate_json(kept.read_bytes())
    samples: tuple[Sample, ...] = ()
    for number, writer in enumerate(writers if who == "experts" else writers[:1]):
        model = local[writer[0]]
        assert model.folder is not None
        only = number if who == "experts" else None
        with progress(f"text from short prompts ({model.name})", TOKENS, unit="token") as shown:
            samples += expand(
                prompts,
                *dense_model(local, *writer),
                model.folder,
                seed,
                device,
                only,
                shown.advance,
            )
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("prompts-*.json"):
            old.unlink()
        write_atomically(path, adapter.dump_json(samples, indent=2) + b"\n")
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, path.read_bytes())
    return samples


def dense_model(local: Mapping[str, Checkpoint], key: str, adapter: str | None = None) -> Model:
    """A source as the model it is, with its adapter: config.json, tensors, and what evaluates them."""
    from merge.adapters import read_adapter
    from merge.evaluate import Evaluator

    model = local[key]
    tensors: dict[str, Expr] = {
        name: Read(key, name, info.dtype, info.shape) for name, info in (model.tensors or {}).items()
    }
    if adapter is None:
        return model.config, tensors, Evaluator(open_files({key: model}))
    infos = local[adapter].tensors or {}
    for name, delta in read_adapter(local[adapter]).deltas.items():
        b, a = (Read(adapter, part, infos[part].dtype, infos[part].shape) for part in (delta.b, delta.a))
        tensors[name] = LowRank(tensors[name], b, a, delta.scale)
    return model.config, tensors, Evaluator(open_files({key: model, adapter: local[adapter]}))


def routing_of(gates: Path, experts: int) -> tuple[LayerRouting, ...]:
    """The report's figures of a gates file, layer by layer. Behind its rows for the experts a shared expert's gate may stand."""
    from evals.results import LayerRouting
    from merge.gates.record import read_record
    from merge.gates.report import gate_report
    from merge.gates.store import load_gates

    record = read_record(gates)
    return tuple(
        LayerRouting(
            layer=layer.layer,
            condition=layer.condition if math.isfinite(layer.condition) else None,
            cosine=layer.cosine,
            pair=layer.pair,
            accuracy=record.layers[number].accuracy if record and record.held_out else None,
            shares=record.layers[number].shares if record and record.held_out else (),
        )
        for number, layer in enumerate(gate_report(load_gates(gates), experts))
    )


def routers_of(gates: Path) -> tuple[RouterMeasured, ...]:
    """What a discriminant router, and those it is compared with, do with held-out tokens; nothing where none were held out."""
    from evals.results import RouterMeasured
    from merge.gates.record import read_record

    record = read_record(gates)
    if record is None or not record.held_out:
        return ()
    named = {DISCRIMINANT: record.layers, **{name: record.peers[name] for name in PEERS if name in record.peers}}
    return tuple(
        RouterMeasured(
            router=name,
            accuracy=tuple(layer.accuracy for layer in layers),
            load=tuple(layer.shares for layer in layers),
            entropy=tuple(layer.entropy for layer in layers),
            top_weight=tuple(layer.top_weight for layer in layers),
            groups=groups_of(layers),
        )
        for name, layers in named.items()
    )


def groups_of(layers: Sequence[LayerFigures]) -> tuple[LayerGroup, ...]:
    """The first, the middle and the last third of the layers, each with its mean confusion matrix."""
    from evals.results import LayerGroup

    edges = sorted({round(len(layers) * part / GROUPS) for part in range(GROUPS + 1)})
    groups = []
    for first, stop in pairwise(edges):
        matrices = [layer.goes_to for layer in layers[first:stop]]
        mean = tuple(
            tuple(sum(cells) / len(matrices) for cells in zip(*rows, strict=True))
            for rows in zip(*matrices, strict=True)
        )
        groups.append(LayerGroup(first, stop - 1, mean))
    return tuple(groups)


def written_in(gates: Path) -> tuple[dict[str, str | int], ...]:
    """The text that the prompts were expanded to: expert (from 0), prompt, beginning, text."""
    from merge.gates.record import read_record

    record = read_record(gates)
    return tuple(asdict(one) for one in record.written) if record else ()


def gate_findings(loaded: LoadedRecipe, plan: MergePlan, gates: Path) -> tuple[f.Finding, ...]:
    """What the calibration has to say."""
    from merge.gates.record import advice, read_record

    record = read_record(gates)
    if record is None:
        return ()
    names = [plan.sources[key].name for key in plan.experts]
    lines = {index: loaded.line("experts", index) for index in range(len(names))}
    said = advice(record, names, plan.experts_per_token, lines)
    return tuple(one for one in said if not (plan.kept_experts and isinstance(one, f.NothingToHoldOut)))
