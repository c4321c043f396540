"""LoRA experts: `model+adapter` gives what merging the adapter first would give, and what cannot be applied is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.checkpoint import ADAPTER, open_folder
from merge.errors import RecipeError, SourceError
from merge.evaluate import Evaluator, open_files
from merge.expr import LowRank, reads
from merge.plan import MergePlan
from merge.reference import ModelReference, parse_reference
from tests.dense import SIZES, planned, recipe_text, save_dense
from tests.merge.test_writer import PARTS, merged

SHAPES = {
    "mlp.gate_proj": (SIZES["intermediate_size"], SIZES["hidden_size"]),
    "mlp.up_proj": (SIZES["intermediate_size"], SIZES["hidden_size"]),
    "mlp.down_proj": (SIZES["hidden_size"], SIZES["intermediate_size"]),
    "self_attn.q_proj": (SIZES["hidden_size"], SIZES["hidden_size"]),
    "self_attn.v_proj": (SIZES["hidden_size"] // 2, SIZES["hidden_size"]),
}
MLP = tuple(name for name in SHAPES if name.startswith("mlp."))


def save_adapter(
    folder: Path,
    *,
    modules: tuple[str, ...] = MLP,
    layers: int = 3,
    r: int = 4,
    dtype: torch.dtype = torch.float32,
    ranks: dict[str, int] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    pickled: bool = False,
    **config: Any,
) -> Path:
    """An adapter with random matrices, named as PEFT names them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = dict(extra or {})
    for layer in range(layers):
        for module in modules:
            rows, columns = SHAPES[module]
            rank = (ranks or {}).get(f"{layer}.{module}", r)
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = (0.1 * torch.randn(rank, columns, generator=generator)).to(dtype)
            tensors[f"{name}.lora_B.weight"] = (0.1 * torch.randn(rows, rank, generator=generator)).to(dtype)
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    value = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "bias": "none", "target_modules": [*modules]} | config
    (folder / "adapter_config.json").write_text(json.dumps(value))
    return folder


