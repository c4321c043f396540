"""Experts equal to the base give the base in llama.cpp too: the GGUF of a merge against the dense model in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from merge.evaluate import Evaluator, open_files
from merge.families import FAMILIES
from merge.families.dense import dense_model
from merge.families.family import Family, Mixture
from quants.build import quantize
from quants.families import FAMILIES as WRITTEN
from quants.metadata import ModelInfo
from quants.proof import generate
from tests.dense import SIZES, planned
from tests.merge.test_families import small

_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# Families that llama.cpp runs, each with the bases it takes and what is special about them.
BASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "llama", {}),
    ("mixtral", "llama", {"head_dim": 24}),
    ("mixtral", "mistral", {"sliding_window": None}),
    ("deepseek", "llama", {}),
    ("deepseek", "llama", {"tie_word_embeddings": True}),
    ("deepseek", "mistral", {"sliding_window": None}),
    ("qwen2_moe", "qwen2", {}),
    ("qwen2_moe", "qwen2", {"num_key_value_heads": 4}),
    ("qwen2_moe", "llama", {}),
    ("qwen2_moe", "seed_oss", {}),
    ("qwen3_moe", "qwen3", {}),
    ("qwen3_moe", "qwen3", {"head_dim": 24}),
    ("qwen3_moe", "qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("granitemoe", "granite", {}),
    ("granitemoe", "granite", {"tie_word_embeddings": True}),
    ("granitemoe", "llama", {"attention_bias": True}),
    ("granitemoe", "qwen2", {}),
    ("granitemoe", "seed_oss", {}),
    ("qwen2_moe", "qwen2", {"tie_word_embeddings": True}),
    ("granitemoe_swa", "granite_swa", {}),
    ("granitemoe_swa", "granite_swa", {"sliding_window": 8, "layer_rope_theta": [10000.0, 0.0]}),
    ("ernie4_5_moe", "ernie4_5", {}),
    ("ernie4_5_moe", "ernie4_5", {"tie_word_embeddings": False, "head_dim": 24}),
    ("hunyuan_v1_moe", "hunyuan_v1_dense", {}),
    ("hunyuan_v1_moe", "hunyuan_v1_dense", {"head_dim": 24, "tie_word_embeddings": True}),
    ("deepseek_v3", "youtu", {}),
    ("deepseek_v3", "youtu", {"tie_word_embeddings": False}),
    ("cohere2_moe", "cohere2", {}),
    ("cohere2_moe", "cohere2", {"sliding_window": 8, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(
    ("family", "model_type", "changes"), BASES, ids=lambda x: x if isinstance(x, str) else " ".join(x) or "plain"
)
def test_experts_equal_to_the_base_give_the_base_in_llama_cpp(
    family: str, model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = small(tmp_path / "base", model_type, **changes)
    kind = next(known for known in FAMILIES if family == known.NAME)
    recipe = {"base_model": str(base), "gate_mode": "random", "architecture": family, "dtype": "float32"}
    recipe["experts"] = [{"source_model": str(base)} for _ in range(3)]
    recipe["experts_per_token"] = 2 if kind.NORMALISES else 3
    if family == "deepseek":  # llama.cpp asks for a shared expert: one that adds nothing
        recipe["shared_experts"] = [{"source_model": str(base), "residual_scale": 0.0}]
    plan = planned(json.dumps(recipe), tmp_path)
    generator = torch.Generator().manual_seed(1)
    gates = {layer: torch.randn(len(plan.gated), 64, generator=generator) for layer in range(2)}
    (file,) = quantize(
        plan.config,
        {tensor.name: tensor.expr for tensor in plan.tensors},
        Evaluator(open_files(plan.sources), gates),
        base,
        tmp_path,
        "Tiny",
        ["F32"],
        ModelInfo("Tiny"),
        prove=False,
    )
    prompt = [1, *range(259, 330, 3)]
    theirs = generate(file.path, prompt, 8)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *theirs.tokens]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (8, vocabulary)
    ours = logprobs[torch.arange(8), list(theirs.tokens)]
    # llama.cpp keeps keys and values in half precision.
    assert torch.all(ours > logprobs.amax(-1) - 0.01)
    told = [value for value in theirs.logprobs if value is not None]
    assert told
    for value, other in zip(ours.tolist(), theirs.logprobs, strict=True):
        assert other is None or value == pytest.approx(other, abs=0.01)


@pytest.mark.parametrize(
    ("model_type", "changes", "keys", "why"),
    [
        ("olmo2", {}, {}, "has no such models"),
        ("cohere2", {}, {"shared_experts": [{"residual_scale": 0.1}]}, "takes the mean"),
        ("cohere2", {"attention_bias": True}, {}, "no attention biases"),
        ("hunyuan_v1_dense", {"attention_bias": True}, {}, "no bias of the attention's output"),
        ("llama", {"rope_parameters": _DYNAMIC}, {}, "no rotary scaling of type 'dynamic'"),
        ("llama", {}, {"architecture": "deepseek"}, "needs a shared expert"),
        (
            "llama",
            {"attention_bias": True},
            {"architecture": "deepseek", "shared_experts": [{}]},
            "no attention biases",
        ),
        ("qwen2", {"head_dim": 24}, {}, "no heads of another size"),
        ("granite", {"head_dim": 24}, {}, "no heads of another size"),
        ("llama", {"hidden_act": "gelu"}, {}, "with silu, not with gelu"),
        ("youtu", {"attention_bias": True}, {}, "no attention biases"),
        ("youtu", {"rope_interleave": False}, {}, "turns neighbouring pairs"),
        ("youtu", {"q_lora_rank": None}, {}, "queries have no latent"),
        ("youtu", {"rope_parameters": _DYNAMIC}, {}, "no rotary scaling of type 'dynamic'"),
    ],
)
def test_a_file_that_llama_cpp_could_not_run_is_not_promised(
    model_type: str, changes: dict[str, Any], keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", model_type, **changes)
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": [{"source_model": str(base)}] * 2} | keys
    for shared in recipe.get("shared_experts", ()):
        shared["source_model"] = str(base)
    plan = planned(json.dumps(recipe), tmp_path)
    (said,) = [finding for finding in plan.findings if finding.id == "no-gguf"]
    assert why in said.text
    assert plan.quants == ()
    silent = planned(json.dumps(recipe | {"release": {"quants": []}}), tmp_path)
    assert "no-gguf" not in {finding.id for finding in silent.findings}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
def test_gguf_is_promised_of_just_the_families_that_are_written_and_each_is_run(family: Family) -> None:
    base = dense_model(SIZES | {"model_type": family.ACCEPTS[0], "head_dim": 16})
    promised = any(family.why_no_gguf(base, Mixture(2, 2, shared, "bfloat16")) is None for shared in (False, True))
    assert promised == (family.NAME in WRITTEN)
    assert promised == (family.NAME in {name for name, _, _ in BASES})


@pytest.mark.parametrize(
    "family", [x for x in FAMILIES if x.WINDOW and x.NAME in WRITTEN], ids=lambda family: family.NAME
)
def test_a_window_that_llama_cpp_ignores_is_said_where_the_context_goes_beyond_it(
    family: Family, tmp_path: Path
) -> None:
    kind = {"mixtral": "mistral"}.get(family.NAME, family.ACCEPTS[0])
    switch = {"use_sliding_window": True, "max_window_layers": 0} if kind.startswith("qwen") else {}
    types = {} if kind == "mistral" else {"layer_types": ["sliding_attention"] * 2}
    for context, quants, is_said in ((256, ["F32"], True), (64, ["F32"], False), (256, [], False)):
        base = small(
            tmp_path / f"{context}", kind, sliding_window=64, max_position_embeddings=context, **switch, **types
        )
        recipe = {
            "base_model": str(base),
            "gate_mode": "random",
            "architecture": family.NAME,
            "release": {"quants": quants},
        }
        plan = planned(json.dumps(recipe | {"experts": [{"source_model": str(base)}] * 2}), tmp_path)
        said = "gguf-without-window" in {finding.id for finding in plan.findings}
        assert said == (is_said and "sliding_window" not in WRITTEN[family.NAME].needs)
