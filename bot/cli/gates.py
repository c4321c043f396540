"""`moerge gates`: calibrate a recipe's router and say how well it tells the experts apart; no model is written."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.cli.options import add_device_option, add_source_options, source_options
from merge.files import write_atomically, writing

if TYPE_CHECKING:
    from merge.gates.record import Record
    from merge.gates.report import LayerReport

HELP = (
    "calibrate the router and print how well it tells the experts apart, with confusion matrices; no model is written"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the gates to this safetensors file")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the figures of held-out prompts as JSON instead: what report.json has under `routers`, a list that is "
        "empty where none were held out",
    )
    parser.add_argument(
        "--worth",
        action=argparse.BooleanOptionalAction,
        help="compare each expert's loss, as it is and in this merge, with the base's (default: as the recipe says)",
    )
    add_device_option(parser)
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.gates import gate_findings, gates_key_of, make_gates, routers_of
    from bot.preview import plan_recipe
    from bot.worth import is_measured, measured, worth_findings, worth_text
    from merge.errors import SourceError
    from merge.expr import reads
    from merge.gates.mergekit import base_files
    from merge.gates.record import read_record
    from merge.gates.report import gate_report
    from merge.gates.store import load_gates
    from merge.progress import say
    from merge.recipe import DISCRIMINANT, load_recipe
    from merge.sources import Sources

    loaded = load_recipe(args.recipe)
    recipe = loaded.recipe
    sources = Sources(loaded.folder, **source_options(args))
    plan = plan_recipe(loaded, sources)
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))
    key, device = gates_key_of(loaded, plan), args.device or recipe.build.device
    if args.worth and recipe.needs_prompts:
        plan = replace(plan, experts_whole=True)
    worth = is_measured(loaded, plan, device, args.worth)
    base = plan.sources[plan.base]
    if plan.gate_mode == DISCRIMINANT or worth:  # on the merged model: all of its sources are needed
        needed = dict(plan.needed_files)
    else:
        needed = {base.key: base_files(recipe.gate_mode, base)}
    if plan.kept_experts:  # the new rows are measured by the kept router's
        routers = (read.tensor for x in plan.kept_routers.values() for read in reads(x))
        infos = base.tensors or {}
        files = {file for name in routers if (file := infos[name].file) is not None}
        needed[base.key] = tuple(sorted({*needed[base.key], *files}))
    for source in (plan.sources[name] for name, files in needed.items() if files or plan.gate_mode == DISCRIMINANT):
        if source.why_no_headers is not None:
            raise SourceError(
                f"{source.name}: it has no safetensors weights, which gate_mode {recipe.gate_mode!r} needs"
            )
    wanted = {name: plan.sources[name] for name, files in needed.items() if files}
    local = sources.fetch({name: needed[name] for name in wanted}, wanted) if wanted else {}
    with tempfile.TemporaryDirectory(prefix="moerge-gates-") as folder:
        path = make_gates(loaded, plan, local, Path(folder), key, args.device)
        gates, record = load_gates(path), read_record(path)
        names = [f"{base.name} (its expert {number})" for number in range(plan.kept_experts)]
        names += [expert.source_model for expert in recipe.experts]
        if args.json:
            print(json.dumps([asdict(router) for router in routers_of(path)], indent=2))
        else:
            print(f"{plan.name}: gates {recipe.gate_mode}, {len(gates)} layers, content address {key[:16]}")
            if record and not plan.kept_experts:
                print(record_text(record))
            else:
                print(report_text(gate_report(gates, plan.expert_count), names, kept=plan.kept_experts > 0))
        found = list(gate_findings(loaded, plan, path))
        if worth:
            experts = measured(loaded, plan, local, path, device)
            if not args.json:
                print(worth_text(experts))
            found += worth_findings(loaded, plan, experts)
        for finding in found:
            say(finding.located(str(loaded.path)))
        if args.out:
            with writing(args.out):
                write_atomically(args.out, path.read_bytes())
            say(f"{args.out}: written")
    return 0


def record_text(record: Record) -> str:
    """A discriminant's figures as tables: by layer, and the confusion matrix of each third of the layers."""
    from bot.gates import groups_of

    count = len(record.layers[0].goes_to)
    if count == 1:
        return "There is one expert, so every token goes to it."
    numbers = range(1, count + 1)
    lines = [
        f"{'layer':>5}  {'ridge':>5}  {'right':>6}  {'weight':>6}  {'entropy':>7}  best for, by expert (%)",
        _row(" " * 36, numbers),
    ]
    for number, layer in enumerate(record.layers):
        figures = f"{number:>5}  {layer.ridge:>5g}  {100 * layer.accuracy:>5.1f}%  {layer.top_weight:>6.2f}"
        lines.append(_row(f"{figures}  {layer.entropy:>7.2f}", _percent(layer.shares)))
    tokens = (
        "held-out prompts' tokens" if record.held_out else "the tokens it was fitted on (nothing could be held out)"
    )
    for group in groups_of(record.layers) if record.held_out else ():
        layers = f"layer {group.first}" if group.first == group.last else f"layers {group.first}-{group.last}"
        lines.append(f"Confusion matrix of {tokens}, {layers}: from each expert (row) to each (column), in %")
        lines.append(_row(" " * 5, numbers))
        lines += [_row(f"{number:>5}", _percent(row)) for number, row in zip(numbers, group.goes_to, strict=True)]
    accuracy = 100 * sum(layer.accuracy for layer in record.layers) / len(record.layers)
    lines.append(f"The best expert is the right one for {accuracy:.1f} % of {tokens}, mean over the layers.")
    lines.append(
        f"`weight` is the best expert's, `entropy` that of all weights in nats (even weights: {math.log(count):.2f})."
    )
    for name, peer in record.peers.items():
        right, weight, entropy = (
            sum(getattr(layer, key) for layer in peer) / len(peer) for key in ("accuracy", "top_weight", "entropy")
        )
        busiest = 100 * max(sum(layer.shares[expert] for layer in peer) / len(peer) for expert in range(count))
        lines.append(
            f"On the same tokens gate_mode {name}: {100 * right:.1f} % right, {busiest:.0f} % to its busiest expert, "
            f"weight {weight:.2f}, entropy {entropy:.2f}."
        )
    if record.written:
        lines.append(f"{len(record.written)} texts were written from short prompts.")
    return "\n".join(lines)


