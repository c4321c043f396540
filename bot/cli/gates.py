"""`moerge gates`: calibrate a recipe's router and say how well it tells the experts apart; no model is written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bot.cli.options import add_device_option, add_source_options, source_options

if TYPE_CHECKING:
    from merge.gates import LayerReport

HELP = "calibrate the router and print how well it tells the experts apart; no model is written"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the gates to this safetensors file")
    add_device_option(parser)
    add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    from bot.preview import plan_recipe
    from merge.errors import SourceError
    from merge.evaluate import Evaluator, open_files
    from merge.gates import ExpertPrompts, base_files, calibrate, gate_report, gates_key, write_gates
    from merge.progress import progress, say
    from merge.recipe import load_recipe
    from merge.sources import Sources

    loaded = load_recipe(args.recipe)
    recipe = loaded.recipe
    sources = Sources(loaded.folder, **source_options(args))
    plan = plan_recipe(loaded, sources)
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))
    base = plan.sources[plan.base]
    files = base_files(recipe.gate_mode, base)
    if files and base.why_no_headers is not None:
        raise SourceError(f"{base.name}: it has no safetensors weights, which gate_mode {recipe.gate_mode!r} needs")
    local = sources.fetch({base.key: files}, {base.key: base}) if files else {}
    folder = local[base.key].folder if local else None
    prompts = [ExpertPrompts(expert.positive_prompts, expert.negative_prompts) for expert in recipe.experts]
    with progress("gates", plan.config["num_hidden_layers"], "layer") as bar:
        gates = calibrate(
            recipe.gate_mode,
            prompts,
            base.config,
            plan.dense_tensors,
            Evaluator(open_files(local)),
            folder or loaded.folder,
            recipe.build.seed,
            args.device or recipe.build.device,
            bar.advance,
        )
    key = gates_key(recipe.gate_mode, prompts, recipe.build.seed, base.fingerprint)
    names = [expert.source_model for expert in recipe.experts]
    print(f"{plan.name}: gates {recipe.gate_mode}, {len(gates)} layers, content address {key[:16]}")
    print(report_text(gate_report(gates), names))
    if args.out:
        write_gates(gates, args.out, key, {"mode": recipe.gate_mode})
        say(f"{args.out}: written")
    return 0


def report_text(layers: Sequence[LayerReport], names: Sequence[str]) -> str:
    """The report as a table, and what it means. `names` are the experts', in order."""
    from merge.gates import MAX_CONDITION

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
