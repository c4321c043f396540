"""The importance matrix counts what each matrix is given, for every family and for every expert apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import SourceError
from merge.evaluate import checkpoint_expressions
from merge.forward import Batch, StreamedModel
from quants.activations import collect
from quants.families import FAMILIES
from quants.imatrix import Imatrix, check_imatrix, load_imatrix, save_imatrix
from quants.layout import Layout, gguf_layout
from tests.quants.cases import CASES
from tests.quants.tiny import PIECES, config, write_model


def collected(folder: Path, batches: list[Batch], memory: int | None = None) -> tuple[Layout, Imatrix]:
    tensors, found, evaluator = checkpoint_expressions(folder)
    layout = gguf_layout(found, tensors)
    model = StreamedModel(found, tensors, evaluator, device="cpu", memory=memory)
    return layout, collect(model, layout, batches, ["text"])


def batches(rows: int = 2, length: int = 24) -> list[Batch]:
    random = torch.Generator().manual_seed(0)
    return [Batch(torch.randint(3, PIECES, (1, length), generator=random)) for _ in range(rows)]


def test_sums_are_those_of_the_modules_inputs(tmp_path: Path) -> None:
    """Against hooks on transformers' own model, which has all of it in memory."""
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=2, vocab_size=PIECES, dtype="float32"))
    _, matrix = collected(folder, batches())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = seen.get(name, 0) + inputs[0].reshape(-1, inputs[0].shape[-1]).double().square().sum(0)

        return add

    attention = model.model.layers[1].self_attn
    attention.k_proj.register_forward_pre_hook(hook("blk.1.attn_k.weight"))
    attention.o_proj.register_forward_pre_hook(hook("blk.1.attn_output.weight"))
    model.model.layers[1].mlp.experts.register_forward_pre_hook(hook("experts"))
    with torch.inference_mode():
        for batch in batches():
            model(batch.input_ids)
    for name in ("blk.1.attn_k.weight", "blk.1.attn_output.weight"):
        assert np.allclose(matrix.sums[name][0], seen[name].numpy(), rtol=1e-4)
        assert matrix.counts[name].tolist() == [48]
    # Every token goes to two experts.
    gate, up = (matrix.sums[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    assert np.allclose(gate.sum(0), 2 * seen["experts"].numpy(), rtol=1e-4)
    assert np.array_equal(gate, up)
    assert matrix.counts["blk.1.ffn_down_exps.weight"].sum() == 96
    assert (matrix.sums["blk.1.ffn_down_exps.weight"].sum(1) > 0).tolist() == [
        count > 0 for count in matrix.counts["blk.1.ffn_down_exps.weight"]
    ]
    assert "output.weight" not in matrix.sums


# DeepSeek's first architecture has no class in transformers.
@pytest.mark.parametrize("family", ["dense", *sorted(CASES.keys() & FAMILIES.keys() - {"deepseek"})])
def test_every_matrix_of_every_family_is_reached(family: str, tmp_path: Path) -> None:
    found, tokenizer, _ = CASES[family]
    layout, matrix = collected(write_model(tmp_path / family, found, tokenizer), batches())
    check_imatrix(matrix, layout)
    for name, counts in matrix.counts.items():
        expected = 96 if "_exps" in name else 48
        if (
            found.get("kv_lora_rank") and "_b." in name
        ):  # each head's values are made of the latent; keys go into the queries
            expected = {"k": 0, "v": 48 * 8}.get(name.split("_")[1], 48)
        assert counts.sum() == expected, name
        assert np.isfinite(matrix.importance()[name]).all()


@pytest.mark.parametrize("family", ["experts_1", *sorted(CASES.keys() & FAMILIES.keys() - {"deepseek"})])
def test_experts_that_come_one_at_a_time_are_told_apart(family: str, tmp_path: Path) -> None:
    found, tokenizer, _ = CASES[family]
    folder = write_model(tmp_path / family, found, tokenizer)
    (_, whole), (_, one_by_one) = collected(folder, batches()), collected(folder, batches(), memory=0)
    for name, sums in whole.sums.items():
        np.testing.assert_array_equal(one_by_one.counts[name], whole.counts[name])
        np.testing.assert_allclose(one_by_one.sums[name], sums, rtol=1e-5)


def test_an_expert_that_no_token_reaches_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    weights = load_file(folder / "model.safetensors")
    router = "model.layers.0.block_sparse_moe.gate.weight"
    weights[router][2] = weights["model.layers.0.post_attention_layernorm.weight"] * 0
    weights[router][[0, 1, 3]] = torch.randn(3, 256).to(torch.bfloat16) * 10
    weights[router][0] = -weights[router][1]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Of two opposite experts one is above zero for any token, of the other two one is nearly always.
    _, matrix = collected(folder, batches(1, 4))
    counts = matrix.counts["blk.0.ffn_gate_exps.weight"]
    assert matrix.dead_experts() == ({0: tuple(np.flatnonzero(counts == 0).tolist())} if (counts == 0).any() else {})
    for expert in np.flatnonzero(counts == 0):
        assert (matrix.importance()["blk.0.ffn_gate_exps.weight"][expert] == 1).all()


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    _, matrix = collected(folder, batches())
    save_imatrix(matrix, tmp_path / "imatrix.gguf")
    back = load_imatrix(tmp_path / "imatrix.gguf")
    assert (back.chunks, back.chunk_size, back.datasets) == (2, 24, ("text",))
    for name in matrix.sums:
        assert np.array_equal(back.sums[name], matrix.sums[name])
        assert np.array_equal(back.counts[name], matrix.counts[name])
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SourceError, match="not a GGUF importance matrix"):
        load_imatrix(tmp_path / "broken.gguf")
    other = gguf_layout(*_headers(config(num_hidden_layers=1, num_local_experts=2, vocab_size=PIECES)))
    with pytest.raises(SourceError, match="it is of another"):
        check_imatrix(back, other)


def _headers(found: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from tests.quants.test_layout import headers

    return found, headers(found)
