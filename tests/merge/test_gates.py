"""Gates keep mergekit's meaning, are reproducible, and are stored by what they are made from."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from bot.cli import main
from merge.errors import SourceError
from merge.evaluate import Evaluator, checkpoint_expressions
from merge.gates import (
    ExpertPrompts,
    PromptError,
    base_files,
    calibrate,
    gate_report,
    gates_key,
    gates_path,
    load_gates,
    mergekit,
    random_gates,
    save_gates,
)
from merge.gates.mergekit import Step, calibrate_by_layer
from merge.gates.random import normal_quantile

HIDDEN, LAYERS, CONTEXT = 32, 3, 24
EXPERTS = (
    ExpertPrompts(("chat", "tell me more"), ("no",)),
    ExpertPrompts(("def f(x):", "x", "return x + 1")),
    ExpertPrompts(("bonjour",), ("hello", "good day")),
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def save_tokenizer(folder: Path, **special: str) -> None:
    """A byte-level tokenizer: one token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_base(folder: Path, config_class: type = LlamaConfig, special: dict[str, str] | None = None) -> Path:
    """A small dense model with its tokenizer."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        **({"sliding_window": 4} if config_class is MistralConfig else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, **(SPECIAL if special is None else special))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def calibrated(folder: Path, mode: str, experts: Sequence[ExpertPrompts] = EXPERTS, seed: int = 0) -> torch.Tensor:
    """Gates of all layers: (L, E, H)."""
    tensors, config, evaluator = checkpoint_expressions(folder)
    gates = calibrate(mode, experts, config, tensors, evaluator, folder, seed, device="cpu")
    assert list(gates) == list(range(LAYERS))
    return torch.stack(list(gates.values()))


def byte_ids(text: str) -> list[int]:
    """The token ids of `text` under `save_tokenizer`, BOS first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [0, *(len(SPECIAL) + alphabet.index(c) for piece, _ in pieces for c in piece)]


def prototypes(model: Any, prompts: Sequence[str], average: bool) -> torch.Tensor:
    """The definition, on the ordinary model: hidden states entering each layer (L, H), meant over the prompts."""
    rows = [byte_ids(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        states = torch.stack(model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1])
    return (states.mean(dim=2) if average else states[:, :, -1]).mean(dim=1)  # (L, N, T, H) -> (L, H)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_gates_are_unit_differences_of_mean_states_entering_each_layer(
    mode: str, config_class: type, tmp_path: Path
) -> None:
    save_base(tmp_path, config_class)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    average = mode == "hidden_avg"
    expected = []
    for expert in EXPERTS:
        vectors = prototypes(model, expert.positive, average)
        if expert.negative:
            vectors -= prototypes(model, expert.negative, average)
        expected.append(vectors.float() / vectors.float().norm(dim=-1, keepdim=True))
    gates = calibrated(tmp_path, mode)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, torch.stack(expected, dim=1), atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(gates.norm(dim=-1), torch.ones(LAYERS, len(EXPERTS)))


def test_hidden_last_is_another_name_of_hidden(base: Path) -> None:
    assert torch.equal(calibrated(base, "hidden"), calibrated(base, "hidden_last"))
    assert not torch.equal(calibrated(base, "hidden"), calibrated(base, "hidden_avg"))


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_a_calibration_goes_on_after_any_layer(mode: str, base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)

    def steps(after: Step | None = None) -> list[Step]:
        return list(calibrate_by_layer(mode, EXPERTS, config, tensors, evaluator, base, "cpu", after))

    whole = steps()
    assert torch.equal(torch.stack([step.gates for step in whole], dim=0), calibrated(base, mode))
    for number, step in enumerate(whole):
        rest = steps(step)
        assert [one.layer for one in rest] == list(range(number + 1, LAYERS))
        assert all(torch.equal(one.gates, whole[one.layer].gates) for one in rest)


