"""How well routers route, ours beside mergekit's: `make bench-gates`.

On the texts of tests/data/corpora, with SmolLM2-135M. For each of three sets of four prompts per expert, and for the five
words per expert of recipes/Beyonder-4x7B-v3.yaml, routers are made by our `discriminant`, by mergekit 0.1.5 (`hidden`,
`hidden_avg`; its own program, its own weights) and at random. Then, on texts that none of them has seen:

- top-1: the share of tokens whose best expert is their domain's, mean over layers (chance .25), on the router inputs of
  SmolLM2 itself (chat, code, storywriting, math: four experts equal to the base; python, french, math, English likewise);
- the mixture of the demo's real experts (base, python, french, math; two experts per token) while it routes: the share of the
  most loaded expert, the domains weighing the same, and the perplexity over that of each text on its own expert; both with
  texts of the kind that the mathematics expert was trained on (arithmetic), and with mathematics as people write it, at which
  it is worse than the base;
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.gates_vs_mergekit import ROOT, machine, peer_environment, put_section, today
from demo.models import BASE, EXPERTS, make_models
from merge.evaluate import Evaluator, checkpoint_expressions, open_files
from merge.expr import Expr
from merge.forward import StreamedModel
from merge.gates import ExpertPrompts, load_tokenizer, random_gates
from merge.gates.batches import packed
from merge.gates.comparison import hidden_peer, random_peer
from merge.gates.expansion import expand, with_samples
from merge.gates.held_out import losses
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
# What the mixtures are measured on.
TEXTS = ("english", "python", "french", "math", "arithmetic")
# The sets of prompts in each domain's file.
SETS = (1, 2, 3)
WORDS = (
    ("chat", "assistant", "tell me", "explain", "I want"),
    ("code", "python", "javascript", "programming", "algorithm"),
    ("storywriting", "write", "scene", "story", "character"),
    ("reason", "math", "mathematics", "solve", "count"),
)
HEADING = "## Routing"
# Each calibration is timed so often.
ROUNDS = 3
PEER_MODES = ("hidden", "hidden_avg")
MODES = ("discriminant", *PEER_MODES, "random")
Gates = Mapping[int, torch.Tensor]
STARTED = time.perf_counter()


@dataclass(frozen=True)
class Domain:
    """What a model makes of a domain's held-out texts: its loss, nats per token, and by layer the share of the tokens whose
    best expert each one is, (E,); no layers in a dense model."""

    loss: float
    shares: Sequence[torch.Tensor]


# By model or router and by group of domains, each set of prompts' four domains.
Measured = dict[str, dict[str, list[list[Domain]]]]
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
        for number in SETS
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
        for _ in range(1 if key[0] == "a" else ROUNDS):
            for mode in PEER_MODES:  # in turns with ours, so that the machine's slow moments are everybody's
                found[mode][key], taken = peer.gates(mode, prompts)
                if key[0] != "a":
                    seconds[mode].append(taken)
            # On the real mixture the gates alone, and with the routers that the report compares them with.
            for what in ("alone", "compared") if key[0] != "a" else ():
                started = time.perf_counter()
                others = {}
                if what == "compared":
                    others["hidden"] = hidden_peer(prompts, prompts, config, tensors, evaluator, base, "cpu")
                    others["random"] = random_peer(layers, 4, hidden, key[1])
                made = calibrate_discriminant(prompts, plan.config, merged_tensors, merged, base, "cpu", peers=others)
                seconds[what].append(time.perf_counter() - started)
                mixtures[key] = made.gates
            if key[0] != "a":
                say(f"{key}, seconds: " + ", ".join(f"{what} {x[-1]:.2f}" for what, x in seconds.items()))
        prompts = with_samples(prompts, samples) if key == ("a", 0) else prompts
        if key[0] in "ab":
            ours[key] = calibrate_discriminant(prompts, config, tensors, evaluator, base, "cpu").gates
    peer.close()

    routed = {}
    inputs = {group: held_out_inputs(GROUPS[group], base) for group in "ab"}
    for mode in MODES:
        routed[mode] = {key: routing(found[mode][key], inputs[key[0]]) for key in jobs if key[0] in inputs}
        say(f"{mode}: {routed[mode]}")

    measured: Measured = {}
    for name in MODELS:
        x = measure(*checkpoint_expressions(folders[name]), base)
        measured[name] = {group: [[x[d] for d in GROUPS[group]]] for group in "bc"}
        say(f"{name} dense: {in_words(x)}")
    for mode in MODES:
        measured[mode] = {"b": [], "c": []}
        for number in SETS:
            for groups in ("bc",) if mode == "random" else ("b", "c"):  # random routers know no prompts
                gates = (mixtures if mode == "discriminant" else found[mode])[groups[0], number]
                x = measure(
                    merged_tensors, plan.config, Evaluator(merged.files, gates), base, GROUPS.get(groups, TEXTS)
                )
                for group in groups:
                    measured[mode][group].append([x[d] for d in GROUPS[group]])
                say(f"{mode} {groups} {number}: {in_words(x)}")
    write(routed, measured, seconds, expansion)
    return 0


def in_words(domains: Mapping[str, Domain]) -> str:
    return ", ".join(f"{name} {x.loss:.4f}" for name, x in domains.items())


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


def measure(
    tensors: Mapping[str, Expr],
    config: Mapping[str, Any],
    evaluator: Evaluator,
    base: Path,
    domains: Sequence[str] = TEXTS,
) -> dict[str, Domain]:
    """A model on the held-out texts of each domain: on every token but the BOS."""
    tokenizer = load_tokenizer(base)
    texts = [(domain, tokenize(tokenizer, text)) for domain in domains for text in corpus(domain)["held-out"]]
    in_rows = packed([ids for _, ids in texts])
    model = StreamedModel(config, tensors, evaluator, "cpu", DTYPE)
    seen: list[torch.Tensor] = []  # (B, T) for each batch in each layer

    def note(_: nn.Module, __: tuple[Any, ...], routed: tuple[torch.Tensor, ...]) -> None:
        best = routed[2][:, 0]  # of Mixtral's router: logits, weights and numbers of each token's experts, best first
        seen.append(best.view(in_rows.batches[len(seen) % len(in_rows.batches)].input_ids.shape))

    for index in range(model.num_layers):
        for router, _ in model.gates(index):
            router.register_forward_hook(note)
    run = model.advance(model.start(in_rows.batches))
    layers = [in_rows.split(seen[i : i + len(in_rows.batches)]) for i in range(0, len(seen), len(in_rows.batches))]
    sums = losses(model, run, [ids for _, ids in texts], in_rows)
    found = {}
    for domain in domains:
        of_domain = [i for i, (d, _) in enumerate(texts) if d == domain]
        tokens = sum(len(texts[i][1]) - 1 for i in of_domain)
        chosen = [torch.cat([rows[i][1:] for i in of_domain]) for rows in layers]
        shares = [torch.bincount(x, minlength=len(MODELS)) / tokens for x in chosen]
        found[domain] = Domain(sum(sums[i] for i in of_domain) / tokens, shares)
    return found


def load(domains: Sequence[Domain]) -> float:
    """The share of the most loaded expert, mean over layers, every domain counting the same."""
    by_layer = zip(*(domain.shares for domain in domains), strict=True)
    return statistics.mean(float(torch.stack(shares).mean(0).max()) for shares in by_layer)


def write(
    routed: Mapping[str, Mapping[tuple[str, int], tuple[float, float]]],
    measured: Measured,
    seconds: Mapping[str, Sequence[float]],
    expansion: float,
) -> None:
    """Put the results into benchmarks/RESULTS.md."""
    own = {group: [measured[name][group][0][i] for i, name in enumerate(MODELS)] for group in "bc"}
    perplexity = {
        group: {name: [over(x, own[group]) for x in groups[group]] for name, groups in measured.items()}
        for group in "bc"
    }
    loads = {group: {mode: [load(x) for x in measured[mode][group]] for mode in MODES} for group in "bc"}
    top = {
        groups: {mode: [x[0] for (group, n), x in routed[mode].items() if n and group in groups] for mode in MODES}
        for groups in ("ab", "a", "b")
    }
    words = {mode: [routed[mode]["a", 0][0]] for mode in MODES}
    times = {what: statistics.median(x) for what, x in seconds.items()}

    def row(
        figure: str, must: float, goal: float, values: Mapping[str, Sequence[float]], style: str = ".3f", unit: str = ""
    ) -> str:
        cells = " | ".join(cell(values[mode], style, unit) for mode in MODES)
        verdict = reached(must, goal, values["discriminant"], values["random"])
        return f"| {figure} | {must:g}{unit} | {goal:g}{unit} | {verdict} | {cells} |"

    def time_row(figure: str, what: str) -> str:
        ratio = times[what] / times["hidden"]
        cells = f"{times[what]:.1f} s ({ratio:.1f} x) | {times['hidden']:.1f} s | {times['hidden_avg']:.1f} s | 0"
        return f"| {figure} | 3 x `hidden` | 2 x | {reached(3, 2, [ratio])} | {cells} |"

    kinds = {"c": "with arithmetic", "b": "with mathematics as people write it"}
    ours = statistics.mean(perplexity["b"]["discriminant"])
    ranked = sorted((statistics.mean(x), name) for name, x in perplexity["b"].items() if name != "discriminant")
    below = ", ".join(f"{name_of(name)} ({x:+.1f} %)" for x, name in ranked if x < ours)
    above = ", ".join(f"{name_of(name)} ({x:+.1f} %)" for x, name in ranked if x >= ours)
    lines = [
        HEADING,
        "",
        f"`make bench-gates` (benchmarks/routing.py), {today()}, {machine()}. SmolLM2-135M and the demo's experts; texts of",
        "tests/data/corpora that no router was fitted on; in one run. Means over three disjoint sets of four prompts per expert",
        "(lowest to highest); with the words of recipes/Beyonder-4x7B-v3.yaml there is one. What `discriminant` reaches is said of",
        "the mean; where it is less for the worst set, or a random router reaches it too, that is added.",
        "",
        f"| figure | must reach | goal | reached | {' | '.join(name_of(mode) for mode in MODES)} |",
        "|---|---|---|---|---|---|---|---|",
        row("top-1, four sentences per expert", 0.92, 0.95, top["ab"]),
        row("top-1, five words per expert", 0.75, 0.80, words),
        *(row(f"share of the most loaded expert in the mixture, {kinds[g]}", 0.40, 0.35, loads[g]) for g in "cb"),
        *(
            row(
                f"perplexity of the mixture over that of each text on its own expert, {kinds[g]}",
                2,
                1,
                perplexity[g],
                "+.1f",
                " %",
            )
            for g in "cb"
        ),
        time_row("calibration, expansion aside: the router alone", "alone"),
        time_row("the same with the report's comparison", "compared"),
        "",
        "Top-1: tokens whose best expert is their domain's, mean over layers and over two groups of four domains (chance .25), on",
        "SmolLM2's own router inputs. Load and perplexity: of the mixture of the demo's four experts while it routes with these",
        "gates, two experts per token, on a balanced mix of English, Python, French and either arithmetic or mathematics as people",
        "write it. Load is the share of the tokens, BOS aside, whose best expert is the most loaded one, mean over layers (even",
        "would be .25).",
        "",
        "What the perplexity is worth: the arithmetic texts were added after the router was written, when the mathematics expert,",
        "which was trained on arithmetic, had been seen to be worse than the base at mathematics as people write it. And how softly",
        "the router decides (`SOFTNESS` in merge/gates/routed.py) was chosen by the perplexity of these very texts with these three",
        "sets of prompts, so it is not a figure on texts that nothing was chosen by. With mathematics as people write it the",
        "comparison is with an expert that is bad at it, so a figure below zero is easily had there, and `discriminant`, which",
        f"sends such text to that expert, is at {ours:+.1f} %. Lower than it: {below or 'none'}.",
        f"Higher: {above or 'none'}.",
        "",
        f"Calibration: medians of {len(seconds['alone'])} on the mixture, in turns with the peer's; the loading of tokenizer and",
        "weights is included in all. The router alone is the calibration, and what mergekit's time is of. The report's comparison",
        "(the same tokens with mergekit's `hidden` and with a random router) is what `moerge gates` and a build add to it for the",
        f"reader; the router does not need it. The expansion of the five words took another {expansion:.0f} s.",
        "",
        "On SmolLM2's own router inputs, not in a mixture: top-1 by group (a: chat, code, storywriting, math, for which the demo",
        "has no experts; b: English, Python, French, math), and the share of the most loaded expert from the five words, which",
        "are group a's.",
        "",
        "| router | top-1, group a | top-1, group b | load from five words |",
        "|---|---|---|---|",
        *(
            f"| {name_of(mode)} | {cell(top['a'][mode])} | {cell(top['b'][mode])} | {routed[mode]['a', 0][1]:.3f} |"
            for mode in MODES
        ),
        "",
        "In the mixture and in the dense models: loss in nats per token by domain, mean over the sets, and the perplexity as above.",
    ]
    for group, title in (("c", "arithmetic"), ("b", "math")):
        lines += [
            "",
            f"| model | English | Python | French | {title} | perplexity (lowest to highest) |",
            "|---|---|---|---|---|---|",
        ]
        for name, groups in measured.items():
            means = " | ".join(f"{statistics.mean(x[d].loss for x in groups[group]):.3f}" for d in range(4))
            lines.append(f"| {name_of(name)} | {means} | {cell(perplexity[group][name], '+.1f', ' %')} |")
    lines.append("")
    put_section(HEADING, lines)
    print("\n".join(lines))


def reached(must: float, goal: float, ours: Sequence[float], chance: Sequence[float] = ()) -> str:
    """What the mean of ours reaches, and what takes from it: that the worst does not, or that chance does."""

    def grade(value: float) -> str:
        sign = 1 if goal > must else -1
        return "goal" if sign * value >= sign * goal else "must" if sign * value >= sign * must else "no"

    found = grade(statistics.mean(ours))
    worst = grade(min(ours) if goal > must else max(ours))
    notes = [f"worst set: {worst}"] if worst != found else []
    if found != "no" and chance and grade(statistics.mean(chance)) != "no":
        notes.append(f"random: {grade(statistics.mean(chance))}")
    return "; ".join([found, *notes])


def cell(values: Sequence[float], style: str = ".3f", unit: str = "") -> str:
    """The mean, and where there are several the lowest and the highest."""
    spread = f" ({min(values):{style}} to {max(values):{style}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{style}}{unit}{spread}"


def over(domains: Sequence[Domain], own: Sequence[Domain]) -> float:
    """By how many percent the perplexity exceeds that of each text on its own expert, every domain counting the same."""
    return 100 * math.expm1(statistics.mean(x.loss for x in domains) - statistics.mean(x.loss for x in own))


def name_of(mode: str) -> str:
    """A router, or a dense model, in words."""
    names = {"discriminant": "moerge `discriminant`", "random": "random"}
    return names.get(mode, f"mergekit `{mode}`" if mode.startswith("hidden") else f"{mode}, dense")


if __name__ == "__main__":
    sys.exit(main())
