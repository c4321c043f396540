"""How well routers route, ours beside mergekit's: `make bench-gates`.

On the texts of tests/data/corpora, with SmolLM2-135M. For each of three sets of four prompts per expert, and for the five
words per expert of recipes/Beyonder-4x7B-v3.yaml, routers are made by our `discriminant`, by mergekit 0.1.5 (`hidden`,
`hidden_avg`; its own program, its own weights) and at random. Then, on texts that none of them has seen:

- top-1: the share of tokens whose best expert is their domain's, mean over layers (chance .25), and load: the share of the
  most loaded expert, the domains weighing the same; both on the router inputs of SmolLM2 itself (chat, code, storywriting,
  math: four experts equal to the base; python, french, math, English likewise);
- perplexity of the mixture of the demo's real experts (base, python, french, math; two experts per token) over that of each
  text on its own expert: with texts of the kind that the mathematics expert was trained on (arithmetic), and with mathematics
  as people write it, at which it is worse than the base;
- seconds of a calibration on that mixture, loading included, beside mergekit's for the same prompts.

BOS is not counted. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gates_vs_mergekit import ROOT, machine, peer_environment, put_section, today
from demo.models import BASE, EXPERTS, make_models
from merge.evaluate import Evaluator, checkpoint_expressions, open_files
from merge.expr import Expr
from merge.forward import StreamedModel
from merge.gates import ExpertPrompts, load_tokenizer, random_gates
from merge.gates.batches import packed
from merge.gates.comparison import hidden_peer, random_peer
from merge.gates.expansion import expand, with_samples
from merge.gates.held_out import losses as token_losses
from merge.gates.prompts import tokenize
from merge.gates.routed import DTYPE, calibrate_discriminant, router_inputs
from merge.plan import MergePlan
from merge.planner import build_plan
from merge.recipe import parse_recipe
from merge.sources import Sources

CORPORA = ROOT / "tests" / "data" / "corpora"
GROUPS = {
    "a": ("chat", "code", "storywriting", "math"),
    "b": ("english", "python", "french", "math"),
    "c": ("english", "python", "french", "arithmetic"),
}
# The demo's experts in the order of groups b and c.
MODELS = (BASE, EXPERTS["python"], EXPERTS["french"], EXPERTS["math"])
# What the perplexities are measured on.
TEXTS = ("english", "python", "french", "math", "arithmetic")
WORDS = (
    ("chat", "assistant", "tell me", "explain", "I want"),
    ("code", "python", "javascript", "programming", "algorithm"),
    ("storywriting", "write", "scene", "story", "character"),
    ("reason", "math", "mathematics", "solve", "count"),
)
HEADING = "## Routing"
PEER_MODES = ("hidden", "hidden_avg")
MODES = ("discriminant", *PEER_MODES, "random")
Gates = Mapping[int, torch.Tensor]
STARTED = time.perf_counter()
# Run by the peer's Python: its command line up to the gates, for each recipe that is named on its standard input. Timed is what
# our calibration does too: the tokenizer is loaded, the weights are, and the gates are made.
PEER_RUN = """
import sys, time, torch
import mergekit.scripts.moe as moe
class Done(Exception): pass
seconds = 0
def timed(function):
    def run(*args, **kwargs):
        global seconds
        started = time.perf_counter()
        made = function(*args, **kwargs)
        seconds += time.perf_counter() - started
        return made
    return run
moe.transformers.AutoTokenizer.from_pretrained = timed(moe.transformers.AutoTokenizer.from_pretrained)
inner = timed(moe.get_gate_params)
def keep(*args, **kwargs):
    gates = inner(*args, **kwargs)
    torch.save({"gates": gates, "seconds": seconds}, recipe + ".pt")
    raise Done
moe.get_gate_params = keep
for line in sys.stdin:
    recipe, seconds = line.strip(), 0
    try:
        moe.main([recipe, recipe + ".model", "--device", "cpu"], standalone_mode=False)
    except Done:
        print("made", flush=True)