def test_cheap_embed_sums_the_embeddings_of_all_tokens_but_padding(base: Path) -> None:
    tensors, _, evaluator = checkpoint_expressions(base)
    embedding = evaluator.tensor(tensors["model.embed_tokens.weight"]).float()

    def unit_sum(prompts: Sequence[str]) -> torch.Tensor:
        total = torch.stack([embedding[byte_ids(prompt)].sum(dim=0) for prompt in prompts]).sum(dim=0)
        return total / total.norm()

    gates = calibrated(base, "cheap_embed")
    for e, expert in enumerate(EXPERTS):
        vector = unit_sum(expert.positive)
        if expert.negative:
            vector = vector - unit_sum(expert.negative)
            vector = vector / vector.norm()
        for layer in range(LAYERS):
            torch.testing.assert_close(gates[layer, e], vector)


def test_cheap_embed_reads_the_embedding_alone(base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)

    class OnlyTheEmbedding(Evaluator):
        def flat(self, x: Any, start: int, stop: int) -> torch.Tensor:
            assert x.tensor == "model.embed_tokens.weight"
            return super().flat(x, start, stop)

    gates = calibrate("cheap_embed", EXPERTS, config, tensors, OnlyTheEmbedding(evaluator.files), base, 0, "cpu")
    assert gates[0].shape == (len(EXPERTS), HIDDEN)


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_gates_are_the_same_for_the_same_seed_and_need_no_files(mode: str, tmp_path: Path) -> None:
    config = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN}
    experts = [ExpertPrompts(())] * 4

    def drawn(seed: int) -> torch.Tensor:
        return torch.stack(list(calibrate(mode, experts, config, {}, Evaluator({}), tmp_path, seed).values()))

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    assert torch.equal(first, drawn(7))
    assert not torch.equal(first, drawn(8))
    assert first.shape == (LAYERS, 4, HIDDEN)


def test_random_gates_have_the_distributions_of_their_names() -> None:
    normal = np.stack(list(random_gates("random", 8, 8, 1024, seed=0).values()))
    assert abs(float(normal.mean())) < 0.02
    assert abs(float(normal.std()) - 1) < 0.02
    uniform = np.stack(list(random_gates("uniform_random", 8, 8, 1024, seed=0).values())) * math.sqrt(1024)
    assert float(np.abs(uniform).max()) <= 1
    assert abs(float(uniform.mean())) < 0.02
    assert abs(float(uniform.std()) - 1 / math.sqrt(3)) < 0.02


def test_random_gates_are_the_inverse_of_the_normal_distribution_and_never_change() -> None:
    u = np.array([1e-16, 1e-9, 0.01, 0.07, 0.3, 0.5, 0.9, 0.98, 1 - 1e-9])
    expected = [statistics.NormalDist().inv_cdf(x) for x in u]
    assert np.allclose(normal_quantile(u), expected, rtol=1e-14, atol=1e-15)
    drawn = random_gates("random", 1, 2, 4, seed=3)[0]
    assert [round(float(x), 6) for x in drawn.reshape(-1)] == [
        -2.174197, -0.234533, -0.837936, -1.300012, 0.506217, 0.307615, -0.392016, -1.058057,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "special",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"eos_token": "</s>"},
        {"pad_token": "<pad>"},
    ],
    ids=["no padding token", "no BOS", "neither BOS nor EOS"],
)
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_tokenizers_without_some_special_token_give_gates(mode: str, special: dict[str, str], tmp_path: Path) -> None:
    gates = calibrated(save_base(tmp_path, special=special), mode)
    assert torch.isfinite(gates).all()
    torch.testing.assert_close(gates.norm(dim=-1), torch.ones(LAYERS, len(EXPERTS)))


def test_a_tokenizer_without_any_special_token_pads_nothing_and_says_so(tmp_path: Path) -> None:
    save_base(tmp_path, special={})
    calibrated(tmp_path, "hidden", [ExpertPrompts(("abc", "def"))])
    with pytest.raises(SourceError, match="cannot be padded"):
        calibrated(tmp_path, "hidden", [ExpertPrompts(("abc", "de"))])


def test_a_prompt_of_one_token_gives_a_gate(tmp_path: Path) -> None:
    save_base(tmp_path, special={"eos_token": "</s>"})
    gates = calibrated(tmp_path, "hidden", [ExpertPrompts(("a",)), ExpertPrompts(("b",))])
    tensors, _, evaluator = checkpoint_expressions(tmp_path)
    embedding = evaluator.tensor(tensors["model.embed_tokens.weight"]).float()
    row = embedding[byte_ids("a")[1]]
    torch.testing.assert_close(gates[0, 0], row / row.norm())  # what enters the first layer is the embedding


