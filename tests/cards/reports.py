"""Reports to render: one like the demo's, of local folders; one like a 4x7B release's, with everything."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from evals.results import (
    CardText,
    ExpertUsed,
    ExpertWorth,
    FileMade,
    FindingSaid,
    LayerGroup,
    LayerRouting,
    QuantMade,
    QuantsMeasured,
    Report,
    RouterMeasured,
    SourceUsed,
)
from evals.scores import ModelLosses, ModelSample, Perplexities, PreviousRelease, Score, TextLoss

RECIPES = Path(__file__).parents[2] / "recipes"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def made(name: str, count: int) -> FileMade:
    return FileMade(name, count, sha(name))


def quant(
    name: str, kind: str, count: int, bits: float, sample: str = " Paris, and the city is", proof: str = "ran"
) -> QuantMade:
    return QuantMade(made(f"{name}-{kind}.gguf", count), kind, bits, 12.5, proof, "The capital of France is", sample)


DEMO_RECIPE = """\
base_model: ./models/SmolLM2-135M-Instruct
gate_mode: hidden
experts:
  - source_model: ./models/SmolLM2-135M-python
    role: code
    positive_prompts: ["def fibonacci(n):", "import numpy as np"]
  - source_model: ./models/SmolLM2-135M-french
    role: French
    positive_prompts: ["La capitale de la France est", "Il était une fois"]
