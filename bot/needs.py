"""What a build needs of a machine, and whether a runner has it. From the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

from bot.runners import Runner
from merge import findings as f
from merge.expr import elements
from merge.gates.prompts import MAX_TOKENS
from merge.plan import MergePlan
from merge.recipe import DISCRIMINANT, RANDOM_GATES

GB = 10**9
# Python with torch and llama.cpp with its buffers; a merge alone takes less.
PROGRAMS = 2 * GB
# A forward pass computes in float32.
FLOAT32 = 4
# Of each token that a discriminant router is calibrated on, for each of the model's columns: what enters a layer, its
# attention's result, and what the router receives, twice (merge.gates.routed). About so many characters are a token.
BYTES_PER_TOKEN, CHARACTERS = 12, 4
# Matrices of its fit, in float64 (merge.gates.discriminant): the Gram matrix, its eigenvectors, and room to find them.
FIT_BYTES = 5 * 8

# Disk and memory of GitHub's standard runners: what a job is promised, not what is found there on a good day.
# https://docs.github.com/en/actions/reference/runners/github-hosted-runners
HOSTED = (14 * GB, 16 * GB)
HOSTED_SLIM = (14 * GB, 5 * GB)
# Disk and memory of Hugging Face's flavors. https://huggingface.co/docs/hub/spaces-gpus
FLAVORS = {
    "cpu-basic": (50, 16),
    "cpu-upgrade": (50, 32),
    "t4-small": (50, 15),
    "t4-medium": (100, 30),
    "l40sx1": (380, 62),
    "l40sx8": (6500, 1534),
    "a10g-small": (110, 15),
    "a10g-large": (200, 46),
    "a10g-largex2": (1000, 92),
    "a10g-largex4": (2000, 184),
    "a100-large": (1000, 142),
}


@dataclass(frozen=True)
class Fit:
    """Whether a build fits a runner: `fits` is None where nobody here knows the runner. Bytes."""

    runner: str
    fits: bool | None
    disk: int | None = None
    memory: int | None = None


def memory_bytes(plan: MergePlan) -> int:
    """About the least memory that a build gets by with.

    Weights are streamed: a merge holds slices, a forward pass one layer at a time and of it one expert at a time, besides
    the rows of the output matrix for the texts it writes from prompts. What a router is fitted on rests in memory, as far as
    the recipe and its datasets say how much that is: files of prompts are not counted.
    """
    if plan.gate_mode in RANDOM_GATES and not plan.quants:
        return PROGRAMS // 2
    layers: dict[str, int] = {}
    outside = 0
    for tensor in plan.tensors:
        count, parts = elements(tensor.expr), tensor.name.split(".")
        if "layers" in parts:
            index = parts[parts.index("layers") + 1]
            # An expert's own tensor counts once, with the others of its layer that are one expert's.
            share = count // plan.expert_count if "experts" in parts else count
            layers[index] = layers.get(index, 0) + share
        else:
            outside = max(outside, count)
    return PROGRAMS + FLOAT32 * (max(layers.values(), default=0) + outside) + _calibration_bytes(plan)


def _calibration_bytes(plan: MergePlan) -> int:
    """What a discriminant router's calibration takes besides the weights."""
    if plan.gate_mode != DISCRIMINANT:
        return 0
    texts = [part for expert in plan.gated for part in (expert.positive_prompts, expert.negative_prompts)]
    texts += [read.texts for read in plan.slices.values()]
    tokens = sum(min(MAX_TOKENS, sum(map(len, part)) // CHARACTERS) for part in texts)
    hidden = int(plan.config["hidden_size"])
    return BYTES_PER_TOKEN * tokens * hidden + FIT_BYTES * min(tokens, hidden) ** 2


def fit(runner: Runner, disk: int | None, memory: int | None) -> Fit:
    """Whether a runner has the disk and the memory that a build needs, where both are known."""
    has = _has(runner)
    if has is None or disk is None or memory is None:
        return Fit(runner.text, None, *(has or ()))
    return Fit(runner.text, disk <= has[0] and memory <= has[1], *has)


def fit_findings(found: Fit, disk: int, memory: int, line: int | None) -> tuple[f.Finding, ...]:
    """What there is to say of a runner that is too small."""
    if found.fits is not False or found.disk is None or found.memory is None:
        return ()
    short = [("disk", disk, found.disk), ("memory", memory, found.memory)]
    said = [(f"{_gb(needs)} of {what}", _gb(has)) for what, needs, has in short if needs > has]
    needs, has = (" and ".join(side) for side in zip(*said, strict=True))
    return (f.DoesNotFit(line, needs=needs, runner=found.runner, has=has),)


def _has(runner: Runner) -> tuple[int, int] | None:
    if runner.flavor is not None:
        known = FLAVORS.get(runner.flavor)
        return (known[0] * GB, known[1] * GB) if known else None
    if runner.is_hosted:
        return HOSTED_SLIM if "ubuntu-slim" in runner.labels else HOSTED
    return None


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB"
