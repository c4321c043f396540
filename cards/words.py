"""Figures and facts as people write them, and the sentences that explain a type, a mode or a proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cards.markdown import Markdown


def _own(texts: Mapping[str, str]) -> Mapping[str, Markdown]:
    """Sentences of ours, which need no escaping."""
    return MappingProxyType({name: Markdown(text) for name, text in texts.items()})


# Which file to take, in a sentence; the names are llama.cpp's. No sizes: where rows do not divide into a type's blocks,
# llama.cpp puts a larger type in its place, and the table beside it has what was measured.
WHEN: Mapping[str, Markdown] = _own(
    {
        "F32": "Unquantised, in 32 bits; only to convert further.",
        "F16": "Unquantised, for hardware without BF16.",
        "BF16": "Unquantised; to make other quants from.",
        "Q8_0": "Eight bits, the closest to the unquantised model; the one to take if it fits.",
        "Q6_K": "Six bits, the next closest; the one to take if Q8_0 does not fit.",
        "Q5_K_M": "Five bits and more for what matters most; between Q4_K_M and Q6_K.",
        "Q5_K_S": "Like Q5_K_M, slightly smaller and slightly less exact.",
        "Q4_K_M": "Four bits and more for what matters most; the usual choice where memory is short.",
        "Q5_0": "An older five-bit kind, for programs that know no K-quants.",
        "Q4_K_S": "Like Q4_K_M, smaller and somewhat less exact.",
        "IQ4_NL": "Like IQ4_XS, slightly larger, in blocks that fit every row; quick on ARM.",
        "Q4_0": "An older four-bit kind, quick on processors; Q4_K_S is more exact.",
        "IQ4_XS": "About as good as Q4_K_S and smaller; slower on processors.",
        "Q3_K_L": "Lower quality; where four bits do not fit.",
        "Q3_K_M": "Low quality, smaller than Q3_K_L.",
        "IQ3_M": "About as good as Q3_K_M and smaller; slower on processors.",
        "IQ3_S": "Better than Q3_K_S at its size; slower on processors.",
        "Q3_K_S": "Low quality; IQ3_S is better at this size.",
        "IQ3_XS": "Smaller than IQ3_S, and lower in quality.",
        "IQ3_XXS": "Low quality in three bits.",
        "Q2_K": "Very low quality, but often still usable.",
        "Q2_K_S": "Very low quality, smaller than Q2_K.",
        "IQ2_M": "Low quality; often better than Q2_K and smaller.",
        "IQ2_S": "Low quality, smaller than IQ2_M.",
        "IQ2_XS": "Low quality, smaller than IQ2_S.",
        "IQ2_XXS": "Very low quality, for very little memory.",
        "IQ1_M": "Extremely low quality; only where nothing else fits.",
        "IQ1_S": "The smallest there is; expect nonsense.",
    }
)
# Which type the example commands take: the first of these that was made.
PREFERRED = (
    "Q4_K_M", "Q5_K_M", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q5_K_S", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "Q3_K_L", "Q3_K_M",
    "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "Q2_K_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M",
    "IQ1_S", "BF16", "F16", "F32",
)  # fmt: skip
PROOFS: Mapping[str, Markdown] = _own(
    {
        "ran": "ran in llama.cpp",
        "structural": "checked; a few layers ran",
    }
)
# What each proof means, for below the table.
PROVEN: Mapping[str, str] = MappingProxyType(
    {
        "ran": "“ran in llama.cpp”: the whole file was loaded there and generated.",
        "structural": "“checked; a few layers ran”: too large for the machine, so every header and block was checked, and a "
        "copy cut to a few layers generated in llama.cpp.",
    }
)
RANDOM_MODES = ("random", "uniform_random")
_LAST = "the base model's hidden state at the last token of that expert's prompts, averaged over the prompts"
# What an expert's vector in the router is, by gate mode.
GATE_VECTORS: Mapping[str, Markdown] = _own(
    {
        "discriminant": "fitted by ridge regression to tell the experts' prompts apart, on what the router receives in this model",
        "hidden": _LAST,
        "hidden_last": _LAST,
        "hidden_avg": "the base model's hidden state, averaged over all tokens of that expert's prompts",
        "cheap_embed": "the sum of the base model's token embeddings of that expert's prompts, the same in every layer",
        "random": "random numbers of a normal distribution",
        "uniform_random": "random numbers of a uniform distribution",
    }
)


def billions(count: int) -> str:
    """A parameter count: `24.15 B`, `135.2 M`."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def size(count: int) -> str:
    """Bytes, decimal as the Hub shows them: `14.4 GB`, `270 MB`, `3 kB`."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count} bytes"


def thousands(count: int) -> str:
    return f"{count:,}"


def counted(count: int, noun: str) -> str:
    """`1 expert`, `4 experts`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `12 min`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None, digits: int) -> str:
    """A measured number; a dash where there is none, infinity in words."""
    if value is None or math.isinf(value):
        return "infinite"
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in short: `0 to 3, 7, 30 and 31`."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and runs[-1][-1] + 1 == value:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(value) for value in run]
    return listed(parts)


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
