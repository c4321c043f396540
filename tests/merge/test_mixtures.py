"""Mixtures as sources: one expert of one, whatever names its tensors have, and experts added to one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bot.cli import main
from evals.results import read_report
from merge.evaluate import Evaluator, open_files
from merge.expr import Read, pieces
from merge.families import FAMILIES
from merge.families.family import NO_SHARED, Family
from merge.gates import load_gates, load_tokenizer
from merge.writer import write_checkpoint
from quants.families import FAMILIES as WRITTEN
from quants.layout import gguf_layout
from quants.rows import row_count
from quants.rows import rows as gguf_rows
from tests.dense import planned
from tests.merge.mixtures import HIDDEN, LAYERS, RUN, dense_models, mixture, recipe, rows, same, weights, write
from tests.merge.test_families import RUNNABLE, difference

# ------------------------------------------------------------------------------------------------------ ways of writing one


def as_transformers_saves(folder: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)


def as_in_memory(folder: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, save_original_format=False)


def experts_joined_alone(folder: Path, out: Path) -> None:
    """The experts of a layer as two tensors, everything else under the Hub's names."""
    found = weights(folder)
    for layer in range(LAYERS):
        for at in (f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.block_sparse_moe.experts"):
            names = ("w1", "w3", "w2") if "block_sparse" in at else ("gate_proj", "up_proj", "down_proj")
            if f"{at}.0.{names[0]}.weight" not in found:
                continue
            gate, up, down = (torch.stack([found.pop(f"{at}.{e}.{name}.weight") for e in range(3)]) for name in names)
            joined = f"model.layers.{layer}.mlp.experts"
            found |= {f"{joined}.gate_up_proj": torch.cat([gate, up], 1), f"{joined}.down_proj": down}
    out.mkdir()
    save_file(found, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    "saved": as_transformers_saves,
    "in memory": as_in_memory,
    "joined": experts_joined_alone,
}


# Those whose router, or what stands beside it, has another name in memory.
RENAMED = ("mixtral", "granitemoe", "ernie4_5_moe")
WRITERS = [(family, layout) for family in FAMILIES for layout in LAYOUTS if family in RUNNABLE or layout == "joined"]


@pytest.mark.parametrize(("family", "layout"), WRITERS, ids=lambda x: getattr(x, "NAME", x))
def test_an_expert_of_a_mixture_is_the_model_that_it_was_made_of(family: Family, layout: str, tmp_path: Path) -> None:
    dense = dense_models(family, tmp_path)
    made = mixture(family, dense, tmp_path)
    LAYOUTS[layout](made, tmp_path / "other")
    chosen = [{"source_model": str(source), "expert": 2} for source in (made, tmp_path / "other")]
    plan = write(recipe(dense[0], [*chosen], architecture=family.NAME), tmp_path, "out", rows(2))
    expected = recipe(dense[0], [{"source_model": str(dense[2])}] * 2, architecture=family.NAME)
    direct = write(expected, tmp_path, "expected", rows(2))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "expected"))
    assert plan.config == direct.config
    # Bytes are copied: every matrix of an expert is a tensor of the source, or one piece of it.
    experts = [x.expr for x in plan.tensors if ".experts." in x.name or "_linear" in x.name]
    assert experts
    assert all(isinstance(piece, Read) for x in experts for piece in pieces(x))


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(pair for pair in WRITERS if pair[0].NAME in RENAMED), *((family, "hub") for family in FAMILIES)],
    ids=lambda x: getattr(x, "NAME", x),
)
def test_adding_experts_to_a_merge_gives_the_merge_of_them_all(family: Family, layout: str, tmp_path: Path) -> None:
    dense = dense_models(family, tmp_path, 4)
    with_shared = {} if family.SHARED == NO_SHARED else {"shared_experts": [{"source_model": str(dense[1])}]}
    base = mixture(family, dense[:3], tmp_path, **with_shared)
    if layout != "hub":
        LAYOUTS[layout](base, tmp_path / "other")
        for file in base.glob("token*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        base = tmp_path / "other"
    gates = rows(5)
    plan = write(recipe(base, [{"source_model": str(dense[3])}]), tmp_path, "out", gates)
    every = [{"source_model": str(x)} for x in dense]
    whole = recipe(dense[0], every, architecture=family.NAME, **with_shared)
    # The row of a shared expert's gate stands behind the experts'.
    together = torch.cat([gates[:4], gates[3:4]]) if "shared_experts" in with_shared else gates
    direct = write(whole, tmp_path, "expected", together)
    assert (plan.family, plan.why_family) == (family.NAME, "the base is one already")
    assert (plan.kept_experts, plan.expert_count, plan.experts_per_token) == (3, 4, 2)
    assert plan.parameters == direct.parameters
    assert plan.unused[plan.base] == ()
    assert plan.config.keys() >= {"architectures", "torch_dtype"}
    assert same(weights(tmp_path / "out"), weights(tmp_path / "expected"))
    if layout == "hub":
        assert plan.config == direct.config


# DeepSeek-V3 always has one, of zeros if need be.
COUNTED = [x for x in FAMILIES if x.KEYS.shared_count and x.NAME != "deepseek_v3"]


@pytest.mark.parametrize("family", COUNTED, ids=lambda family: family.NAME)
def test_a_shared_expert_added_to_a_mixture_without_one_is_in_its_config(family: Family, tmp_path: Path) -> None:
    dense = dense_models(family, tmp_path, 4)
    base = mixture(family, dense[:3], tmp_path)
    shared = {"shared_experts": [{"source_model": str(dense[1])}]}
    plan = write(recipe(base, [{"source_model": str(dense[3])}], **shared), tmp_path, "out", rows(4))
    every = [{"source_model": str(x)} for x in dense]
    whole = recipe(dense[0], every, architecture=family.NAME, **shared)
    direct = write(whole, tmp_path, "expected", rows(4))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "expected"))
    key = family.KEYS.shared_count
    assert plan.config[key] == direct.config[key] == 1