def _row(head: str, cells: Iterable[object]) -> str:
    return head + "".join(f"  {cell:>5}" for cell in cells)


def _percent(shares: Sequence[float]) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def report_text(layers: Sequence[LayerReport], names: Sequence[str], kept: bool) -> str:
    """The report as a table, and what it means. `names` are the experts', in order; `kept` says whether the first of them are
    the base's own. Their rows may sum to zero, so that the condition of all says nothing."""
    from merge.gates.report import MAX_CONDITION

    if kept:
        lines = [f"{'layer':>5}  {'cosine':>6}  closest experts"]
        for layer in layers:
            pair = f"{layer.pair[0] + 1} and {layer.pair[1] + 1}" if layer.pair else "-"
            lines.append(f"{layer.layer:>5}  {layer.cosine:>6.3f}  {pair}")
        unknown = "what the experts kept from the base are for is not known."
        return "\n".join([*lines, f"How often a token finds the right expert was not measured: {unknown}"])
    lines = [f"{'layer':>5}  {'condition':>9}  {'cosine':>6}  closest experts"]
    for layer in layers:
        pair = f"{layer.pair[0] + 1} and {layer.pair[1] + 1}" if layer.pair else "-"
        lines.append(f"{layer.layer:>5}  {layer.condition:>9.2f}  {layer.cosine:>6.3f}  {pair}")
    degenerate = [layer for layer in layers if layer.is_degenerate]
    if not degenerate:
        return "\n".join([*lines, "No layer is degenerate: the router can tell all experts apart."])
    which = "all layers" if len(degenerate) == len(layers) else f"{len(degenerate)} of {len(layers)} layers"
    lines.append(
        f"The router is degenerate in {which} (condition above {MAX_CONDITION:g}): some experts will hardly be used."
    )
    worst = max(degenerate, key=lambda layer: layer.condition)
    if worst.pair:
        first, second = (f"{index + 1} ({names[index]})" for index in worst.pair)
        lines.append(
            f"Worst is layer {worst.layer}, where experts {first} and {second} are closest: let their prompts differ more."
        )
    return "\n".join(lines)
