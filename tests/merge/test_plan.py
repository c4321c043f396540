"""The plan: counted from headers or configs alone, every tensor accounted for, refused where a merge would go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.checkpoint import open_folder
from merge.errors import RecipeError, SourceError
from merge.expr import Cast, Noise, Read, Scale
from merge.families.dense import dense_model
from merge.families.model_types import MODEL_TYPES
from tests.dense import planned, recipe_text, save_dense

MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
}  # fmt: skip


def config_only(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MISTRAL | changes))
    return folder


def ids(error: pytest.ExceptionInfo[RecipeError]) -> list[str]:
    return [finding.id for finding in error.value.findings if finding.level == "error"]


def test_mixtral_8x7b_has_46_7_billion_parameters_of_which_12_9_are_active(tmp_path: Path) -> None:
    base = config_only(tmp_path / "base")
    plan = planned(recipe_text(base, [base] * 8), tmp_path)
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1: 46.7B
    assert plan.parameters.total == 46_702_792_704
    assert plan.parameters.active == 12_879_925_248
    assert plan.checkpoint_bytes == 2 * plan.parameters.total


def test_a_dense_model_s_config_lists_the_tensors_of_its_checkpoint(tmp_path: Path) -> None:
    for tied in (True, False):
        for bias in (True, False):
            folder = save_dense(tmp_path / f"{tied}{bias}", tie_word_embeddings=tied, attention_bias=bias, head_dim=24)
            checkpoint = open_folder(folder)
            found = {name: info.shape for name, info in (checkpoint.tensors or {}).items()}
            assert dict(dense_model(checkpoint.config).tensors()) == found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_absent_from_config_json_means_what_transformers_makes_of_it(model_type: str) -> None:
    defaults = MODEL_TYPES[model_type].defaults
    # A window that is not in use is hidden, so it is switched on.
    switch = {"use_sliding_window": True} if "use_sliding_window" in defaults else {}
    theirs = CONFIG_MAPPING[model_type](**switch).to_dict()
    for key, value in defaults.items():
        if key in switch:
            assert value is False
        elif key == "head_dim" and value is None:  # worked out from the hidden size
            assert theirs.get(key) in (None, theirs["hidden_size"] // theirs["num_attention_heads"])
        elif key == "num_key_value_heads" and value is None:  # as many as query heads
            assert theirs[key] == theirs["num_attention_heads"]
        elif key == "rope_scaling":
            assert {"rope_theta": defaults["rope_theta"], **value} == theirs["rope_parameters"]
        elif key == "rope_theta":
            assert theirs["rope_parameters"]["rope_theta"] == value
        elif key in theirs:
            assert theirs[key] == value, key
        else:  # a key that the class does not have can only be off
            assert value in (None, False), key


def test_headers_and_config_give_the_same_counts(tmp_path: Path) -> None:
    whole = save_dense(tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((whole / "config.json").read_text())
    with_headers = planned(recipe_text(whole, [whole, whole]), tmp_path)
    from_config = planned(recipe_text(bare, [bare, bare]), tmp_path)
    assert with_headers.parameters == from_config.parameters
    assert [(t.name, t.expr.shape) for t in with_headers.tensors] == [
        (t.name, t.expr.shape) for t in from_config.tensors
    ]
    assert "headers-missing" in [finding.id for finding in from_config.findings]


def test_a_tensor_that_needs_nothing_done_is_a_bare_read(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    plan = planned(recipe_text(base, [base, base], dtype="bfloat16"), tmp_path)
    gates = [t for t in plan.tensors if t.name.endswith("gate.weight")]
    assert len(gates) == 3
    assert all(isinstance(t.expr, Read) for t in plan.tensors if t not in gates)


def test_scale_noise_and_dtype_are_nodes_of_the_experts_that_ask_for_them(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    experts = [{"source_model": str(base), "noise_scale": 1e-3, "residual_scale": 0.5}, {"source_model": str(base)}]
    plan = planned(
        recipe_text(base, [], dtype="float16").replace("experts: []", f"experts: {json.dumps(experts)}"), tmp_path
    )
    by_name = {t.name: t.expr for t in plan.tensors}
    prefix = "model.layers.0.block_sparse_moe.experts"
    down, up = by_name[f"{prefix}.0.w2.weight"], by_name[f"{prefix}.0.w3.weight"]
    assert isinstance(down, Cast)
    assert isinstance(down.x, Scale)
    assert isinstance(down.x.x, Noise)
    assert isinstance(up, Cast)
    assert isinstance(up.x, Noise)
    plain = by_name[f"{prefix}.1.w2.weight"]
    assert isinstance(plain, Cast)
    assert isinstance(plain.x, Read)
    seeds = {t.expr.x.seed for t in plan.tensors if isinstance(t.expr, Cast) and isinstance(t.expr.x, Noise)}
    assert len(seeds) == 2 * 3  # two noisy matrices a layer that are not scaled, each with its own seed


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"hidden_size": 32}, "shape-mismatch"),
        ({"intermediate_size": 64}, "shape-mismatch"),
        ({"num_hidden_layers": 2}, "shape-mismatch"),
        ({"hidden_act": "gelu"}, "activation-mismatch"),
    ],
)
def test_an_expert_of_another_shape_is_refused_from_its_headers(
    tmp_path: Path, change: dict[str, Any], finding: str
) -> None:
    base, other = save_dense(tmp_path / "base"), save_dense(tmp_path / "other", **change)
    with pytest.raises(RecipeError) as error:
        planned(recipe_text(base, [base, other]), tmp_path)
    assert ids(error) == [finding]
    assert error.value.findings[-1].line == 5


@pytest.mark.parametrize("name", ["weight", "foo.gate_proj.weight", "model.layers.99.mlp.up_proj.weight"])
def test_a_tensor_that_such_a_model_does_not_have_is_refused_by_name(name: str, tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    save_file(load_file(base / "model.safetensors") | {name: torch.ones(2)}, base / "model.safetensors")
    with pytest.raises(RecipeError) as error:
        planned(recipe_text(base, [base, base]), tmp_path)
    assert ids(error) == ["tensor-without-place"]
    assert any(name in finding.text for finding in error.value.findings)


def test_an_expert_with_another_rope_or_vocabulary_is_no_error(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    other = save_dense(tmp_path / "other", vocab_size=600, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    plan = planned(recipe_text(base, [base, other]), tmp_path)
    warnings = {finding.id for finding in plan.findings if finding.level == "warning"}
    assert warnings == {"rope-mismatch", "all-experts-per-token"}


def test_one_model_many_times_is_a_warning_because_upcycling_wants_it(tmp_path: Path) -> None:
    base = config_only(tmp_path / "base")
    plan = planned(recipe_text(base, [base] * 8), tmp_path)
    assert [finding.id for finding in plan.findings if finding.level == "warning"].count("all-experts-same") == 1


SECOND = {"residual_scale": 0.5}


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ([{}, {}, {}], [(1, 3)]),
        ([{}, {}, {"residual_scale": 1.0}], [(1, 3)]),
        ([SECOND, {}, SECOND], [(1, 3)]),
        ([SECOND, {}, {}], []),
        ([{}, {}, {"noise_scale": 0.001}], []),
        ([{"noise_scale": 0.001}, {}, {"noise_scale": 0.001}], []),  # each has noise of its own
    ],
)
def test_two_experts_that_would_be_equal_are_named_and_those_made_to_differ_are_not(
    settings: list[dict[str, float]], pairs: list[tuple[int, int]], tmp_path: Path
) -> None:
    one, other = config_only(tmp_path / "one"), config_only(tmp_path / "other")
    experts = [{"source_model": str(model), **keys} for model, keys in zip((one, other, one), settings, strict=True)]
    plan = planned(json.dumps({"base_model": str(one), "gate_mode": "random", "experts": experts}), tmp_path)
    found = [finding.holes for finding in plan.findings if finding.id == "same-expert-twice"]
    assert [(holes["first"], holes["second"]) for holes in found] == pairs
    assert all(holes["model"] == str(one) for holes in found)
    assert "all-experts-same" not in [finding.id for finding in plan.findings]


def test_where_all_experts_are_the_same_no_pair_of_them_is_named(tmp_path: Path) -> None:
    base = config_only(tmp_path / "base")
    plan = planned(recipe_text(base, [base] * 8), tmp_path)
    assert "same-expert-twice" not in [finding.id for finding in plan.findings]


def test_a_bias_that_the_result_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base", attention_bias=True)
    with pytest.raises(RecipeError, match=r"self_attn\.k_proj\.bias") as error:
        planned(recipe_text(base, [base, base]), tmp_path)
    assert ids(error) == ["tensor-without-place"]


def test_a_tensor_that_no_architecture_names_is_refused_by_name(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.layers.0.extra.weight": torch.ones(2)}, base / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.extra\.weight"):
        planned(recipe_text(base, [base, base]), tmp_path)


def test_rope_frequencies_of_old_checkpoints_are_not_missed(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, base / "model.safetensors")
    plan = planned(recipe_text(base, [base, base]), tmp_path)
    assert not any("inv_freq" in tensor.name for tensor in plan.tensors)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(RecipeError, match=r"lacks tensor 'model\.norm\.weight'") as error:
        planned(recipe_text(base, [base, base]), tmp_path)
    assert set(ids(error)) == {"missing-tensor", "wrong-tensor-shape"}


def test_custom_code_and_pickle_only_models_are_refused(tmp_path: Path) -> None:
    code = config_only(tmp_path / "code", auto_map={"AutoModel": "modeling.Evil"})
    pickle = config_only(tmp_path / "pickle")
    (pickle / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(RecipeError) as error:
        planned(recipe_text(code, [pickle, pickle]), tmp_path)
    assert set(ids(error)) == {"custom-code", "pickle-only"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -4}, "cannot be a size"),
        ({"hidden_size": 10**12}, "cannot be a size"),
        ({"num_hidden_layers": 10**6}, "more than any model has"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"vocab_size": "many"}, "cannot be a size"),
        ({"rms_norm_eps": "x"}, "not a positive number"),
        ({"tie_word_embeddings": 1}, "not true or false"),
        ({"rope_scaling": [1]}, "not a mapping"),
        ({"eos_token_id": "</s>"}, "not a token"),
        ({"sliding_window": -1}, "sliding_window is -1"),
    ],
)
def test_a_config_that_cannot_be_is_a_finding(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    base = config_only(tmp_path / "base", **change)
    with pytest.raises(RecipeError, match=problem) as error:
        planned(recipe_text(base, [base, base]), tmp_path)
    assert ids(error) == ["bad-config"]


def test_a_model_of_another_kind_is_refused_with_what_the_family_takes(tmp_path: Path) -> None:
    base = config_only(tmp_path / "base", model_type="gpt2")
    with pytest.raises(RecipeError, match="is a 'gpt2' model; the Mixtral family takes llama and mistral"):
        planned(recipe_text(base, [base, base]), tmp_path)


def test_an_unknown_architecture_is_answered_with_the_nearest(tmp_path: Path) -> None:
    base = config_only(tmp_path / "base")
    with pytest.raises(RecipeError, match="perhaps you meant 'mixtral'"):
        planned(recipe_text(base, [base, base], architecture="mixtrall"), tmp_path)


def test_the_sliding_window_of_mistral_is_kept(tmp_path: Path) -> None:
    # mergekit-moe writes null here, whatever the base has.
    for config, window in (({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 128}, 128)):
        base = config_only(tmp_path / str(window), **config)
        assert planned(recipe_text(base, [base, base]), tmp_path).config["sliding_window"] == window


@pytest.mark.parametrize("damage", ["truncated", "no header", "huge header", "overlap", "bad json", "bad dtype", "shard gone",
                                    "path in index"])  # fmt: skip
def test_a_damaged_or_hostile_checkpoint_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    folder = save_dense(tmp_path / "base")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(raw[:-10])
    elif damage == "no header":
        file.write_bytes(b"abc")
    elif damage == "huge header":
        file.write_bytes((2**60).to_bytes(8, "little") + raw[8:])
    elif damage == "bad json":
        file.write_bytes(raw[:8] + b"[" + raw[9:])
    elif damage in ("overlap", "bad dtype"):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        entry = header["model.norm.weight"]
        if damage == "overlap":
            entry["data_offsets"] = [0, 128]
        else:
            entry["dtype"] = "F4"
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :] + b"\0" * 64)
    else:
        name = "gone.safetensors" if damage == "shard gone" else "../../etc/x.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError) as error:
        open_folder(folder)
    assert str(folder) in str(error.value)
