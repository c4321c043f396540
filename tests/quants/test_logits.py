"""llama.cpp and transformers compute one model: the whole distribution over the vocabulary, token by token of a fixed text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge.evaluate import Evaluator, open_files
from merge.families import FAMILIES
from quants.build import quantize
from quants.families import routes_otherwise
from quants.metadata import ModelInfo
from quants.proof import next_tokens
from tests.dense import planned, save_dense
from tests.quants.cases import CASES
from tests.quants.tiny import config, write_model

TEXT = "the capital of france is paris and many small experts read every text well with a model"
# Weights large enough for the answers to be far from uniform, and for experts to matter.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.12, "bos_token_id": 1}
SIZES["eos_token_id"] = 2
COUNTS = (2, 3, 4, 8, 16)
# With the first gates a token of these stands so near to two experts that llama.cpp's rounding of activations to bfloat16 sends it
# to the other one, which is a test of its own; others put it nearer to one.
NEAR_TIES = (("qwen3_moe", 16), ("hunyuan_v1_moe", 8))
# A dense base of each family, and what a tiny one of it needs; DeepSeek's has no class in transformers and stands below.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {"head_dim": 24}),
    "granitemoe": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "granitemoe_swa": ("granite_swa", {"sliding_window": 16}),
    "ernie4_5_moe": ("ernie4_5", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", {"head_dim": 16}),
    "deepseek_v3": (
        "youtu",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    "cohere2_moe": ("cohere2", {"sliding_window": 16, "logit_scale": 1.0}),
}


def divergence(theirs: list[dict[int, float]], ours: torch.Tensor) -> float:
    """Mean KL divergence in nats of llama.cpp's distributions from `ours`, logits (positions, vocabulary)."""
    ours = ours.double().log_softmax(-1)
    other = torch.tensor([[of[token] for token in range(ours.shape[-1])] for of in theirs], dtype=torch.float64)
    return float((ours.exp() * (ours - other)).sum(-1).mean())


def compared(folder: Path, file: Path) -> float:
    """The divergence of a GGUF file from the checkpoint in `folder`, run in float32."""
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
    ours = logits(folder, ids)
    told = next_tokens(file, [ids[:end] for end in range(1, len(ids) + 1)], ours.shape[-1])
    return divergence(told, ours)


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' logits in float32 (positions, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.as_tensor(model(torch.tensor([ids])).logits[0])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Dense models by family and number."""
    root = tmp_path_factory.mktemp("dense")

    def model(family: str, number: int) -> Path:
        kind, changes = BASES[family]
        folder = root / f"{family}-{number}"
        if not folder.exists():
            save_dense(folder, number, kind, **SIZES, **changes)
        return folder

    return model


def merged(
    dense: Any, family: str, experts: int, folder: Path, *, seed: int = 1, file_type: str = "BF16"
) -> tuple[Path, Path]:
    """A merge of that many experts, as a checkpoint and as a GGUF file; `seed` makes its gates."""
    from merge.writer import write_checkpoint

    known = next(kind for kind in FAMILIES if family == kind.NAME)
    recipe = {"base_model": str(dense(family, 0)), "gate_mode": "random", "architecture": family}
    recipe["experts"] = [{"source_model": str(dense(family, number))} for number in range(experts)]
    recipe["experts_per_token"] = 2 if known.NORMALISES else experts
    plan = planned(json.dumps(recipe), folder)
    generator = torch.Generator().manual_seed(seed)
    # Far apart, so that rounding of activations seldom makes another expert the chosen one. A sigmoid of numbers so far apart is
    # zero or one, and llama.cpp divides by no sum below 0.00006.
    scale = 0.25 if family == "deepseek_v3" else 3
    gates = {layer: scale * torch.randn(len(plan.gated), 64, generator=generator) for layer in range(2)}
    contents = Evaluator(open_files(plan.sources), gates)
    write_checkpoint(plan, plan.sources[plan.base], contents, folder / "model", gates_key="")
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    made = quantize(
        plan.config, tensors, contents, folder / "model", folder, "Tiny", [file_type], ModelInfo("Tiny"), prove=False
    )
    return folder / "model", made[0].path


def cases() -> list[Any]:
    """Every family with every number of experts; each day one number for each family, in turn."""
    found = []
    for number, family in enumerate(BASES):
        for count in COUNTS:
            marks = [] if count == COUNTS[number % len(COUNTS)] else [pytest.mark.slow]
            found.append(pytest.param(family, count, marks=marks))
    return found


@pytest.mark.parametrize(("family", "experts"), cases())
def test_llama_cpp_computes_what_transformers_does(family: str, experts: int, dense: Any, tmp_path: Path) -> None:
    folder, file = merged(dense, family, experts, tmp_path, seed=2 if (family, experts) in NEAR_TIES else 1)
    kl = compared(folder, file)
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
    base = [dict(enumerate(of.tolist())) for of in logits(dense(family, 0), ids).double().log_softmax(-1)]
    experts_matter = divergence(base, logits(folder, ids))
    print(f"{family}, {experts} experts: KL {kl:.2e}; of the base {experts_matter:.2f}")
    assert kl <= 1e-3
    assert experts_matter > 0.02


@pytest.mark.parametrize(("family", "experts"), NEAR_TIES)
def test_only_rounding_tells_the_two_apart_where_a_token_is_near_to_two_experts(
    family: str, experts: int, dense: Any, tmp_path: Path
) -> None:
    folder, file = merged(dense, family, experts, tmp_path, file_type="F32")
    assert compared(folder, file) <= 1e-4