@pytest.mark.parametrize("family", [x for x in FAMILIES if x.NAME in WRITTEN], ids=lambda family: family.NAME)
def test_gguf_tensors_of_parts_are_those_of_whole_tensors(family: Family, tmp_path: Path) -> None:
    dense = dense_models(family, tmp_path, 4)
    with_shared = (
        {}
        if family.SHARED == NO_SHARED or family.NAME == "cohere2_moe"
        else {"shared_experts": [{"source_model": str(dense[1])}]}
    )
    base = mixture(family, dense[:3], tmp_path, **with_shared)
    experts_joined_alone(base, tmp_path / "joined")
    files = []
    for source in (base, tmp_path / "joined"):
        plan = planned(recipe(source, [{"source_model": str(dense[3])}]), tmp_path)
        layout = gguf_layout(plan.config, {tensor.name: tensor.expr for tensor in plan.tensors})
        contents = Evaluator(open_files(plan.sources), dict.fromkeys(range(LAYERS), rows(4)))
        files.append({x.name: gguf_rows(contents, x.expr, 0, row_count(x.expr)) for x in layout.tensors})
    assert files[0].keys() == files[1].keys()
    assert all((x == files[1][name]).all() for name, x in files[0].items())


# ------------------------------------------------------------------------------------------------- laws of an extended merge


def router_inputs(folder: Path, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each layer's MLP receives, (tokens, hidden), by layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        mlp = getattr(layer, "mlp", None) or layer.block_sparse_moe
        mlp.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0].flatten(0, -2)}))
    with torch.no_grad():
        model(ids)
    return seen


@RUN
def test_experts_equal_to_the_base_change_nothing_when_more_are_added(family: Family, tmp_path: Path) -> None:
    (dense,) = dense_models(family, tmp_path, 1)
    per_token = {} if family.NORMALISES else {"experts_per_token": 4}
    base = mixture(family, [dense] * 2, tmp_path)
    write(recipe(base, [{"source_model": str(dense)}] * 2, **per_token), tmp_path, "out", rows(4))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(dense, tmp_path / "out") < 1e-4