"""


def corpus(domain: str) -> dict[str, list[str]]:
    """The parts of a domain's file: `prompts 1` to `prompts 3`, `held-out`."""
    parts = {}
    for part in (CORPORA / f"{domain}.txt").read_text(encoding="utf-8").split("=== ")[1:]:
        name, _, texts = part.partition("\n")
        parts[name] = texts.strip("\n").split("\n---\n")
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an environment that has mergekit 0.1.5 (default: one is made)")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "models")
    args = parser.parse_args()
    python = peer_environment(args.peer or ROOT / "build" / "peers" / "mergekit")
    folders = make_models(args.models.resolve())
    base = folders[BASE]
    jobs = {
        (group, number): [ExpertPrompts(tuple(corpus(domain)[f"prompts {number}"])) for domain in domains]
        for group, domains in GROUPS.items()
        for number in (1, 2, 3)
    }
    jobs["a", 0] = [ExpertPrompts(words) for words in WORDS]
    tensors, config, evaluator = checkpoint_expressions(base)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    found: dict[str, dict[tuple[str, int], Gates]] = {mode: {} for mode in MODES}
    found["random"] = {
        key: {i: torch.from_numpy(g) for i, g in random_gates("random", layers, 4, hidden, key[1]).items()}
        for key in jobs
    }
    ours = found["discriminant"]
    plan, merged = merged_model(folders)
    merged_tensors = {x.name: x.expr for x in plan.tensors}
    seconds: dict[str, list[float]] = {what: [] for what in ("alone", "compared", *PEER_MODES)}
    mixtures = {}
    started = time.perf_counter()
    samples = expand(jobs["a", 0], config, tensors, evaluator, base, seed=0, device="cpu")
    expansion = time.perf_counter() - started
    say(f"{len(samples)} texts written in {expansion:.0f} s")
    peer = Peer(python, folders)
    for key, prompts in jobs.items():
        for mode in PEER_MODES:  # in turns with ours, so that the machine's slow moments are everybody's
            found[mode][key], taken = peer.gates(mode, prompts)
            if key[0] != "a":
                seconds[mode].append(taken)
        prompts = with_samples(prompts, samples) if key == ("a", 0) else prompts
        if key[0] in "ab":
            ours[key] = calibrate_discriminant(prompts, config, tensors, evaluator, base, "cpu").gates
        if key[0] in "bc":  # on the real mixture
            for what in (
                "alone",
                "compared",
            ):  # the gates alone, and with the routers that the report compares them with
                started = time.perf_counter()
                others = {}
                if what == "compared":
                    others["hidden"] = hidden_peer(prompts, prompts, config, tensors, evaluator, base, "cpu")
                    others["random"] = random_peer(layers, 4, hidden, key[1])
                made = calibrate_discriminant(prompts, plan.config, merged_tensors, merged, base, "cpu", peers=others)
                seconds[what].append(time.perf_counter() - started)
            mixtures[key] = made.gates
            say(f"{key}, seconds: " + ", ".join(f"{what} {x[-1]:.2f}" for what, x in seconds.items()))
    peer.close()

    routed = {}
    inputs = {group: held_out_inputs(GROUPS[group], base) for group in "ab"}
    for mode in MODES:
        routed[mode] = {key: routing(found[mode][key], inputs[key[0]]) for key in jobs if key[0] in inputs}
        say(f"{mode}: {routed[mode]}")

    single = {name: losses(*checkpoint_expressions(folders[name]), base) for name in MODELS}
    say(f"each model's losses by domain: {single}")
    found_losses: dict[str, dict[str, list[list[float]]]] = {
        name: {group: [[x[d] for d in GROUPS[group]]] for group in "bc"} for name, x in single.items()
    }
    for mode in MODES:
        for number in (1, 2, 3):
            for groups in ("bc",) if mode == "random" else ("b", "c"):  # random routers know no prompts
                gates = (mixtures if mode == "discriminant" else found[mode])[groups[0], number]
                x = losses(merged_tensors, plan.config, Evaluator(merged.files, gates), base, GROUPS.get(groups, TEXTS))
                for group in groups:
                    domains = [x[d] for d in GROUPS[group]]
                    found_losses.setdefault(mode, {}).setdefault(group, []).append(domains)
                say(f"{mode} {groups} {number}: {x}")
    write(routed, found_losses, seconds, expansion)
    return 0


def say(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:5.0f} s  {text}", flush=True)


def merged_model(folders: Mapping[str, Path]) -> tuple[MergePlan, Evaluator]:
    """The demo's mixture, without gates."""
    experts = [{"source_model": str(folders[name]), "positive_prompts": [name]} for name in MODELS]
    text = json.dumps(
        {"base_model": str(folders[BASE]), "gate_mode": "discriminant", "dtype": "bfloat16", "experts": experts}
    )
    loaded = parse_recipe(text.encode(), ROOT / "mixture.yaml")
    opened, failed = Sources(ROOT).open_all(loaded.recipe.references)
    assert not failed, failed
    plan = build_plan(loaded, opened)
    return plan, Evaluator(open_files(plan.sources))


