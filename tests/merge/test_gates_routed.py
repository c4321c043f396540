"""The discriminant router separates its experts' texts, on what the merged model's router receives, in closed form."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from bot.cli import main
from merge.errors import RecipeError
from merge.evaluate import Evaluator, checkpoint_expressions
from merge.expr import Expr, Gate
from merge.forward import Batch, StreamedModel
from merge.gates import expansion
from merge.gates.batches import packed
from merge.gates.discriminant import APART, MAX_TOP_WEIGHT, Rows, fit_router, rows_of
from merge.gates.expansion import ASKED, SAMPLES, Sample, expand, is_short, with_samples
from merge.gates.held_out import routed, sent
from merge.gates.prompts import ExpertPrompts, PromptError, calibration_texts, load_tokenizer, read_prompts
from merge.gates.record import LayerRecord, Record, advice, record_of
from merge.gates.routed import (
    SOFTNESS,
    SOFTNESS_UNSCALED,
    Calibration,
    attention_once,
    calibrate_discriminant,
    router_inputs,
)
from merge.recipe import parse_recipe
from tests.merge.test_gates import CONTEXT, SPECIAL, save_base, save_tokenizer

EXPERTS = (
    ExpertPrompts(("chat with me", "tell me more")),
    ExpertPrompts(("def f(x):", "return x + 1", "[0, 1]"), ("once upon",)),
    ExpertPrompts(("BONJOUR", "CA VA BIEN")),
)


def save_mixture(folder: Path, special: dict[str, str] | None = None, experts: int = 3) -> Path:
    """A small Mixtral with its tokenizer."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        num_local_experts=experts,
        num_experts_per_tok=min(2, experts),
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    save_tokenizer(folder, **(SPECIAL if special is None else special))
    return folder


def without_gates(folder: Path) -> tuple[dict[str, Expr], dict[str, object], Evaluator]:
    """A mixture's expressions with gates still to be found."""
    tensors, config, evaluator = checkpoint_expressions(folder)
    for name, expr in tensors.items():
        if name.endswith("gate.weight"):
            tensors[name] = Gate(int(name.split(".")[2]), "BF16", expr.shape)
    return tensors, config, evaluator