def test_a_prompt_longer_than_the_context_is_refused_by_name(base: Path) -> None:
    fits = "x" * (CONTEXT - 1)  # and BOS
    calibrated(base, "hidden", [ExpertPrompts(("a", fits))])
    with pytest.raises(PromptError, match=r"expert 2: negative prompt 1 has 25 tokens.*reads 24"):
        calibrated(base, "hidden", [ExpertPrompts(("a",)), ExpertPrompts(("a",), (fits + "x",))])


def test_embeddings_take_a_prompt_of_any_length(base: Path) -> None:
    calibrated(base, "cheap_embed", [ExpertPrompts(("x" * 10 * CONTEXT,))])


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_missing_prompts_are_refused(mode: str, base: Path) -> None:
    with pytest.raises(PromptError, match="expert 2: positive prompts are missing"):
        calibrated(base, mode, [ExpertPrompts(("a",)), ExpertPrompts(())])


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path, special={"eos_token": "</s>"})
    with pytest.raises(PromptError, match="has no tokens"):
        calibrated(tmp_path, "hidden", [ExpertPrompts(("",))])


def test_a_folder_without_tokenizer_is_a_source_error(tmp_path: Path, base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)
    with pytest.raises(SourceError, match="tokenizer"):
        calibrate("hidden", EXPERTS, config, tensors, evaluator, tmp_path, 0, "cpu")


def test_a_tokenizer_larger_than_the_embedding_is_a_source_error(base: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(base)
    cut = dict(tensors)
    name = "model.embed_tokens.weight"
    cut[name] = type(tensors[name])(tensors[name].source, name, "BF16", (40, HIDDEN))  # type: ignore[union-attr,call-arg]
    config |= {"vocab_size": 40, "tie_word_embeddings": True}
    del cut["lm_head.weight"]
    with pytest.raises(SourceError, match="embedding has only 40 rows"):
        calibrate("cheap_embed", EXPERTS, config, cut, evaluator, base, 0, "cpu")


def test_a_base_that_gives_no_numbers_is_a_source_error(tmp_path: Path) -> None:
    save_base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.model.layers[0].input_layernorm.weight, math.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="not finite"):
        calibrated(tmp_path, "hidden")


def test_a_chat_template_is_never_rendered(tmp_path: Path) -> None:
    save_base(tmp_path)
    before = calibrated(tmp_path, "hidden")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('rendered') }}")
    assert torch.equal(calibrated(tmp_path, "hidden"), before)


def test_gates_do_not_depend_on_how_prompts_are_batched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mergekit, "HIDDEN_DTYPE", torch.float32)
    together = calibrated(base, "hidden_avg")
    monkeypatch.setattr(mergekit, "TOKENS_PER_BATCH", 1)
    torch.testing.assert_close(calibrated(base, "hidden_avg"), together)


def test_calibration_is_reproducible_to_the_bit(base: Path, tmp_path: Path) -> None:
    files = []
    for run in ("one", "two"):
        gates = dict(enumerate(calibrated(base, "hidden")))
        files.append(save_gates(gates, tmp_path / run, "ab" * 32, {"mode": "hidden", "base": "x"}).read_bytes())
    assert files[0] == files[1]


def test_saved_gates_are_an_ordinary_safetensors_file_of_their_own_name(base: Path, tmp_path: Path) -> None:
    gates = calibrated(base, "hidden")
    key = gates_key("hidden", EXPERTS, 0, "fingerprint")
    path = save_gates(dict(enumerate(gates)), tmp_path / "new", key, {"mode": "hidden"})
    assert path == gates_path(tmp_path / "new", key)
    assert path.name == f"gates-{key[:16]}.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": key, "mode": "hidden"}
        assert torch.equal(file.get_tensor("layers.1.gate"), gates[1])
    loaded = load_gates(path)
    assert list(loaded) == list(range(LAYERS))
    assert all(torch.equal(loaded[layer], gates[layer]) for layer in loaded)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "not gates"])
def test_a_damaged_gates_file_is_a_source_error(damage: str, tmp_path: Path) -> None:
    path = save_gates({0: torch.ones(2, 4)}, tmp_path, "cd" * 32, {})
    match damage:
        case "absent":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(path.read_bytes()[:-3])
        case _:
            path.write_bytes(path.read_bytes().replace(b"layers.0.gate", b"layers-0-gate"))
    with pytest.raises(SourceError, match="not a gates file"):
        load_gates(path)