class Peer:
    """mergekit, in a process of its own that stays, as ours does."""

    def __init__(self, python: Path, folders: Mapping[str, Path]) -> None:
        self.folders, self.count = folders, 0
        self.work = tempfile.TemporaryDirectory()
        self.errors = (Path(self.work.name) / "errors").open("w+")
        command = [python, "-c", PEER_RUN]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def gates(self, mode: str, prompts: Sequence[ExpertPrompts]) -> tuple[Gates, float]:
        """Its routers, layer -> (E, H), float32, and its seconds for them."""
        models = [self.folders[name] for name in MODELS]  # different models: mergekit refuses four equal ones
        experts = [
            {"source_model": str(model), "positive_prompts": list(expert.positive)}
            for model, expert in zip(models, prompts, strict=True)
        ]
        made = {"base_model": str(self.folders[BASE]), "gate_mode": mode, "dtype": "bfloat16", "experts": experts}
        self.count += 1
        recipe = Path(self.work.name) / f"{self.count}.json"
        recipe.write_text(json.dumps(made))
        assert self.process.stdin and self.process.stdout
        print(recipe, file=self.process.stdin, flush=True)
        while (line := self.process.stdout.readline()) != "made\n":
            if not line:
                self.errors.seek(0)
                raise RuntimeError(self.errors.read())
        one = torch.load(f"{recipe}.pt", weights_only=True)
        return {layer: gate.float() for layer, gate in enumerate(one["gates"])}, one["seconds"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
        self.work.cleanup()


def held_out_inputs(domains: Sequence[str], base: Path) -> list[list[torch.Tensor]]:
    """For each layer and domain the router inputs (n, H) of the held-out texts in the dense model."""
    tokenizer = load_tokenizer(base)
    texts = [(i, tokenize(tokenizer, text)) for i, domain in enumerate(domains) for text in corpus(domain)["held-out"]]
    in_rows = packed([ids for _, ids in texts])
    tensors, config, evaluator = checkpoint_expressions(base)
    model = StreamedModel(config, tensors, evaluator, "cpu", DTYPE)
    run = model.start(in_rows.batches)
    found = []
    for layer in model.layers():
        rows = in_rows.split(router_inputs(layer, run, None))
        found.append(
            [
                torch.cat([x[1:] for x, (owner, _) in zip(rows, texts, strict=True) if owner == d])
                for d in range(len(domains))
            ]
        )
        layer.advance(run)
    return found


def routing(gates: Gates, inputs: Sequence[Sequence[torch.Tensor]]) -> tuple[float, float]:
    """Top-1 accuracy and the most loaded expert's share, means over layers."""
    accuracy, load = [], []
    for layer, domains in enumerate(inputs):
        chosen = torch.stack(
            [torch.bincount((x @ gates[layer].float().T).argmax(1), minlength=4) / len(x) for x in domains]
        )  # (domain, expert)
        accuracy.append(float(chosen.diagonal().mean()))
        load.append(float(chosen.mean(0).max()))
    return statistics.mean(accuracy), statistics.mean(load)


def losses(
    tensors: Mapping[str, Expr],
    config: Mapping[str, Any],
    evaluator: Evaluator,
    base: Path,
    domains: Sequence[str] = TEXTS,
) -> dict[str, float]:
    """A model's loss on the held-out texts of each domain, nats per token: of every token but the BOS."""
    tokenizer = load_tokenizer(base)
    texts = [(domain, tokenize(tokenizer, text)) for domain in domains for text in corpus(domain)["held-out"]]
    in_rows = packed([ids for _, ids in texts])
    model = StreamedModel(config, tensors, evaluator, "cpu", DTYPE)
    run = model.advance(model.start(in_rows.batches))
    sums = token_losses(model, run, [ids for _, ids in texts], in_rows)
    return {
        domain: sum(x for x, (d, _) in zip(sums, texts, strict=True) if d == domain)
        / sum(len(ids) - 1 for d, ids in texts if d == domain)
        for domain in domains
    }


def write(
    routed: Mapping[str, Mapping[tuple[str, int], tuple[float, float]]],
    found_losses: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    seconds: Mapping[str, Sequence[float]],
    expansion: float,
) -> None:
    """Put the results into benchmarks/RESULTS.md."""
    own = {group: [found_losses[name][group][0][i] for i, name in enumerate(MODELS)] for group in "bc"}
    perplexity = {
        (name, group): [over(x, own[group]) for x in groups[group]]
        for name, groups in found_losses.items()
        for group in "bc"
    }
    alone, compared = (statistics.median(seconds[what]) for what in ("alone", "compared"))
    times = {mode: statistics.median(seconds[mode]) for mode in PEER_MODES}
    ours = f"{alone:.1f} ({alone / times['hidden']:.1f} x); with the report's comparison {compared:.1f} "
    ours += f"({compared / times['hidden']:.1f} x)"

    def of_sets(mode: str, which: int, groups: str = "ab") -> str:
        values = [x[which] for (group, number), x in routed[mode].items() if group in groups and number]
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    table = [
        ("top-1, four sentences per expert", ".92", ".95", [of_sets(mode, 0) for mode in MODES]),
        ("top-1, five words per expert", ".75", ".80", [f"{routed[mode]['a', 0][0]:.3f}" for mode in MODES]),
        (
            "share of the most loaded expert; from five words",
            ".40",
            ".35",
            [f"{of_sets(mode, 1)}; {routed[mode]['a', 0][1]:.3f}" for mode in MODES],
        ),
        (
            "perplexity of the mixture over that of each text on its own expert",
            "+2 %",
            "+1 %",
            [percent(perplexity[mode, "c"]) for mode in MODES],
        ),
        (
            "seconds of the calibration, expansion aside",
            "3 x `hidden`",
            "2 x",
            [
                ours,
                f"{times['hidden']:.1f}",
                f"{times['hidden_avg']:.1f}",
                "0",
            ],
        ),
    ]
    dense = ", ".join(f"{name} {percent(perplexity[name, 'c'])}" for name in MODELS)
    lines = [
        HEADING,
        "",
        f"`make bench-gates` (benchmarks/routing.py), {today()}, {machine()}. SmolLM2-135M and the demo's experts; texts of",
        "tests/data/corpora that no router has seen; in one run. Means over three disjoint sets of four prompts per expert (lowest",
        "to highest); with the words of recipes/Beyonder-4x7B-v3.yaml there is one.",
        "",
        f"| figure | must reach | goal | {' | '.join(name_of(mode) for mode in MODES)} |",
        "|---|---|---|---|---|---|---|",
        *(f"| {figure} | {must} | {goal} | {' | '.join(cells)} |" for figure, must, goal, cells in table),
        "",
        "Top-1: tokens whose best expert is their domain's, mean over layers and over two groups of four domains (chance .25);",
        "load: even would be .25. Both on SmolLM2's own router inputs. Perplexity: of the mixture of the demo's four experts, on",
        "a balanced mix of English, Python, French and arithmetic. The dense models alone:",
        f"{dense}.",
        f"Seconds: medians of {len(seconds['alone'])} calibrations on the mixture, in turns with the peer's; the loading of tokenizer",
        "and weights is included in all. The report's comparison (the same tokens with mergekit's `hidden`",
        "and with a random router) is what `moerge gates` and a build add for the reader; the router does not",
        f"need it. The expansion of the five words took another {expansion:.0f} s.",
        "",
        "Top-1 by group (a: chat, code, storywriting, math; b: English, Python, French, math):",
        "",
        "| router | group a | group b |",
        "|---|---|---|",
        *(f"| {name_of(mode)} | {of_sets(mode, 0, 'a')} | {of_sets(mode, 0, 'b')} |" for mode in MODES),
        "",
        "Loss in nats per token by domain, mean over the sets, and the perplexity as above. First with arithmetic, of the kind that the",
        "mathematics expert was trained on; then with mathematics as people write it, at which it is worse than the base, so that a",
        "router that sends such text to it has the higher perplexity.",
    ]
    for group, title in (("c", "arithmetic"), ("b", "math")):
        lines += [
            "",
            f"| model | English | Python | French | {title} | perplexity (lowest to highest) |",
            "|---|---|---|---|---|---|",
        ]
        for name, groups in found_losses.items():
            means = " | ".join(f"{statistics.mean(x[d] for x in groups[group]):.3f}" for d in range(4))
            lines.append(f"| {name_of(name)} | {means} | {percent(perplexity[name, group])} |")
    lines.append("")
    put_section(HEADING, lines)
    print("\n".join(lines))


def percent(values: Sequence[float]) -> str:
    """The mean, and where there are several the lowest and the highest."""
    spread = f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f} %{spread}"


def over(losses: Sequence[float], own: Sequence[float]) -> float:
    """By how many percent the perplexity exceeds that of each text on its own expert, every domain counting the same."""
    return 100 * math.expm1(statistics.mean(losses) - statistics.mean(own))


def name_of(mode: str) -> str:
    """A router, or a dense model, in words."""
    names = {"discriminant": "moerge `discriminant`", "random": "random"}
    return names.get(mode, f"mergekit `{mode}`" if mode.startswith("hidden") else f"{mode}, dense")


if __name__ == "__main__":
    sys.exit(main())