def expected(model: Path, adapter: Path, scales: dict[str, float] | float) -> dict[str, torch.Tensor]:
    """The model's weights with the adapter merged into them, as a user would do it by hand."""
    weights = load_file(model / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in lora:
        if name.endswith(".lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            module = target.removeprefix("model.layers.").removesuffix(".weight")
            scale = scales if isinstance(scales, float) else scales[module]
            delta = lora[name.replace("lora_A", "lora_B")].float() @ lora[name].float()
            weights[target] = (weights[target].float() + scale * delta).to(weights[target].dtype)
    return weights


def expert_of(folder: Path, expert: int, layer: int) -> dict[str, torch.Tensor]:
    result = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return {dense: result[f"{prefix}.{sparse}.weight"] for dense, sparse in PARTS.items()}


def assert_expert(folder: Path, expert: int, weights: dict[str, torch.Tensor]) -> None:
    for layer in range(3):
        for part, value in expert_of(folder, expert, layer).items():
            assert torch.equal(value, weights[f"model.layers.{layer}.mlp.{part}.weight"]), (layer, part)


def found(plan: MergePlan) -> dict[str, str]:
    return {finding.id: finding.text for finding in plan.findings}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_dense(tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------- references


def test_a_model_and_its_adapter_are_parsed_in_every_combination() -> None:
    for model in ("owner/name", "owner/name@v1", "./models/a", "/abs/a"):
        for adapter in ("owner/lora", "owner/lora@refs/pr/1", "./lora"):
            reference = parse_reference(f"{model}+{adapter}")
            assert reference.model == parse_reference(model)
            assert reference.adapter == parse_reference(adapter)
            assert reference.parts == (parse_reference(model), parse_reference(adapter))
            assert str(reference) == f"{model}+{adapter}"
    assert parse_reference("owner/name") == ModelReference("owner/name")


@pytest.mark.parametrize("text", ["owner/name+", "+owner/lora", "a/b+c/d+e/f", "a/b+lora", "a/b + c/d", "a/b++c/d"])
def test_what_is_not_one_model_and_one_adapter_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_reference(text)


# ---------------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapted_expert_is_the_model_with_the_adapter_merged(
    base: Path, tmp_path: Path, dtype: torch.dtype, pickled: bool
) -> None:
    adapter = save_adapter(tmp_path / "lora", dtype=dtype)
    weights = expected(base, adapter, 8 / 4)
    if pickled:
        adapter = save_adapter(tmp_path / "pickled", dtype=dtype, pickled=True)
    plan = merged(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path, tmp_path / "out")
    assert_expert(tmp_path / "out", 0, weights)
    assert_expert(tmp_path / "out", 1, load_file(base / "model.safetensors"))
    assert plan.experts == (str(adapter), str(base))
    assert set(plan.sources) == {str(adapter), str(base)}
    assert plan.unused[str(adapter)] == ()


def test_each_module_has_its_own_rank_and_alpha(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(
        tmp_path / "lora",
        ranks={"1.mlp.up_proj": 2} | {f"{n}.mlp.down_proj": 6 for n in range(3)},
        rank_pattern={"model.layers.1.mlp.up_proj": 2, "down_proj": 6},
        alpha_pattern={r"layers\.2\.mlp\..*": 3, "layers.0.mlp.gate_proj": 5},
    )
    scales = {}
    for layer in range(3):
        for module in MLP:
            rank = 6 if module == "mlp.down_proj" else 2 if (layer, module) == (1, "mlp.up_proj") else 4
            alpha = 3 if layer == 2 else 5 if (layer, module) == (0, "mlp.gate_proj") else 8
            scales[f"{layer}.{module}"] = alpha / rank
    merged(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path, tmp_path / "out")
    assert_expert(tmp_path / "out", 0, expected(base, adapter, scales))


def test_rank_stabilised_lora_divides_by_the_root_of_the_rank(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora", use_rslora=True)
    merged(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path, tmp_path / "out")
    assert_expert(tmp_path / "out", 0, expected(base, adapter, 8 / math.sqrt(4)))


def test_one_rounding_whatever_is_done_to_the_expert(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora")
    text = recipe_text(base, [f"{base}+{adapter}", base], dtype="float32")
    text = text.replace(f"+{adapter}", f"+{adapter}\n  residual_scale: 0.5", 1)
    merged(text, tmp_path, tmp_path / "out")
    dense, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = 0.5 * (dense[f"{name}.weight"].float() + 2.0 * (b @ a))
    assert torch.equal(expert_of(tmp_path / "out", 0, 1)["down_proj"], wanted)


def test_a_slice_of_an_adapted_matrix_has_the_bits_of_the_whole(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = save_dense(tmp_path / "base", hidden_size=64, intermediate_size=1000, num_hidden_layers=1)
    weights = {}
    for name, rows, columns in (("gate_proj", 1000, 64), ("up_proj", 1000, 64), ("down_proj", 64, 1000)):
        prefix = f"base_model.model.model.layers.0.mlp.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(16, columns, generator=generator)
        weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, 16, generator=generator)
    adapter = save_adapter(tmp_path / "lora", layers=0, r=16, extra=weights)
    plan = planned(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path)
    evaluator = Evaluator(open_files(plan.sources))
    adapted = [tensor.expr for tensor in plan.tensors if isinstance(tensor.expr, LowRank)]
    assert len(adapted) == 3
    for expr in adapted:
        whole = evaluator.tensor(expr)
        for step in (98, 9_998):
            assert torch.equal(torch.cat(list(evaluator.slices(expr, max_bytes=step * 64))), whole.reshape(-1))
        assert torch.equal(evaluator.rows(expr, 3, 61), whole[3:61])


def test_the_demos_experts_are_what_their_adapters_make(smollm2: Path, root: Path, tmp_path: Path) -> None:
    folder = smollm2 / "moerge-demo"
    base, names = folder / "SmolLM2-135M-Instruct", ("python", "french", "math")
    text = recipe_text(base, [f"{base}+{root}/demo/experts/{name}" for name in names], dtype="bfloat16")
    plan = planned(text, tmp_path)
    assert [finding.id for finding in plan.findings if finding.level != "notice"] == []
    evaluator = Evaluator(open_files(plan.sources))
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    for expert, name in enumerate(names):
        materialised = load_file(folder / f"SmolLM2-135M-{name}" / "model.safetensors")
        for layer in (0, 17, 29):
            for dense, sparse in PARTS.items():
                made = evaluator.tensor(
                    tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{sparse}.weight"]
                )
                wanted = materialised[f"model.layers.{layer}.mlp.{dense}.weight"]
                assert torch.equal(made.view(torch.uint8), wanted.view(torch.uint8)), (name, layer, dense)


# --------------------------------------------------------------------------------------------------------- what is counted


def test_an_adapters_bytes_are_counted_once_and_its_model_is_shared(base: Path, tmp_path: Path) -> None:
    other = save_dense(tmp_path / "other", seed=1)
    adapter = save_adapter(tmp_path / "lora")
    plan = planned(recipe_text(base, [f"{base}+{adapter}", f"{other}+{adapter}", other]), tmp_path)
    assert plan.needed_files[str(adapter)] == ("adapter_model.safetensors",)
    assert plan.needed_files[str(other)] == ("model.safetensors",)
    assert plan.experts == (str(adapter), str(adapter), str(other))
    assert plan.parameters == planned(recipe_text(base, [base, other, other]), tmp_path).parameters
    assert sum(isinstance(tensor.expr, LowRank) for tensor in plan.tensors) == 2 * 9
    sources = {read.source for tensor in plan.tensors for read in reads(tensor.expr)}
    assert sources == {str(base), str(other), str(adapter)}


def test_another_adapter_is_another_model(base: Path, tmp_path: Path) -> None:
    one, two = save_adapter(tmp_path / "one"), save_adapter(tmp_path / "two", lora_alpha=9)
    plans = [planned(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path) for adapter in (one, two)]
    assert plans[0].identity() != plans[1].identity()


# ----------------------------------------------------------------------------------------------------------- what is said


def test_deltas_outside_the_mlps_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(
        tmp_path / "lora",
        modules=(*MLP, "self_attn.q_proj", "self_attn.v_proj"),
        extra={
            "base_model.model.lm_head.weight": torch.ones(4, 4),
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4),
        },
        modules_to_save=["lm_head"],
    )
    plan = merged(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path, tmp_path / "out")
    said = found(plan)["adapter-partly-used"]
    assert "also changes embed_tokens, lm_head, q_proj, v_proj; only its 9 MLP matrices" in said
    mlp_only = save_adapter(tmp_path / "mlp")
    lora = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in lora.items() if ".mlp." in k}, mlp_only / "adapter_model.safetensors")
    assert_expert(tmp_path / "out", 0, expected(base, mlp_only, 2.0))


def test_an_adapter_without_an_mlp_is_an_error_at_its_line(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora", modules=("self_attn.q_proj",))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:5: error\[adapter-without-mlp\].*changes no MLP \(q_proj\)"):
        planned(recipe_text(base, [base, f"{base}+{adapter}"]), tmp_path)


def test_a_base_model_with_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: error\[adapter-on-base\]"):
        planned(recipe_text(f"{base}+{adapter}", [base, base]), tmp_path)


def test_an_adapter_trained_on_another_model_is_a_notice(tmp_path: Path) -> None:
    from merge.planner import build_plan
    from merge.sources import Sources
    from tests.dense import loaded_recipe

    save_dense(tmp_path / "models/lab/base")
    cases = (("lab/other", True), ("Lab/Base", False), ("/home/me/base", False), (None, False))
    for number, (trained_on, said) in enumerate(cases):
        name = f"lora{number}"
        save_adapter(tmp_path / "models/lab" / name, base_model_name_or_path=trained_on)
        loaded = loaded_recipe(recipe_text("lab/base", [f"lab/base+lab/{name}", "lab/base"]), tmp_path)
        opened, failed = Sources(tmp_path, models=tmp_path / "models").open_all(loaded.recipe.references)
        assert not failed
        assert ("adapter-of-another-base" in found(build_plan(loaded, opened))) == said


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapter"),
        ({"peft_type": None}, "'None' adapter"),
        ({"use_dora": True}, "DoRA"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"lora_bias": True}, "bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "certain tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "no module"),
        ({"some_new_variant": {"a": 1}}, "'some_new_variant', which is not known"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"r": 5}, "says rank 5"),
        ({"r": 0}, "not a positive number"),
        ({"lora_alpha": "8"}, "not a positive number"),
        ({"lora_alpha": True}, "not a positive number"),
        ({"use_rslora": "yes"}, "neither true nor false"),
        ({"rank_pattern": [1]}, "not a mapping"),
        ({"rank_pattern": {"(a+)+$": 2}}, "regular expression"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "regular expression"),
        ({"rank_pattern": {"up_proj": 2}}, "says rank 2"),
    ],
)
def test_what_is_not_w_plus_b_a_is_refused(base: Path, tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    adapter = save_adapter(tmp_path / "lora")
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(saved | config))
    with pytest.raises(RecipeError, match=problem) as error:
        planned(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path)
    assert [finding.id for finding in error.value.findings if finding.level == "error"] == ["adapter-unusable"]