def calibrated(folder: Path, experts: Sequence[ExpertPrompts] = EXPERTS, **options: object) -> Calibration:
    tensors, config, evaluator = without_gates(folder)
    return calibrate_discriminant(experts, config, tensors, evaluator, folder, "cpu", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture"))


def clusters(n: int, seed: int = 0) -> tuple[torch.Tensor, Rows]:
    """Three experts with four prompts of `n` tokens each, around three directions and a large common one."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 40, generator=generator) + 5
    owner = [e for e in range(3) for _ in range(4)]
    x = torch.cat([centres[e] + torch.randn(n, 40, generator=generator) for e in owner])
    return x, rows_of(3, [(e, True) for e in owner], [n] * 12, list(range(12)))


@pytest.mark.parametrize("n", [2, 9])  # fewer rows than columns, and more
def test_what_is_held_out_is_as_if_the_router_had_been_fitted_without_it(n: int) -> None:
    x, rows = clusters(n)
    ridge = 0.7
    fit = fit_router(x, rows, ridge)
    root = rows.weight.sqrt()[:, None]
    mean = float((x.double() * root).square().sum()) / x.shape[1]
    right = 0.0
    for group in range(12):
        kept = rows.group != group
        a = x[kept].double() * root[kept]
        y = (rows.target[kept] - 1 / 3) * root[kept]
        w = torch.linalg.solve(a.T @ a + ridge * mean * torch.eye(40, dtype=torch.double), a.T @ y)  # (H, E)
        best = (x[~kept].double() @ w).argmax(1)
        right += float((best == rows.own[~kept]).sum())
    assert fit.figures.accuracy == pytest.approx(right / len(x))


def test_the_router_sends_new_tokens_of_each_kind_to_their_expert_and_is_not_saturated() -> None:
    x, rows = clusters(12)
    fit = fit_router(x, rows)
    assert float(((x @ fit.gate.T).argmax(1) == rows.own).float().mean()) > 0.95
    assert 1 / 3 < fit.figures.top_weight <= MAX_TOP_WEIGHT + 1e-6
    assert fit.figures.reach[-1] == pytest.approx(1)


@pytest.mark.parametrize("n", [2, 9])
def test_a_pinned_input_is_shared_and_the_rest_is_as_good_as_can_be(n: int) -> None:
    x, rows = clusters(n)
    b = torch.randn(40, generator=torch.Generator().manual_seed(1)).double() + 5
    free, pinned = fit_router(x, rows, 0.7), fit_router(x, rows, 0.7, pin=(b, (0, 2)))
    z = pinned.gate @ b.float()
    assert float(z[0]) == pytest.approx(float(z[2]), abs=1e-3)
    assert float(z[1]) <= float(z[0]) - APART + 1e-3
    # The difference from the free optimum W solves (W' - W) A = mu b' for some mu (E,): Lagrange's condition.
    a = x.double().T @ (rows.weight[:, None] * x.double())
    a += 0.7 * a.trace() / 40 * torch.eye(40, dtype=torch.double)
    gradient = (pinned.gate - free.gate).double() @ a  # (E, H)
    mu = gradient @ b / (b @ b)
    torch.testing.assert_close(gradient, mu[:, None] * b, rtol=1e-2, atol=1e-2 * float(gradient.abs().max()))


def test_a_bos_is_shared_by_the_experts_with_the_lowest_loss(mixture: Path) -> None:
    made = calibrated(mixture)
    assert len(made.first) == 2
    (other,) = {0, 1, 2} - set(made.first)
    model = streamed(mixture, made.gates)
    batches = [Batch(torch.tensor([[0]]))]
    run = model.start(batches)
    for layer in model.layers():
        ((router, _),) = model.gates(layer.index)
        z = router_inputs(layer, run, router)[0][0, 0] @ made.gates[layer.index].T
        assert float(z[made.first[0]]) == pytest.approx(float(z[made.first[1]]), abs=0.05)
        assert float(z[other]) < float(z[made.first[0]]) - APART + 0.05
        layer.advance(run)


def test_more_tokens_than_the_model_is_wide_are_fitted_in_pieces_and_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, rows = clusters(9)
    pin = (torch.randn(40, generator=torch.Generator().manual_seed(1)) + 5, (0, 2))
    whole = fit_router(x, rows, pin=pin)
    in_float64: list[int] = []
    double = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = double(self, *args, **kwargs)
        in_float64.append(len(made) if made.dim() == 2 and made.shape[1] == 40 and made.dtype == torch.double else 0)
        return made

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr("merge.gates.singular.PIECE_ELEMENTS", 10 * 40)
    pieces = fit_router(x, rows, pin=pin)
    assert 10 <= max(in_float64) <= 40  # of 108: pieces, prompts, and the Gram matrix of 40 columns
    torch.testing.assert_close(pieces.gate, whole.gate)
    torch.testing.assert_close(pieces.logits, whole.logits)


def test_negative_text_is_the_other_experts_and_every_expert_weighs_the_same() -> None:
    rows = rows_of(3, [(0, True), (1, True), (1, False), (2, True)], [4, 1, 2, 3], [0, 1, 2, 3])
    assert rows.target[5].tolist() == [0.5, 0.0, 0.5]
    assert rows.own.tolist() == [0, 0, 0, 0, 1, -1, -1, 2, 2, 2]
    assert [float(rows.weight[rows.own == e].sum()) for e in range(3)] == pytest.approx([0.25] * 3)
    assert not rows.can_hold_out


def streamed(folder: Path, gates: dict[int, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> StreamedModel:
    tensors, config, evaluator = without_gates(folder)
    return StreamedModel(config, tensors, Evaluator(evaluator.files, gates), "cpu", dtype)


def test_a_layers_router_is_fitted_on_what_it_receives_of_text_that_the_router_below_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Texts run alone here and share rows there; in bfloat16 that is another rounding.
    monkeypatch.setattr("merge.gates.routed.DTYPE", torch.float32)
    mixture = save_mixture(tmp_path, {"eos_token": "</s>"})
    # Random weights know no domains, so only a sharp router sends their tokens anywhere.
    ridge, sharp, experts = 0.7, 1000.0, [ExpertPrompts(expert.positive) for expert in EXPERTS]
    made = calibrated(mixture, experts, ridge=ridge, softness=sharp)
    texts = made.texts.texts
    rows = rows_of(3, [(t.expert, True) for t in texts], [t.tokens for t in texts], list(range(len(texts))))
    zeros = {layer: torch.zeros(3, 32) for layer in range(3)}

    def received(layer: int, gates: dict[int, torch.Tensor], i: int) -> torch.Tensor:
        model = streamed(mixture, gates, torch.float32)
        batches = [Batch(torch.tensor([texts[i].ids]))]
        run = model.start(batches)
        for streamed_layer in model.layers():
            if streamed_layer.index == layer:
                ((router, _),) = model.gates(layer)
                return router_inputs(streamed_layer, run, router)[0][0, texts[i].skipped :]
            streamed_layer.advance(run)
        raise AssertionError

    x = torch.cat([received(0, zeros, i) for i in range(len(texts))])
    first = fit_router(x, rows, ridge, sharp)
    torch.testing.assert_close(first.gate, made.gates[0], rtol=1e-3, atol=1e-3)
    root = rows.weight.sqrt()[:, None]
    mean = float((x.double() * root).square().sum()) / 32
    after = []
    for i in range(len(texts)):
        kept = rows.group != i
        a = x[kept].double() * root[kept]
        y = (rows.target[kept] - 1 / 3) * root[kept]
        w = torch.linalg.solve(a.T @ a + ridge * mean * torch.eye(32, dtype=torch.double), a.T @ y).T  # (E, H)
        after.append(received(1, zeros | {0: (first.scale * w).float()}, i))
    second = fit_router(torch.cat(after), rows, ridge, sharp)
    wrong = fit_router(torch.cat([received(1, zeros, i) for i in range(len(texts))]), rows, ridge, sharp)
    # A first token alone is routed by the whole router there, and by the one without its prompt here.
    assert (second.gate - made.gates[1]).norm() < 0.3 * (wrong.gate - made.gates[1]).norm()


def test_a_layers_attention_is_computed_once_for_both_of_its_passes(mixture: Path) -> None:
    gates = {layer: torch.randn(3, 32) for layer in range(3)}
    batches = packed([list(range(5, 5 + n)) for n in (100, 90, 30)], 128).batches
    assert len(batches) > 1
    model, plain = streamed(mixture, gates), streamed(mixture, gates)
    run, expected = model.start(batches), plain.start(batches)
    calls: list[Any] = []
    for layer, other in zip(attention_once(model.layers(), len(batches)), plain.layers(), strict=True):
        hook = layer.module.get_submodule("self_attn.q_proj").register_forward_hook(lambda *args: calls.append(args))
        ((router, _),) = model.gates(layer.index)
        router_inputs(layer, run, router)
        layer.advance(run)
        hook.remove()
        other.advance(expected)
        assert all(torch.equal(x, y) for x, y in zip(run.hidden, expected.hidden, strict=True))
    assert len(calls) == len(batches) * model.num_layers


def test_where_weights_are_not_scaled_the_router_is_sharp(mixture: Path) -> None:
    soft = calibrated(mixture)
    path = mixture / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"norm_topk_prob": False}))
    try:
        sharp = calibrated(mixture)
    finally:
        path.write_text(before)
    assert sharp.fits[0].ridge == soft.fits[0].ridge
    assert sharp.fits[0].scale / soft.fits[0].scale == pytest.approx(SOFTNESS_UNSCALED / SOFTNESS)


def test_of_experts_that_come_one_at_a_time_only_those_in_use_are_read(mixture: Path) -> None:
    tensors, config, evaluator = without_gates(mixture)
    zeros = {layer: torch.zeros(3, 32) for layer in range(3)}
    model = StreamedModel(config, tensors, Evaluator(evaluator.files, zeros), "cpu", torch.bfloat16, 0)
    rows = packed([[5, 6, 7, 8]])
    run = model.start(rows.batches)
    for layer in model.layers():
        model.expert = -1
        ((router, _),) = model.gates(layer.index)
        with routed(router, torch.zeros(3, 32), [sent(rows.batches[0], 3, [(torch.arange(4), 1)])]):
            layer.advance(run)
        assert model.expert == 1  # the last that was read: with one of weight 0 it would have been the third


def test_the_same_inputs_give_the_same_bits(mixture: Path) -> None:
    first, second = calibrated(mixture), calibrated(mixture)
    assert all(torch.equal(first.gates[layer], second.gates[layer]) for layer in first.gates)


def test_how_texts_lie_in_batches_does_not_matter(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge.gates.routed.DTYPE", torch.float32)
    one = calibrated(mixture)
    monkeypatch.setattr("merge.gates.batches.ROW", 20)
    monkeypatch.setattr("merge.gates.routed.packed", lambda ids: packed(ids, 40))
    many = calibrated(mixture)
    assert len(packed([text.ids for text in one.texts.texts], 40).batches) > 2
    for layer, gate in one.gates.items():
        torch.testing.assert_close(many.gates[layer], gate, rtol=1e-3, atol=1e-4)


def test_experts_one_at_a_time_give_the_same_gates_and_logits(mixture: Path) -> None:
    whole, streamed = calibrated(mixture), calibrated(mixture, memory=0)
    for layer, gate in whole.gates.items():
        torch.testing.assert_close(streamed.gates[layer], gate, rtol=1e-4, atol=1e-4)
    ids = [Batch(torch.arange(40).view(2, 20) + 5)]
    logits = []
    for memory in (1 << 40, 0):
        tensors, config, evaluator = without_gates(mixture)
        model = StreamedModel(config, tensors, Evaluator(evaluator.files, whole.gates), "cpu", torch.float32, memory)
        logits.append(torch.cat([piece.values for piece in model.logits(model.advance(model.start(ids)))], 1))
    torch.testing.assert_close(logits[0], logits[1])


CAPPED = """
import json, resource, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[4])
torch.set_num_threads(1)
from tests.merge.test_gates_routed import ExpertPrompts, calibrated, StreamedModel
folder, memory, cap = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
experts = [ExpertPrompts((f"text {e} one", f"text {e} two")) for e in range(16)]
calibrated(Path(sys.argv[5]), experts[:3])  # everything that is loaded late is loaded now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_AS, (used + files + cap, -1))
calibrated(folder, experts, memory=memory)
"""


@pytest.mark.slow
def test_a_layer_of_experts_larger_than_the_memory_is_calibrated_one_expert_at_a_time(
    mixture: Path, tmp_path: Path, root: Path
) -> None:
    # A 70B base with 16 experts has 22.5 GB of experts a layer, 1.4 GB each, for a GPU of 24 GB; here 192 MiB and 12, for 120.
    config = MixtralConfig(
        vocab_size=300, hidden_size=512, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, num_local_experts=16, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=True)
    save_tokenizer(tmp_path, **SPECIAL)
    del model

    def run(memory: int) -> subprocess.CompletedProcess[str]:
        # oneDNN keeps the code it makes for each shape of a product: more of it than these small weights are.
        kept_small = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        arguments = [str(tmp_path), str(memory), str(120 << 20), str(root), str(mixture)]
        return subprocess.run(
            [sys.executable, "-c", CAPPED, *arguments],
            cwd=root,
            env=os.environ | kept_small,
            capture_output=True,
            text=True,
            check=False,
        )

    assert resource.RLIMIT_AS
    fits = run(100 << 20)
    assert fits.returncode == 0, fits.stderr[-2000:]
    whole = run(1 << 40)
    assert whole.returncode != 0
    assert "alloc" in whole.stderr.lower() or "memory" in whole.stderr.lower(), whole.stderr[-2000:]


def test_one_expert_needs_no_telling_apart(tmp_path: Path) -> None:
    made = calibrated(save_mixture(tmp_path, experts=1), EXPERTS[:1])
    assert not made.held_out
    assert all(gate.abs().max() == 0 for gate in made.gates.values())


def test_prompts_of_one_token_give_gates_and_say_that_nothing_was_held_out(mixture: Path) -> None:
    made = calibrated(mixture, [ExpertPrompts((letter,)) for letter in "abc"])
    assert not made.held_out
    assert all(torch.isfinite(gate).all() for gate in made.gates.values())
    assert [finding.id for finding in advice(record_of(made), ["a", "b", "c"], 2, {})] == ["nothing-to-hold-out"]


def test_a_prompt_longer_than_the_context_is_cut(mixture: Path) -> None:
    long = ExpertPrompts(("x" * (3 * CONTEXT),))
    made = calibrated(mixture, [long, *EXPERTS[1:]])
    assert made.texts.cut == (1,)
    assert max(len(text.ids) for text in made.texts.texts) == CONTEXT
    assert sum(text.tokens for text in made.texts.texts if text.expert == 0) == 3 * CONTEXT


def test_an_expert_without_prompts_is_refused(mixture: Path) -> None:
    with pytest.raises(PromptError, match="expert 2: positive prompts are missing"):
        calibrated(mixture, [EXPERTS[0], ExpertPrompts(()), EXPERTS[2]])


def test_without_a_bos_the_first_token_is_left_out_unless_it_is_all(tmp_path: Path) -> None:
    save_mixture(tmp_path, {"eos_token": "</s>"})
    texts = calibration_texts(load_tokenizer(tmp_path), [ExpertPrompts(("a", "abc"))], {}).texts
    assert [(len(text.ids), text.tokens) for text in texts] == [(1, 1), (3, 2)]
    assert all(torch.isfinite(gate).all() for gate in calibrated(tmp_path).gates.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(mixture: Path, tmp_path: Path, side: str) -> None:
    for path in mixture.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
    expected, made = calibrated(mixture), calibrated(tmp_path)
    assert all(torch.equal(made.gates[layer], expected.gates[layer]) for layer in made.gates)


def test_a_shared_experts_gate_opens_for_its_own_text(mixture: Path) -> None:
    shared = ExpertPrompts(("0123456789", "9876543210"))
    made = calibrated(mixture, shared=[shared])
    assert {tuple(gate.shape) for gate in made.gates.values()} == {(4, 32)}
    alone = calibrated(mixture)
    torch.testing.assert_close(made.gates[0][:3], alone.gates[0], rtol=0.01, atol=1e-3)
    texts, model = made.texts.texts, streamed(mixture, made.gates)
    run = model.start([Batch(torch.tensor([text.ids])) for text in texts])
    for layer in model.layers():
        ((router, _),) = model.gates(layer.index)
        inputs = [x[0, text.skipped :] for text, x in zip(texts, router_inputs(layer, run, router), strict=True)]
        opened = [(x @ made.gates[layer.index][3].to(x)).sigmoid() for x in inputs]  # (T,) of each text
        own, others = (
            torch.cat([share for text, share in zip(texts, opened, strict=True) if (text.expert == 3) is mine])
            for mine in (True, False)
        )
        assert float(own.mean()) > 0.6
        assert float(others.mean()) < 0.4
        layer.advance(run)


def test_idle_experts_and_experts_alike_are_named_with_their_layers() -> None:
    apart = LayerRecord(((0.9, 0.1, 0.0), (0.1, 0.9, 0.0), (0.5, 0.45, 0.05)), (0.6, 0.95, 1.0), 0.8, 0.5, 1.0, 1.0)
    alike = LayerRecord(((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), (0.5, 0.45, 0.05)), (0.4, 0.93, 1.0), 0.8, 0.5, 1.0, 1.0)
    said = [x.text for x in advice(Record((alike, alike, apart), True), ["a/a", "b/b", "c/c"], 3, {})]
    assert any("expert 3 (c/c) would be idle" in text for text in said)
    assert "experts 1 and 2 cannot be told apart in layers 0-1 (of 3)" in said
    assert any("2 would do" in text for text in said)


@pytest.mark.parametrize(("reach", "said"), [((0.5, 0.8, 1.0), None), ((0.5, 0.95, 1.0), None), ((0.95, 0.97, 1.0), 1)])
def test_that_all_experts_are_enough_is_no_advice(reach: tuple[float, ...], said: int | None) -> None:
    even = ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))
    record = Record((LayerRecord(even, reach, 0.8, 0.5, 1.0, 1.0),), True)
    found = [x.holes["enough"] for x in advice(record, ["a/a", "b/b", "c/c"], 2, {})]
    assert found == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.txt", b"one\nline\n\n\ntwo\n"),
        ("a.json", b'["one\\nline", {"text": "two"}]'),
        ("a.jsonl", b'"one\\nline"\n{"text": "two", "other": 1}\n'),
    ],
)
def test_a_file_of_prompts_is_read_by_its_ending(name: str, raw: bytes) -> None:
    assert read_prompts(raw, name) == ("one\nline", "two")
    assert read_prompts(raw, name, limit=1) == ("one\nline",)


@pytest.mark.parametrize(
    ("name", "raw"),
    [("a.json", b'{"a": 1}'), ("a.jsonl", b"{"), ("a.txt", b"\n\n"), ("a.txt", b"\xff"), ("a.json", b"[1]")],
)
def test_what_is_no_file_of_prompts_is_refused(name: str, raw: bytes) -> None:
    with pytest.raises(PromptError, match=name):
        read_prompts(raw, name)


def test_a_file_of_prompts_stays_in_the_recipes_folder(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from bot.gates import prompts_of

    text = "base_model: a/b\ngate_mode: discriminant\nexperts:\n" + "".join(
        f"  - source_model: a/{name}\n    prompts_file: {name}.txt\n" for name in ("one", "../two")
    )
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.txt").write_text("first\n\nsecond")
    (tmp_path / "two.txt").write_text("secret")
    text = text.replace("a/../two", "a/two")
    loaded = parse_recipe(text.encode(), tmp_path / "recipes" / "r.yaml")
    gated = SimpleNamespace(gated=loaded.recipe.experts[:1], slices={})
    assert prompts_of(loaded, gated)[0].positive == ("first", "second")  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as raised:
        prompts_of(loaded, SimpleNamespace(gated=loaded.recipe.experts, slices={}))  # type: ignore[arg-type]
    assert [finding.id for finding in raised.value.findings] == ["bad-prompts-file"]


def test_short_prompts_are_expanded_with_the_seed_and_sentences_are_kept(tmp_path: Path) -> None:
    folder = save_base(tmp_path, special=SPECIAL)
    experts = [ExpertPrompts(("code", "a sentence that is long enough")), ExpertPrompts(("another long sentence",))]
    tensors, config, evaluator = checkpoint_expressions(folder)
    tokenizer = load_tokenizer(folder)
    assert is_short(tokenizer, "code")
    assert not is_short(tokenizer, "another long sentence")
    first, again, other = (
        expand(experts, config, tensors, evaluator, folder, seed, "cpu", tokens=6) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {sample.prompt for sample in first} == {"code"}
    expanded = with_samples(experts, first)
    assert expanded[0].positive[0] == "a sentence that is long enough"
    assert len(expanded[0].positive) == 1 + len(first)
    assert expanded[1] == experts[1]


def test_a_model_with_chatmls_tokens_is_also_asked_and_of_a_chat_only_the_answer_is_kept(tmp_path: Path) -> None:
    folder = save_base(tmp_path, special=SPECIAL)
    tensors, config, evaluator = checkpoint_expressions(folder)
    experts = [ExpertPrompts(("code",))]

    def written() -> tuple[Sample, ...]:
        return expand(experts, config, tensors, evaluator, folder, 1, "cpu", tokens=6)

    plain = {sample.beginning for sample in written()}
    assert all("<|im_" not in beginning for beginning in plain)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    samples = written()
    chats = {sample.beginning for sample in samples} - plain
    assert plain < {sample.beginning for sample in samples}
    assert len(chats) == len(ASKED)
    for beginning in chats:
        assert beginning.startswith("<|im_start|>user\n")
        assert "code" in beginning
        assert beginning.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for sample in samples:
        if sample.beginning in chats:
            assert not any(part in sample.text for part in ("im_", "user", "assistant", "code"))
            assert len(sample.text) <= 6  # a token is a byte here
        else:
            assert sample.text.startswith(sample.beginning.strip())


def test_of_many_short_prompts_an_even_part_is_expanded_and_the_others_keep_their_text(tmp_path: Path) -> None:
    folder = save_base(tmp_path, special=SPECIAL)
    prompts = tuple(f"w{number}" for number in range(1000))
    tensors, config, evaluator = checkpoint_expressions(folder)
    samples = expand([ExpertPrompts(prompts)], config, tensors, evaluator, folder, 1, "cpu", tokens=2)
    assert len(samples) == SAMPLES
    numbers = [int(sample.prompt[1:]) for sample in samples]
    steps = [b - a for a, b in pairwise(numbers)]
    assert numbers[0] == 0 and {min(steps), max(steps)} == {1000 // SAMPLES, 1000 // SAMPLES + 1}
    assert (
        len({sample.beginning.replace(sample.prompt, "").replace(sample.prompt.title(), "") for sample in samples}) == 3
    )
    (expanded,) = with_samples([ExpertPrompts(prompts)], samples)
    assert len(expanded.positive) == 1000
    assert set(prompts) - {sample.prompt for sample in samples} <= set(expanded.positive)


def test_samples_in_batches_read_the_weights_once_a_token_and_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32, since in bfloat16 other shapes are another rounding.
    monkeypatch.setattr("merge.gates.expansion.DTYPE", torch.float32)
    folder = save_base(tmp_path, special=SPECIAL)
    tensors, config, evaluator = checkpoint_expressions(folder)
    experts = [ExpertPrompts(("code", "more")), ExpertPrompts(("text",))]
    loaded: list[int] = []
    layer = StreamedModel.layer

    def counted(self: StreamedModel, index: int, storage: dict[str, torch.Tensor]) -> Any:
        loaded.append(index)
        return layer(self, index, storage)

    monkeypatch.setattr(StreamedModel, "layer", counted)
    one = expand(experts, config, tensors, evaluator, folder, 1, "cpu", tokens=4)
    in_one = len(loaded)
    monkeypatch.setattr("merge.gates.expansion.CACHE_BYTES", 1 << 18)
    moved: list[int] = []
    move = expansion._move
    monkeypatch.setattr(expansion, "_move", lambda *args: (moved.append(args[1]), move(*args)))
    many = expand(experts, config, tensors, evaluator, folder, 1, "cpu", tokens=4)
    assert moved and len(loaded) == 2 * in_one
    assert many == one


@pytest.mark.slow
def test_the_demos_router_is_calibrated_and_reported(
    smollm2: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gates.safetensors"
    recipe = root / "recipes" / "demo-4x135M.yaml"
    assert main(["gates", str(recipe), "--models", str(smollm2), "--device", "cpu", "--out", str(out)]) == 0
    first = out.read_bytes()
    assert "gates discriminant, 30 layers" in capsys.readouterr().out
    assert main(["gates", str(recipe), "--models", str(smollm2), "--device", "cpu", "--out", str(out)]) == 0
    assert out.read_bytes() == first