# In the others the weights are shares of all experts, so that one more takes from each.
@pytest.mark.parametrize("family", [x for x in RUNNABLE if x.NORMALISES], ids=lambda family: family.NAME)
def test_an_added_expert_that_no_token_chooses_changes_nothing(family: Family, tmp_path: Path) -> None:
    dense = dense_models(family, tmp_path, 3)
    base = mixture(family, dense[:2], tmp_path)
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = router_inputs(base, ids)
    plan = planned(recipe(base, [{"source_model": str(dense[2])}]), tmp_path)
    # Fewer tokens than hidden numbers: there is a row whose product with every token is far below the others'.
    never = {layer: torch.linalg.lstsq(x, torch.full((len(x), 1), -100.0)).solution.T for layer, x in inputs.items()}
    gates = {layer: torch.cat([rows(2), row]) for layer, row in never.items()}
    write_checkpoint(
        plan, plan.sources[plan.base], Evaluator(open_files(plan.sources), gates), tmp_path / "out", gates_key=""
    )
    one, other = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (base, tmp_path / "out"))
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "mode", ["random", "uniform_random", "cheap_embed", "hidden", "hidden_last", "hidden_avg", "discriminant"]
)
def test_the_kept_router_stays_and_new_rows_have_its_length(mode: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.NAME == "mixtral")
    dense = dense_models(family, tmp_path, 4)
    base = mixture(family, dense[:2], tmp_path, dtype="bfloat16")
    experts = [
        {"source_model": str(x), "positive_prompts": [f"{word} of the words", f"the {word} and the {word}"]}
        for x, word in zip(dense[2:], ("code", "song"), strict=True)
    ]
    (tmp_path / "recipe.yaml").write_text(
        recipe(base, experts, gate_mode=mode, dtype="bfloat16", router={"expand": False})
    )
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    before, after = weights(base), weights(tmp_path / "out")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.block_sparse_moe"
        router = after.pop(f"{at}.gate.weight")
        kept = before.pop(f"{at}.gate.weight")
        assert torch.equal(router[:2], kept)
        mean = kept.float().norm(dim=1).mean()
        assert torch.allclose(router[2:].float().norm(dim=1), mean.expand(2), rtol=0.01)
        assert not torch.allclose(router[2], router[3])
    assert same(before, {name: x for name, x in after.items() if name in before})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("mode", ["random", "discriminant"])
def test_gates_of_more_experts_are_shown_without_a_merge(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = next(family for family in FAMILIES if family.NAME == "mixtral")
    dense = dense_models(family, tmp_path)
    base = mixture(family, dense[:2], tmp_path)
    experts = [{"source_model": str(dense[2]), "positive_prompts": ["song of the words", "a song"]}]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(base, experts, gate_mode=mode, router={"expand": False}))
    assert main(["gates", str(path), "--out", str(tmp_path / "gates.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "closest experts" in said
    assert "not measured: what the experts kept from the base are for is not known" in said
    assert "degenerate" not in said
    assert load_gates(tmp_path / "gates.safetensors")[1].shape == (3, HIDDEN)


def test_a_new_discriminant_row_wins_its_own_prompts_from_the_kept_experts(tmp_path: Path) -> None:
    """The row is fitted against general text, so on its expert's prompts it is larger than there."""
    family = next(family for family in FAMILIES if family.NAME == "mixtral")
    dense = dense_models(family, tmp_path, 2)
    base = mixture(family, [dense[0]] * 2, tmp_path)
    own = ["0123456789 0123456789 9876543210", "5555 4444 3333 2222 1111 0000 9999"]
    experts = [{"source_model": str(dense[1]), "positive_prompts": own}]
    (tmp_path / "recipe.yaml").write_text(recipe(base, experts, gate_mode="discriminant"))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    tokenizer = load_tokenizer(dense[0])
    new, logits = weights(tmp_path / "out"), {}
    for what, text in (("own", "8765 4321 8765 4321 0246"), ("other", "A lighthouse keeper once explained the work.")):
        inputs = router_inputs(tmp_path / "out", torch.tensor([tokenizer(text)["input_ids"]]))
        logits[what] = torch.stack(
            [
                (x[1:] @ new[f"model.layers.{layer}.block_sparse_moe.gate.weight"][2]).mean()
                for layer, x in inputs.items()
            ]
        )
    assert torch.all(logits["own"] > logits["other"])


def test_a_build_on_a_mixture_shows_what_was_kept_and_runs_in_llama_cpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = next(family for family in FAMILIES if family.NAME == "mixtral")
    dense = dense_models(family, tmp_path, 3)
    base = mixture(family, dense[:2], tmp_path, "kept")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(base, [{"source_model": str(dense[2]), "role": "poet"}], release={"quants": ["F32"]}))
    assert main(["preview", str(path)]) == 0
    assert "Mixtral (the base is one already), 2 experts kept and 1 added, 2 per token" in capsys.readouterr().out
    assert main(["build", str(path), "--out", str(tmp_path / "out")]) == 0
    report = read_report(tmp_path / "out/report.json")
    assert [(x.source, x.number, x.kept) for x in report.experts] == [
        (str(base), 0, True), (str(base), 1, True), (str(dense[2]), None, False),
    ]  # fmt: skip
    assert [quant.proof for quant in report.quants] == ["ran"]
    card = (tmp_path / "out/model/README.md").read_text()
    assert card.count("| kept from the base |") == 2
    assert "not measured: what the experts kept from the base are for is not known" in card
    assert "its expert 1" in card
    assert "3 experts in every layer" in card