def test_every_family_of_transformers_with_a_gguf_is_compared() -> None:
    from transformers import CONFIG_MAPPING

    from quants.families import FAMILIES as WRITTEN

    assert BASES.keys() == {family.NAME for family in FAMILIES if family.NAME in WRITTEN} & set(CONFIG_MAPPING)


@pytest.mark.parametrize("chosen", [2, 4])
def test_another_normalisation_of_the_weights_is_felt_and_told(chosen: int, tmp_path: Path) -> None:
    """mergekit writes norm_topk_prob: true; llama.cpp never normalises for this architecture."""
    found = CASES["qwen2_moe"][0] | {"norm_topk_prob": True, "num_experts_per_tok": chosen}
    folder = write_model(tmp_path / "Tiny", found)
    from bot.quants import open_model

    model = open_model(folder)
    (file,) = quantize(
        model.config, model.tensors, model.contents, folder, tmp_path, "Tiny", ["BF16"], ModelInfo("Tiny"), prove=False
    )
    kl = compared(folder, file.path)
    print(f"qwen2_moe, norm_topk_prob, {chosen} of 4 experts: KL {kl:.5f}")
    assert routes_otherwise(model.config) == (chosen == 2)
    assert kl > 5e-3 if chosen == 2 else kl <= 1e-3


@pytest.mark.parametrize("chosen", [2, 4])
def test_deepseek_s_weights_never_sum_to_one_in_llama_cpp(chosen: int, tmp_path: Path) -> None:
    """transformers has no class for DeepSeek's first architecture, but one that computes the same where the weights of the
    chosen experts are scaled to sum to one: Granite-MoE with a shared expert and all multipliers one."""
    changes = {"first_k_dense_replace": 0, "norm_topk_prob": True, "num_experts_per_tok": chosen, "dtype": "float32"}
    found = CASES["deepseek"][0] | changes
    folder = write_model(tmp_path / "Tiny", found)
    from bot.quants import open_model

    model = open_model(folder)
    (file,) = quantize(
        model.config, model.tensors, model.contents, folder, tmp_path, "Tiny", ["F32"], ModelInfo("Tiny"), prove=False
    )
    kl = compared(as_granite(folder, found, tmp_path / "Granite"), file.path)
    print(f"deepseek, norm_topk_prob, {chosen} of 4 experts: KL {kl:.5f}")
    assert routes_otherwise(model.config) == (chosen == 2)
    assert kl > 5e-3 if chosen == 2 else kl <= 1e-3


def as_granite(folder: Path, found: dict[str, Any], out: Path) -> Path:
    """The weights of a DeepSeek-MoE checkpoint as those of a Granite-MoE with a shared expert."""
    weights = load_file(folder / "model.safetensors")
    named = {name: x for name, x in weights.items() if ".mlp." not in name}
    for layer in range(found["num_hidden_layers"]):
        at, to = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        experts = range(found["n_routed_experts"])
        gate, up, down = (
            torch.stack([weights[f"{at}.experts.{expert}.{part}_proj.weight"] for expert in experts])
            for part in ("gate", "up", "down")
        )
        named |= {f"{to}.router.layer.weight": weights[f"{at}.gate.weight"], f"{to}.output_linear.weight": down}
        named[f"{to}.input_linear.weight"] = torch.cat([gate, up], dim=1)
        gate, up, down = (weights[f"{at}.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
        shared = f"model.layers.{layer}.shared_mlp"
        named |= {f"{shared}.input_linear.weight": torch.cat([gate, up]), f"{shared}.output_linear.weight": down}
    heads, size = found["num_attention_heads"], found["moe_intermediate_size"]
    granite = config(
        model_type="granitemoeshared", architectures=["GraniteMoeSharedForCausalLM"], dtype="float32",
        vocab_size=found["vocab_size"], num_hidden_layers=found["num_hidden_layers"], intermediate_size=size,
        shared_intermediate_size=size, num_local_experts=found["n_routed_experts"],
        num_experts_per_tok=found["num_experts_per_tok"], embedding_multiplier=1.0, residual_multiplier=1.0,
        logits_scaling=1.0, attention_multiplier=(found["hidden_size"] // heads) ** -0.5,
    )  # fmt: skip
    write_model(out, granite)
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("experts", [2, 3, 4, 8, 16])
def test_deepseek_with_equal_experts_is_its_dense_base(experts: int, tmp_path: Path) -> None:
    """transformers has no class for DeepSeek's first architecture: with experts equal to the base, a shared expert of zeros,
    and all experts chosen, the file must be the dense Llama it was made of."""
    base = save_dense(tmp_path / "base", 0, **SIZES)
    recipe: dict[str, Any] = {"base_model": str(base), "gate_mode": "random", "architecture": "deepseek"}
    recipe |= {"experts": [{"source_model": str(base)}] * experts, "experts_per_token": experts}
    recipe["shared_experts"] = [{"source_model": str(base), "residual_scale": 0.0}]
    plan = planned(json.dumps(recipe), tmp_path)
    generator = torch.Generator().manual_seed(1)
    gates = {layer: 3 * torch.randn(len(plan.gated), 64, generator=generator) for layer in range(2)}
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    contents = Evaluator(open_files(plan.sources), gates)
    made = quantize(plan.config, tensors, contents, base, tmp_path, "Tiny", ["BF16"], ModelInfo("Tiny"), prove=False)
    kl = compared(base, made[0].path)
    print(f"deepseek, {experts} experts: KL {kl:.2e}")
    assert kl <= 1e-3


def test_the_text_is_long_enough_to_leave_the_windows(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1))
    assert len(AutoTokenizer.from_pretrained(folder).encode(TEXT)) > 16