"""


def demo_report() -> Report:
    """Local folders, no repository, no licence, no roles hidden: what `make demo` has."""
    name = "demo-2x135M"
    python, french = "./models/SmolLM2-135M-python", "./models/SmolLM2-135M-french"
    base = "./models/SmolLM2-135M-Instruct"
    return Report(
        name=name,
        repo=None,
        family="mixtral",
        family_title="Mixtral",
        moerge_version="0.1.0",
        recipe_text=DEMO_RECIPE,
        recipe_identity=sha("recipe"),
        gate_mode="hidden",
        gates_key=sha("gates"),
        dtype="bfloat16",
        parameters={"total": 214_177_000, "active": 214_177_000, "shared": 54_800_000, "per_expert": 79_600_000},
        experts_per_token=2,
        context_length=8192,
        license=None,
        license_name=None,
        license_link=None,
        language=(),
        tags=(),
        title=None,
        description=None,
        private=False,
        version=None,
        base=base,
        sources=(
            SourceUsed(base, None, sha("base"), None, 272, 90),
            SourceUsed(python, None, sha("python"), None, 272, 182),
            SourceUsed(french, None, sha("french"), None, 272, 182),
        ),
        experts=(
            ExpertUsed(python, "code", ("def fibonacci(n):", "import numpy as np"), ()),
            ExpertUsed(french, "French", ("La capitale de la France est", "Il était une fois"), ()),
        ),
        files=(made("config.json", 900), made("model.safetensors", 428_354_000), made("tokenizer.json", 3_500_000)),
        quants=(quant(name, "Q8_0", 228_000_000, 8.52), quant(name, "Q4_K_M", 158_000_000, 5.91)),
        routing=tuple(LayerRouting(layer, 1.4 + layer / 10, 0.31 + layer / 100, (0, 1)) for layer in range(4)),
    )


def release_report() -> Report:
    """A 4x7B release on the Hub with every field filled."""
    name = "Beyonder-4x7B-v3"
    commits = {model: hashlib.sha1(model.encode(), usedforsecurity=False).hexdigest() for model in BEYONDER}
    licenses = ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0")
    roles = ("chat", "code", "storywriting", "math")
    prompts = (
        ("chat", "assistant", "tell me", "explain", "I want"),
        ("code", "python", "javascript", "programming", "algorithm"),
        ("storywriting", "write", "scene", "story", "character"),
        ("reason", "math", "mathematics", "solve", "Solve this.\n\nA train leaves at ```noon```."),
    )
    shards = [made(f"model-{i:05d}-of-00010.safetensors", 4_830_000_000) for i in range(1, 11)]
    return Report(
        name=name,
        repo="mlabonne/Beyonder-4x7B-v3",
        family="mixtral",
        family_title="Mixtral",
        moerge_version="0.1.0",
        recipe_text=(RECIPES / "Beyonder-4x7B-v3.yaml").read_text(encoding="utf-8"),
        recipe_identity=sha("recipe"),
        gate_mode="hidden",
        gates_key=sha("gates"),
        dtype="bfloat16",
        parameters={
            "total": 24_153_690_112,
            "active": 12_879_138_816,
            "shared": 1_604_587_520,
            "per_expert": 5_637_275_648,
        },
        copied_bytes=48_306_331_648,
        tensor_bytes=48_307_380_224,
        experts_per_token=2,
        context_length=32768,
        license="other",
        license_name="CC BY-NC 4.0 and more",
        license_link="https://creativecommons.org/licenses/by-nc/4.0/",
        language=("en", "fr"),
        tags=("beyonder", "moe", "role-play"),
        title="Beyonder 4x7B, version 3",
        description='A **mixture** for chat, code and stories.\n\n- talks\n- writes\n\n```python\nprint("<b>hello</b>")\n```',
        private=False,
        version="3.1",
        base=BEYONDER[0],
        sources=tuple(
            SourceUsed(model, commits[model], sha(model), license, 291, 0 if index == 0 else 195)
            for index, (model, license) in enumerate(zip(BEYONDER, licenses, strict=True))
        ),
        experts=tuple(
            ExpertUsed(model, role, positive, ("poetry",) if index == 1 else (), *((1e-4, 0.5) if index == 2 else ()))
            for index, (model, role, positive) in enumerate(zip(BEYONDER, roles, prompts, strict=True))
        ),
        files=(made("config.json", 900), *shards, made("tokenizer.json", 1_795_000)),
        quants=(
            quant(name, "BF16", 48_320_000_000, 16.0, proof="structural"),
            quant(name, "Q8_0", 25_670_000_000, 8.5),
            quant(name, "Q4_K_M", 14_600_000_000, 4.84, sample="\n```\nParis\n```\n# not a heading"),
        ),
        routing=tuple(
            LayerRouting(
                layer, (9.25, 8.0, None, 6.5)[layer] if layer < 4 else 1.5 + layer / 20, 0.9 - layer / 50, (0, 3)
            )
            for layer in range(32)
        ),
        findings=(
            FindingSaid("prompt-one-word", "warning", "the prompts of expert 1 are single words", 4),
            FindingSaid("license", "notice", "not for the card", None),
        ),
        seconds={"merge": 41.7, "gates": 8.21, "gguf": 1530.0},
    )


def measured_report() -> Report:
    """The release with everything that can be measured of it: scores of each origin, perplexities, samples, a router's
    figures, experts' worth, a release before."""
    report = release_report()
    names = ("mixture", *BEYONDER)
    losses = (
        (2.10, 1.31, 2.55, 1.02),
        (2.15, 1.62, 2.60, 1.30),
        (2.40, 1.28, 2.90, 1.35),
        (2.2, 1.7, 2.5, 1.4),
        (2.3, 1.6, 2.8, 1.0),
    )
    roles: tuple[Literal["mixture", "base", "expert"], ...] = ("mixture", "base", "expert", "expert", "expert")
    models = tuple(
        ModelLosses(name, role, tuple(TextLoss(loss, 1000) for loss in of))
        for name, role, of in zip(names, roles, losses, strict=True)
    )
    perplexities = Perplexities(("chat", "code", "stories", "math"), models, "2026-11-20")
    harness = "lm-evaluation-harness 0.4.13"
    arc = Score(
        "AI2 Reasoning Challenge (25-shot)", "acc_norm", 71.5, "measured", "arc_challenge", "allenai/ai2_arc", "ARC-Challenge",
        "test", 25, "normalized accuracy", 1.31, 1172, harness, "1.0", "2026-11-21",
    )  # fmt: skip
    gsm = replace(
        arc,
        title="GSM8k (5-shot)",
        metric="exact_match",
        value=69.9,
        task="gsm8k",
        dataset="openai/gsm8k",
        config="main",
        shots=5,
    )
    imported = replace(
        gsm,
        title="eq_bench",
        origin="imported",
        metric="eqbench",
        value=70.25,
        task="eq_bench",
        dataset="pbevan11/EQ-Bench",
    )
    told = Score(
        "MMLU (5-Shot)", "acc", 64.7, "reported", dataset="cais/mmlu", shots=5, date="2024-01-25",
        source_name="Open LLM Leaderboard", source_url="https://huggingface.co/spaces/open-llm-leaderboard-old/open_llm_leaderboard",
    )  # fmt: skip
    even = (0.4, 0.3, 0.28, 0.02)
    matrix = tuple(tuple(0.7 if i == j else 0.1 for j in range(4)) for i in range(4))
    routers = tuple(
        RouterMeasured(name, (right,) * 32, (even,) * 32, (0.5,) * 32, (0.8,) * 32, (LayerGroup(0, 31, matrix),))
        for name, right in (("discriminant", 0.93), ("hidden", 0.41))
    )
    worth = (
        ExpertWorth(1, 900, 2.56, 2.43, 2.45),
        ExpertWorth(2, 800, 2.9, 2.5, 2.85),
        ExpertWorth(3, 700, 1.1, 1.2, 1.2),
    )
    before = PreviousRelease(
        "v3.0", sha("another recipe"), (replace(arc, value=68.0), replace(gsm, value=70.4), told),
        Perplexities(perplexities.texts, (replace(models[0], losses=models[2].losses),), "2026-10-01"),
        dict(report.parameters), {"Q4_K_M": 13_000_000_000},
    )  # fmt: skip
    return replace(
        report,
        shape={
            "layers": 32,
            "hidden": 4096,
            "intermediate": 14336,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "vocabulary": 32000,
        },
        scores=(arc, gsm, imported, told),
        perplexities=perplexities,
        samples=(
            ModelSample("The capital of France is", " Paris.", " a city of\n```\nlights", 0, 0.7, 0.9, 48),
            ModelSample("def fibonacci(n):", "\n    return n", "", 0, 0.7, 0.9, 48),
        ),
        routers=routers,
        worth=worth,
        previous=before,
        quants_measured=QuantsMeasured(6.12, 1020),
        card=CardText(
            image="image.png",
            sections={
                "explainer": True,
                "sponsor": False,
                "Thanks": "To *everyone* who wrote tests.",
                "router": "My own words.",
            },
            order=("evaluation", "Thanks"),
            sponsor="Nobody.",
        ),
    )


BEYONDER = (
    "mlabonne/AlphaMonarch-7B",
    "beowolx/CodeNinja-1.0-OpenChat-7B",
    "SanjiWatsuki/Kunoichi-DPO-v2-7B",
    "mlabonne/NeuralDaredevil-7B",
)

GOLDEN = Path(__file__).parent / "golden"


def golden() -> dict[str, str]:
    """The cards of both reports by their golden file's name."""
    from cards.render import render_gguf_card, render_model_card

    reports = {"demo": demo_report(), "release": release_report(), "measured": measured_report()}
    return {
        f"{name}.{kind}.md": render(report)
        for name, report in reports.items()
        for kind, render in (("model", render_model_card), ("gguf", render_gguf_card))
    }


if __name__ == "__main__":
    # python -m tests.cards.reports: after a change of the cards that is meant; look at the diff.
    from cards.render import render_model_card
    from tests.cards.community import COMMUNITY, community_report

    community = {f"{name}.model.md": render_model_card(community_report(name)) for name in COMMUNITY}
    for file, text in (golden() | community).items():
        (GOLDEN / file).write_text(text, encoding="utf-8")