def test_the_content_address_follows_everything_gates_are_made_from_and_nothing_else() -> None:
    key = gates_key("hidden", EXPERTS, 0, "base")
    assert len(key) == 64
    assert key == gates_key("hidden", EXPERTS, 1, "base") == gates_key("hidden_last", EXPERTS, 0, "base")
    swapped = (ExpertPrompts(EXPERTS[0].negative, EXPERTS[0].positive), *EXPERTS[1:])
    others = [
        gates_key("hidden_avg", EXPERTS, 0, "base"),
        gates_key("hidden", EXPERTS[::-1], 0, "base"),
        gates_key("hidden", swapped, 0, "base"),
        gates_key("hidden", EXPERTS[:2], 0, "base"),
        gates_key("hidden", EXPERTS, 0, "another"),
        gates_key("random", EXPERTS, 0, "base"),
        gates_key("random", EXPERTS, 1, "base"),
        gates_key("random", EXPERTS[:2], 0, "base"),
        gates_key("uniform_random", EXPERTS, 0, "base"),
    ]
    assert len({key, *others}) == len(others) + 1
    assert gates_key("random", EXPERTS, 0, "base") == gates_key("random", EXPERTS[::-1], 0, "base")


def test_base_files_are_those_a_mode_reads(base: Path) -> None:
    from merge.checkpoint import open_folder

    opened = open_folder(base)
    assert base_files("random", opened) == ()
    assert "model.safetensors" in base_files("cheap_embed", opened)
    assert "tokenizer.json" in base_files("hidden", opened)


def test_orthogonal_gates_are_well_conditioned_and_equal_ones_are_degenerate() -> None:
    orthogonal, equal, close = torch.eye(3, 8), torch.ones(2, 8), torch.eye(3, 8)
    close[2] = close[0] + 0.1 * close[2]
    good, bad, near, single = gate_report({0: orthogonal, 1: equal, 2: close, 3: torch.ones(1, 8)})
    assert (good.condition, good.is_degenerate) == (pytest.approx(1), False)
    assert bad.is_degenerate
    assert bad.cosine == pytest.approx(1)
    assert bad.pair == (0, 1)
    assert near.is_degenerate
    assert near.pair == (0, 2)
    assert (single.pair, single.cosine, single.is_degenerate) == (None, 0, False)


def test_more_experts_than_dimensions_and_gates_that_are_not_numbers_are_reported_not_raised() -> None:
    wide, broken = gate_report({0: torch.randn(8, 2), 1: torch.full((2, 4), math.nan)})
    assert wide.pair is not None
    assert broken.is_degenerate


def test_an_unknown_mode_is_a_mistake_of_the_caller(base: Path) -> None:
    with pytest.raises(ValueError, match="hiden"):
        calibrated(base, "hiden")


def recipe_file(base: Path, folder: Path, mode: str = "hidden") -> Path:
    path = folder / "small.yaml"
    experts = [
        {
            "source_model": str(base),
            "positive_prompts": list(expert.positive),
            "negative_prompts": list(expert.negative),
        }
        for expert in EXPERTS
    ]
    path.write_text(json.dumps({"base_model": str(base), "gate_mode": mode, "experts": experts}))
    return path


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_the_gates_command_prints_a_report_and_writes_the_gates_it_is_asked_for(
    mode: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gates.safetensors"
    assert main(["gates", str(recipe_file(base, tmp_path, mode)), "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"small: gates {mode}, {LAYERS} layers" in printed
    assert len([line for line in printed.splitlines() if " and " in line and line[:5].strip().isdigit()]) == LAYERS
    gates = load_gates(out)
    assert torch.equal(torch.stack(list(gates.values())), calibrated(base, mode))
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["key"][:16] in printed


def test_the_gates_command_names_the_prompt_that_is_too_long(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(base, tmp_path)
    path.write_text(path.read_text().replace("bonjour", "bonjour" * 10))
    assert main(["gates", str(path), "--device", "cpu"]) == 1
    assert "expert 3: positive prompt 1 has 71 tokens" in capsys.readouterr().err
