"""Which family a recipe gets and why, and the rules for shared experts, weights, windows and GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bot.preview import preview_recipe
from merge.errors import RecipeError
from merge.evaluate import Evaluator, open_files
from merge.expr import Concat, Expr, Gate, Read, Stack, Zeros, elements, pieces
from merge.families import FAMILIES, families_named
from merge.families.family import GATED_SHARED, PLAIN_SHARED, Family
from merge.families.qwen2_moe import ZERO_SIZE
from merge.forward import Batch, StreamedModel
from merge.plan import MergePlan
from merge.writer import write_checkpoint
from tests.dense import planned, recipe_text
from tests.merge.test_families import NEEDS, RUNNABLE, difference, logits, merged, recipe_for, small

PROMPTS = {"positive_prompts": ["the capital"]}
# An expert that gives nothing.
SILENT = {"residual_scale": 0.0}


def found(plan: MergePlan, level: str = "warning") -> set[str]:
    return {finding.id for finding in plan.findings if finding.level == level}


def errors(text: str, folder: Path) -> set[str]:
    with pytest.raises(RecipeError) as error:
        planned(text, folder)
    return {finding.id for finding in error.value.findings if finding.level == "error"}


def shared(base: Path, **keys: Any) -> dict[str, Any]:
    return {"shared_experts": [{"source_model": str(base), **keys}]}


def recipe_of(base: Path, experts: list[dict[str, Any]], **keys: Any) -> str:
    """A recipe over this base, its experts written out."""
    whole = {"base_model": str(base), "gate_mode": "random"} | keys
    whole["experts"] = [{"source_model": str(base), **expert} for expert in experts]
    return json.dumps(whole)  # JSON is YAML, and has no aliases


def hidden(base: Path, **keys: Any) -> str:
    """A recipe whose gates are made from prompts."""
    experts = [{"positive_prompts": [word]} for word in ("code", "stories", "numbers")]
    return recipe_of(base, experts, gate_mode="hidden", **keys)


@pytest.mark.parametrize(
    ("model_type", "family"),
    [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo"),
     ("granite", "granitemoe"), ("granite_swa", "granitemoe_swa"), ("ernie4_5", "ernie4_5_moe"),
     ("hunyuan_v1_dense", "hunyuan_v1_moe"), ("cohere2", "cohere2_moe"), ("ministral", "qwen2_moe"), ("cwm", "qwen2_moe"), ("youtu", "deepseek_v3"), ("seed_oss", "qwen2_moe")],
)  # fmt: skip
def test_the_base_chooses_the_family(model_type: str, family: str, tmp_path: Path) -> None:
    base = small(tmp_path / "base", model_type)
    plan = planned(recipe_text(base, [base, base]), tmp_path)
    assert (plan.family, plan.why_family) == (family, f"the base is a {model_type} model")


def test_a_shared_expert_chooses_as_in_mergekit(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "llama")
    without = planned(hidden(base, **shared(base, residual_scale=0.1)), tmp_path)
    assert without.family == "deepseek"
    assert without.why_family == "the base is a llama model and the recipe has a shared expert without prompts"
    with_prompts = planned(hidden(base, **shared(base, residual_scale=0.1, **PROMPTS)), tmp_path)
    assert with_prompts.family == "qwen2_moe"
    assert with_prompts.why_family.endswith("a shared expert with prompts")


@pytest.mark.parametrize(
    ("asked", "families"),
    [("mixtral", ["mixtral"]), ("Mix", ["mixtral"]), ("qwen3", ["qwen3_moe"]), ("Qwen3 MoE", ["qwen3_moe"]),
     ("qwen", ["qwen2_moe", "qwen3_moe"]), ("deepseek", ["deepseek", "deepseek_v3"]), ("DeepSeek MoE", ["deepseek"]), ("deepseek-v3", ["deepseek_v3"]),
     ("flexolmo", ["flex_olmo"]), ("granite-moe", ["granitemoe", "granitemoe_swa"]), ("", []), ("--", []), ("gpt2", [])],
)  # fmt: skip
def test_the_beginning_of_a_name_is_enough(asked: str, families: list[str]) -> None:
    assert [family.NAME for family in families_named(asked)] == families


def test_of_the_families_a_name_may_mean_the_one_that_takes_the_base_is_chosen(tmp_path: Path) -> None:
    for model_type, family in (("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")):
        base = small(tmp_path / model_type, model_type)
        plan = planned(recipe_text(base, [base, base], architecture="qwen"), tmp_path)
        assert (plan.family, plan.why_family) == (family, "the recipe says so")


def test_an_architecture_that_does_not_take_the_base_says_what_it_takes(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen3")
    with pytest.raises(RecipeError, match="is a 'qwen3' model; the Mixtral family takes llama and mistral"):
        planned(recipe_text(base, [base, base], architecture="mixtral"), tmp_path)


# -------------------------------------------------------------------------------------------------------- shared experts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
def test_shared_experts_follow_the_family_s_rules(family: Family, tmp_path: Path) -> None:
    base = small(tmp_path / "base", family.ACCEPTS[0])
    keys: dict[str, Any] = {"architecture": family.NAME}
    two = {"shared_experts": [{"source_model": str(base)}] * 2}
    assert errors(hidden(base, **keys, **two), tmp_path) == {"too-many-shared-experts"}
    plain, prompted = hidden(base, **keys, **shared(base)), hidden(base, **keys, **shared(base, **PROMPTS))
    if family.SHARED == GATED_SHARED:
        assert errors(plain, tmp_path) == {"shared-prompts-missing"}
        plan = planned(prompted, tmp_path)
        assert len(plan.gated) == 4
    elif family.SHARED == PLAIN_SHARED:
        assert errors(prompted, tmp_path) == {"shared-prompts-not-taken"}
        plan = planned(plain, tmp_path)
        assert len(plan.gated) == 3
    else:
        assert errors(plain, tmp_path) == errors(prompted, tmp_path) == {"too-many-shared-experts"}
        return
    assert "shared-at-full-strength" in found(plan)
    assert len(plan.shared_experts) == 1


@pytest.mark.parametrize("family", [x for x in RUNNABLE if x.SHARED == PLAIN_SHARED], ids=lambda family: family.NAME)
def test_a_shared_expert_without_a_gate_is_added_in_full(family: Family, tmp_path: Path) -> None:
    """Routed experts that give nothing, and the base itself as the shared one: the base."""
    base = small(tmp_path / "base", family.ACCEPTS[0])
    text = recipe_of(base, [SILENT] * 2, dtype="float32", architecture=family.NAME, **shared(base))
    merged(text, tmp_path, tmp_path / "out")
    assert difference(base, tmp_path / "out") < 1e-4


def test_a_gated_shared_expert_is_weighed_by_its_own_row_of_the_gates(tmp_path: Path) -> None:
    """Its gate is zeros here, so a token gets half of it: twice its output and no other is the base."""
    base = small(tmp_path / "base", "qwen2")
    plan = planned(recipe_of(base, [SILENT] * 2, dtype="float32", **shared(base, residual_scale=2.0)), tmp_path)
    gate = torch.cat([torch.ones(2, 64), torch.zeros(1, 64)])
    evaluator = Evaluator(open_files(plan.sources), {0: gate, 1: gate})
    write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="test")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(weights["model.layers.1.mlp.gate.weight"], gate[:2])
    assert torch.equal(weights["model.layers.1.mlp.shared_expert_gate.weight"], gate[2:])
    assert difference(base, tmp_path / "out") < 1e-4


def test_without_a_shared_expert_qwen2_moe_gets_a_small_one_of_zeros(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen2")
    plan = planned(recipe_text(base, [base, base]), tmp_path)
    zeros = {tensor.name: tensor.expr for tensor in plan.tensors if "shared_expert" in tensor.name}
    assert len(zeros) == 2 * 4
    # The gate may be anything but zeros, for which llama.cpp would divide by zero.
    assert all(isinstance(x, Gate if "gate.weight" in name else Zeros) for name, x in zeros.items())
    assert zeros["model.layers.0.mlp.shared_expert.down_proj.weight"].shape == (64, ZERO_SIZE)


def test_deepseeks_config_names_its_code_and_its_tensors_are_named_as_on_the_hub(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "llama")
    plan = planned(hidden(base, **shared(base, residual_scale=0.1)), tmp_path)
    assert plan.config["auto_map"]["AutoModelForCausalLM"].startswith("deepseek-ai/deepseek-moe-16b-base--modeling")
    assert (plan.config["n_routed_experts"], plan.config["n_shared_experts"]) == (3, 1)
    layer = {t.name.removeprefix("model.layers.1.mlp.") for t in plan.tensors if ".layers.1.mlp." in t.name}
    parts = ("gate_proj", "up_proj", "down_proj")
    expected = {f"experts.{index}.{part}.weight" for index in range(3) for part in parts}
    assert layer == expected | {f"shared_experts.{part}.weight" for part in parts} | {"gate.weight"}
    alone = planned(recipe_text(base, [base, base], architecture="deepseek"), tmp_path)
    assert alone.config["n_shared_experts"] is None
    assert not any("shared" in tensor.name for tensor in alone.tensors)


# ---------------------------------------------------------------------------------------- weights, windows, files, experts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
def test_a_family_that_does_not_scale_its_weights_says_so_unless_all_experts_are_chosen(
    family: Family, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", family.ACCEPTS[0])
    some = planned(recipe_text(base, [base] * 3, architecture=family.NAME), tmp_path)
    every = planned(recipe_text(base, [base] * 3, architecture=family.NAME, experts_per_token=3), tmp_path)
    assert ("weights-not-normalised" in found(some)) != family.NORMALISES
    assert "weights-not-normalised" not in found(every)
    assert some.config.get("norm_topk_prob", family.NORMALISES) is family.NORMALISES


def test_the_finding_names_a_family_that_scales_and_holds_all_of_the_base(tmp_path: Path) -> None:
    for model_type, changes, hint in (
        ("qwen2", {}, "architecture 'granitemoe'"),
        ("llama", {}, "architecture 'mixtral'"),
        ("llama", {"attention_bias": True}, "architecture 'granitemoe'"),
    ):
        base = small(tmp_path / f"{model_type}{len(changes)}", model_type, **changes)
        asked = "deepseek" if model_type == "llama" else "qwen2_moe"
        plan = planned(recipe_text(base, [base] * 3, architecture=asked), tmp_path)
        (said,) = [finding.text for finding in plan.findings if finding.id == "weights-not-normalised"]
        assert hint in said


def test_no_family_is_named_that_could_not_have_the_shared_expert(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "llama")
    plan = planned(recipe_text(base, [base] * 3, **shared(base, residual_scale=0.1)), tmp_path)
    (said,) = [finding.text for finding in plan.findings if finding.id == "weights-not-normalised"]
    assert said.endswith("set experts_per_token to 3")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.NAME)
def test_every_family_has_a_preview(family: Family, tmp_path: Path) -> None:
    base = small(tmp_path / "base", family.ACCEPTS[0])
    with_shared = shared(base, residual_scale=0.1) if family.SHARED == PLAIN_SHARED else {}
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(base, [base] * 2, architecture=family.NAME, **with_shared))
    preview = preview_recipe(path)
    assert preview.plan is not None
    assert preview.gguf_bytes is not None
    assert preview.gguf_bytes.keys() == set(preview.plan.quants)
    text = preview.to_text()
    assert f"{family.TITLE} (the recipe says so), 2 experts, 2 per token" in text
    assert (", 1 shared" in text) == bool(with_shared)
    path.write_text(recipe_text(base, [base] * 2))
    assert f" (the base is a {family.ACCEPTS[0]} model), 2 experts" in preview_recipe(path).to_text()


def test_a_window_that_is_lost_is_said_only_where_the_context_goes_beyond_it(tmp_path: Path) -> None:
    for context, said in ((256, True), (64, False)):
        base = small(tmp_path / str(context), "mistral", sliding_window=64, max_position_embeddings=context)
        plan = planned(recipe_text(base, [base, base], architecture="granitemoe"), tmp_path)
        assert ("window-lost" in found(plan)) == said


def test_another_vocabulary_is_no_hindrance_and_said(tmp_path: Path) -> None:
    base, other = small(tmp_path / "base", "qwen3"), small(tmp_path / "other", "qwen3", vocab_size=600)
    plan = merged(recipe_text(base, [base, other], dtype="float32"), tmp_path, tmp_path / "out")
    assert "other-vocabulary" in found(plan, "notice")
    assert logits(tmp_path / "out").shape[-1] == 512
    # All of the base is used; of an expert nothing but its MLPs: embedding, final norm, head; 4 + 2 + 2 tensors a layer.
    assert plan.unused[plan.base] == ()
    unused = plan.unused[plan.experts[1]]
    assert len(unused) == 3 + 2 * 8
    assert not any(".mlp." in name for name in unused)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types is not a list"),
        ({"layer_types": [{}, {}]}, "layer_types is not a list"),
        ({"max_window_layers": -1}, "max_window_layers is -1"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ from layer to layer"),
    ],
)
def test_windows_and_ropes_that_cannot_be_are_findings(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    whole = json.loads((base / "config.json").read_text())
    del whole["layer_types"]
    (base / "config.json").write_text(json.dumps(whole | config))
    with pytest.raises(RecipeError, match=problem):
        planned(recipe_text(base, [base, base]), tmp_path)


# ------------------------------------------------------------------------------------------- expressions and calibration


@given(st.data())
def test_any_slice_of_joined_tensors_is_that_of_the_whole(data: st.DataObject) -> None:
    def x(rows: int) -> Expr:
        gate = Gate(0, "F32", (rows, 3), first=data.draw(st.integers(0, 4)))
        return Zeros("F32", (rows, 3)) if data.draw(st.booleans()) else gate

    size = data.draw(st.integers(1, 3))
    pairs = [Concat((x(size), x(size + 1))) for _ in range(data.draw(st.integers(1, 3)))]
    expr = Stack(tuple(pairs))
    evaluator = Evaluator({}, {0: torch.arange(1.0, 25.0).view(8, 3)})
    whole = torch.stack([torch.cat([evaluator.tensor(part) for part in pair.xs]) for pair in pairs])
    assert torch.equal(evaluator.tensor(expr), whole)
    start = data.draw(st.integers(0, elements(expr) - 1))
    stop = data.draw(st.integers(start + 1, elements(expr)))
    assert torch.equal(evaluator.flat(expr, start, stop), whole.reshape(-1)[start:stop])
    assert sum(elements(piece) for piece in pieces(expr)) == elements(expr)


def test_fused_experts_are_copied_from_their_sources_piece_by_piece(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "granite")
    plan = planned(recipe_text(base, [base, base], dtype="float32"), tmp_path)
    fused = [tensor.expr for tensor in plan.tensors if "_linear" in tensor.name]
    assert len(fused) == 2 * 2
    assert all(isinstance(piece, Read) for x in fused for piece in pieces(x))


@pytest.mark.parametrize("model_type", ["llama", *NEEDS, "mistral", "qwen2", "olmo2"])
def test_gates_are_calibrated_on_the_hidden_states_that_transformers_has(model_type: str, tmp_path: Path) -> None:
    base = small(tmp_path / "base", model_type)
    plan = planned(recipe_text(base, [base, base], dtype="float32"), tmp_path)
    source = plan.sources[plan.base]
    streamed = StreamedModel(
        source.config, plan.dense_tensors, Evaluator(open_files({plan.base: source})), device="cpu"
    )
    assert not streamed.unused
    ids = torch.randint(1, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    run = streamed.start([Batch(ids, mask)])
    mine = [run.hidden[0].clone()]
    for layer in streamed.layers():
        layer.advance(run)
        mine.append(run.hidden[0].clone())
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = model(ids, attention_mask=mask, output_hidden_states=True)
    for x, y in zip(mine[:-1], theirs.hidden_states, strict=False):
        assert torch.allclose(x[mask == 1], y[mask == 1], atol=1e-5)
    found_logits = torch.cat([piece.values for piece in streamed.logits(run)], dim=1)
    assert torch.allclose(found_logits[mask == 1], theirs.logits[mask == 1], atol=1e-4)


@pytest.mark.parametrize("family", RUNNABLE, ids=lambda family: family.NAME)
def test_the_merged_model_can_be_streamed_too(family: Family, tmp_path: Path) -> None:
    """Measures and importance matrices run the result itself, before or after it is written."""
    base = small(tmp_path / "base", family.ACCEPTS[0])
    plan = planned(recipe_for(family, base), tmp_path)
    gates = {layer: torch.zeros(len(plan.gated), 64) for layer in range(2)}
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    streamed = StreamedModel(plan.config, tensors, Evaluator(open_files(plan.sources), gates), device="cpu")
    assert not streamed.unused
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    run = streamed.advance(streamed.start([Batch(ids)]))
    mine = torch.cat([piece.values for piece in streamed.logits(run)], dim=1)
    assert torch.allclose(mine, logits(base), atol=1e-4)


def test_one_expert_is_not_enough_where_the_best_two_of_a_group_are_looked_at(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "youtu")
    assert errors(recipe_text(base, [base], experts_per_token=1), tmp_path) == {"out-of-range"}
    assert "e_score_correction_bias" in repr(planned(recipe_text(base, [base] * 2), tmp_path).tensors)


def test_experts_chosen_in_groups_get_no_others(tmp_path: Path) -> None:
    base = small(tmp_path / "base", "youtu")
    merged(recipe_text(base, [base] * 4, dtype="float32"), tmp_path, tmp_path / "mixture")
    config = json.loads((tmp_path / "mixture/config.json").read_text())
    (tmp_path / "mixture/config.json").write_text(json.dumps(config | {"n_group": 2}))
    with pytest.raises(RecipeError, match="chosen in groups"):
        planned(recipe_text(tmp_path / "mixture", [base]), tmp_path)
