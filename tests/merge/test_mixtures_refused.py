"""Mixtures as sources: what one cannot give, and what stands for what its config leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.errors import RecipeError
from merge.families import FAMILIES
from merge.families.family import Family
from merge.families.mixture import moe_model
from merge.families.model_types import MODEL_TYPES
from tests.dense import planned
from tests.merge.mixtures import RUN, dense_models, mixture, recipe, weights
from tests.merge.test_families import small


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    by_name = {family.NAME: family for family in FAMILIES}
    found = {"llama": small(folder / "llama", "llama"), "qwen2": small(folder / "qwen2", "qwen2")}
    found["mixtral"] = mixture(by_name["mixtral"], [found["llama"]] * 3, folder, "mixtral")
    found["qwen2_moe"] = mixture(by_name["qwen2_moe"], [found["qwen2"]] * 3, folder, "qwen2_moe")
    found["granitemoe"] = mixture(by_name["granitemoe"], [found["qwen2"]] * 3, folder, "granitemoe")
    found["deepseek"] = mixture(by_name["deepseek"], [found["llama"]] * 3, folder, "deepseek")
    return found


def with_config(folder: Path, out: Path, **changes: Any) -> Path:
    """The same checkpoint with another config."""
    out.mkdir()
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return out


@pytest.mark.parametrize(
    ("base", "expert", "keys", "finding", "said"),
    [
        ("llama", {"source_model": "mixtral"}, {}, "expert-not-chosen", "3 experts; say which is meant with expert: 0 to expert: 2"),
        ("mixtral", {"source_model": "mixtral"}, {}, "expert-not-chosen", "3 experts"),
        ("llama", {"source_model": "mixtral", "expert": 3}, {}, "no-such-expert", "has 3 experts, numbered from 0 to 2"),
        ("llama", {"source_model": "llama", "expert": 0}, {}, "expert-of-dense-model", "with no expert 0"),
        ("llama", {"source_model": "qwen2_moe", "expert": 0}, {}, "other-family", "is a Qwen2-MoE model, the result a Mixtral"),
        ("mixtral", {"source_model": "llama"}, {"architecture": "qwen2_moe"}, "other-family", "added to it only as what it is"),
        ("mixtral", {"source_model": "qwen2"}, {}, "unsupported-model", "takes llama and mistral"),
        ("qwen2_moe", {"source_model": "qwen2"}, {"shared_experts": [{"source_model": "qwen2"}]}, "shared-expert-kept", "kept"),
        ("deepseek", {"source_model": "llama", "positive_prompts": ["x"]}, {"gate_mode": "hidden"}, "gate-mode-impossible", "runs the base"),
        ("llama", {"source_model": "llama", "positive_prompts": ["x"]}, {"gate_mode": "discriminant", "architecture": "deepseek", "experts_per_token": 1},
         "gate-mode-impossible", "runs the merged model"),
        ("llama", {"source_model": "mixtral+llama", "expert": 0}, {}, "adapter-unusable", "is a mixture of experts"),
    ],
)  # fmt: skip
def test_what_a_mixture_cannot_give_is_said_at_its_line(
    base: str,
    expert: dict[str, Any],
    keys: dict[str, Any],
    finding: str,
    said: str,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    def resolved(entry: dict[str, Any]) -> dict[str, Any]:
        names = entry["source_model"].split("+")
        return entry | {"source_model": "+".join(str(models[name]) for name in names)}

    if "+" in expert["source_model"]:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
        save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
        models = models | {"llama": adapter, "base": models["llama"]}
    keys = {key: [resolved(x) for x in value] if key == "shared_experts" else value for key, value in keys.items()}
    start = models.get("base", models[base]) if base == "llama" else models[base]
    text = json.dumps({"base_model": str(start), "gate_mode": "random"} | keys | {"experts_per_token": 1})
    text = text.removesuffix("}") + ',\n"experts": [\n' + json.dumps(resolved(expert)) + "]}"
    with pytest.raises(RecipeError) as error:
        planned(text, tmp_path)
    (found,) = [x for x in error.value.findings if x.level == "error"]
    assert found.id == finding
    assert said in found.text
    assert found.line == (
        1 if finding in ("other-family", "shared-expert-kept", "gate-mode-impossible") and keys else 3
    )


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}, "layer 0"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "layer 1"),
        ("deepseek", {"first_k_dense_replace": 1}, "layer 0"),
        ("deepseek", {"first_k_dense_replace": 2}, "2 of its layers (layer 0 first)"),
    ],
)
def test_a_mixture_whose_layers_are_partly_dense_is_refused(
    family: str, changes: dict[str, Any], layers: str, models: dict[str, Path], tmp_path: Path
) -> None:
    other, dense = with_config(models[family], tmp_path / "other", **changes), "qwen2" if "qwen" in family else "llama"
    for base, expert in (
        (models[dense], {"source_model": str(other), "expert": 0}),
        (other, {"source_model": str(models[dense])}),
    ):
        with pytest.raises(RecipeError) as error:
            planned(recipe(base, [expert] * 2, architecture=family), tmp_path)
        (found,) = [x for x in error.value.findings if x.level == "error"]
        assert found.id == "layers-without-experts"
        assert f"has no experts in {layers}, but" in found.text


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
        ("mixtral", {"num_local_experts": -1}, "not a number of them"),
        ("mixtral", {"num_local_experts": "8"}, "not a number of them"),
        ("mixtral", {"num_local_experts": 10**6}, "which cannot be"),
        ("mixtral", {"num_experts_per_tok": 4}, "3 experts, 4 of them for a token"),
        ("mixtral", {"num_experts_per_tok": [1, 2]}, "not a number of them"),
        ("qwen2_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "every how many layers"),
        ("qwen2_moe", {"mlp_only_layers": 3}, "not a list of layers"),
        ("qwen2_moe", {"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_mixture_s_config_that_cannot_be_is_a_finding(
    family: str, changes: dict[str, Any], problem: str, models: dict[str, Path], tmp_path: Path
) -> None:
    other = with_config(models[family], tmp_path / "other", **changes)
    with pytest.raises(RecipeError, match=problem) as error:
        planned(recipe(other, [{"source_model": str(models["llama" if family == "mixtral" else "qwen2"])}]), tmp_path)
    assert [x.id for x in error.value.findings if x.level == "error"] == ["bad-config"]


def test_tensors_that_a_mixture_lacks_or_has_too_many_of_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    found = weights(models["mixtral"])
    del found["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    found["model.layers.0.block_sparse_moe.experts.1.w1.bias"] = torch.zeros(96)
    other = with_config(models["mixtral"], tmp_path / "other")
    (other / "model.safetensors").unlink()
    save_file(found, other / "model.safetensors")
    # Expert 1 is whole, and what is asked for is expert 1; the bias is in no family.
    for base, expert, said in (
        (models["llama"], {"source_model": str(other), "expert": 1}, r"experts\.1\.w1\.bias"),
        (
            models["llama"],
            {"source_model": str(other), "expert": 2},
            r"lacks tensor 'model\.layers\.1\..*experts\.2\.w3",
        ),
        (other, {"source_model": str(models["llama"])}, r"lacks tensor 'model\.layers\.1\..*experts\.2\.w3"),
    ):
        with pytest.raises(RecipeError, match=said):
            planned(recipe(base, [expert] * 2), tmp_path)


def test_readers_that_weigh_otherwise_are_warned_of(models: dict[str, Path], tmp_path: Path) -> None:
    for value, warned in ((True, True), (False, False)):
        base = with_config(models["qwen2_moe"], tmp_path / str(value), norm_topk_prob=value)
        plan = planned(recipe(base, [{"source_model": str(models["qwen2"])}]), tmp_path)
        assert ("readers-disagree" in {x.id for x in plan.findings}) == warned
        assert plan.config["norm_topk_prob"] is value
        every = planned(recipe(base, [{"source_model": str(models["qwen2"])}], experts_per_token=4), tmp_path)
        assert "readers-disagree" not in {x.id for x in every.findings}


def test_a_family_whose_gguf_says_how_weights_are_scaled_has_no_disagreement(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.NAME == "deepseek_v3")
    made = mixture(family, dense_models(family, tmp_path), tmp_path)
    base = with_config(made, tmp_path / "off", norm_topk_prob=False)
    plan = planned(recipe(base, [{"source_model": str(made), "expert": 1}]), tmp_path)
    assert "readers-disagree" not in {x.id for x in plan.findings}


def test_experts_per_token_are_the_base_s_where_the_recipe_says_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    base = with_config(models["mixtral"], tmp_path / "base", num_experts_per_tok=1)
    said = json.loads(recipe(base, [{"source_model": str(models["llama"])}]))
    assert planned(json.dumps(said), tmp_path).config["num_experts_per_tok"] == 2
    del said["experts_per_token"]
    plan = planned(json.dumps(said), tmp_path)
    assert (plan.experts_per_token, plan.config["num_experts_per_tok"]) == (1, 1)


def test_a_mixture_without_weights_is_previewed_from_its_config(models: dict[str, Path], tmp_path: Path) -> None:
    whole = planned(recipe(models["mixtral"], [{"source_model": str(models["mixtral"]), "expert": 1}]), tmp_path)
    bare = with_config(models["mixtral"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    plan = planned(recipe(bare, [{"source_model": str(bare), "expert": 1}]), tmp_path)
    assert plan.parameters == whole.parameters
    assert [(x.name, x.expr.shape) for x in plan.tensors] == [(x.name, x.expr.shape) for x in whole.tensors]


@RUN
def test_a_key_absent_from_a_mixture_s_config_means_what_transformers_makes_of_it(family: Family) -> None:
    theirs = CONFIG_MAPPING[family.NAME]().to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    counts = {"num_experts": 4, "num_experts_per_tok": 2}
    needed = {key: theirs[key] for key in (*sizes, family.KEYS.expert_size)}
    mine = moe_model(needed | counts | {"moe_num_shared_experts": 0}, family).dense
    assert mine.kv_heads == theirs["num_key_value_heads"]
    assert mine.rope_theta == theirs["rope_parameters"]["rope_theta"]
    assert mine.tied == theirs["tie_word_embeddings"]
    assert mine.hidden_act == theirs["hidden_act"]
    assert mine.max_position_embeddings == theirs["max_position_embeddings"]
    assert mine.norm_eps == theirs[MODEL_TYPES[family.KEYS.dense].eps_key]
    assert mine.head_dim == (theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"])