PREFIX = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({f"{PREFIX}.lora_A.weight": None}, "only one of the two"),
        ({f"{PREFIX}.lora_A.default.weight": torch.ones(4, 64)}, "two matrices A"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4)}, "do not multiply"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(3, 64)}, "do not multiply"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 63)}, "made for another model"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}, "stored as I8"),
        ({f"{PREFIX}.lora_magnitude_vector": torch.ones(96)}, "no low-rank delta"),
        ({f"{PREFIX}.bias": torch.ones(96)}, "no low-rank delta"),
        ({f"{PREFIX}.weight": torch.ones(96, 64)}, "no low-rank delta"),
        (
            {
                "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
                "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(96, 4),
            },
            r"layers\.7\.mlp\.up_proj\.weight', which .* does not have",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    base: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], problem: str
) -> None:
    adapter = save_adapter(tmp_path / "lora")
    tensors = load_file(adapter / "adapter_model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, adapter / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match=problem):
        planned(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path)


def test_a_model_is_no_adapter_and_an_adapter_no_model(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora")
    with pytest.raises(
        SourceError, match=r"no adapter_config\.json in the folder, so it is not a PEFT adapter; it is a model"
    ):
        open_folder(base, layout=ADAPTER)
    with pytest.raises(SourceError, match=r"it is a PEFT adapter: name it with its base, as base\+"):
        open_folder(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"its weights \(adapter_model\.safetensors\) are not there"):
        planned(recipe_text(base, [f"{base}+{adapter}", base]), tmp_path)
