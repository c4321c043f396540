"""What a checkpoint must have to become a GGUF file, and what preview knows from its headers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge.errors import SourceError
from merge.expr import Expr, Read
from quants.filetypes import FILE_TYPES, TENSOR_TYPES, tensor_bytes
from quants.layout import gguf_layout, predict_sizes
from quants.mixtures import ModelShape, tensor_types
from quants.nodes import Stack
from tests.quants.tiny import config, shapes


def headers(found: dict[str, Any]) -> dict[str, Expr]:
    return {name: Read("model", name, "BF16", shape) for name, shape in shapes(found).items()}


def test_experts_are_stacked_and_tied_embeddings_have_no_output() -> None:
    found = config(tie_word_embeddings=True)
    layout = gguf_layout(found, headers(found))
    tensors = {tensor.name: tensor.expr for tensor in layout.tensors}
    assert "output.weight" not in tensors
    down = tensors["blk.2.ffn_down_exps.weight"]
    assert isinstance(down, Stack)
    assert down.shape == (4, 256, 512)
    assert [x.tensor for x in down.xs if isinstance(x, Read)] == [
        f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)
    ]
    assert layout.parameters == sum(
        x.shape[0] * (x.shape[1] if len(x.shape) > 1 else 1) for x in headers(found).values()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"output_norm\.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"output\.weight"),
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            "config.json says 4 experts",
        ),
        (lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"), "k_proj"),
        (lambda tensors: tensors.update(other=Read("m", "other", "BF16", (2, 2))), "'other' has no place"),
        (
            lambda tensors: tensors.update({"model.layers.3.input_layernorm.weight": Read("m", "x", "BF16", (256,))}),
            "beyond the 3 layers",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": Read("m", "x", "F8_E4M3", (256,))}),
            "F8_E4M3",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.experts.gate_up_proj": Read("m", "x", "BF16", (4, 1024, 256))}
            ),
            "'model.layers.0.mlp.experts.gate_up_proj' is in the checkpoint twice|has the experts|is in the checkpoint twice",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(change: Any, message: str) -> None:
    tensors = headers(config())
    change(tensors)
    with pytest.raises(SourceError, match=message):
        gguf_layout(config(), tensors)


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(SourceError, match="'gpt_neox'; supported are cohere2_moe, deepseek"):
        gguf_layout(config(model_type="gpt_neox"), headers(config()))


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    with pytest.raises(SourceError, match="gelu"):
        gguf_layout(config(hidden_act="gelu"), headers(config()))


def test_wrong_head_counts_are_refused() -> None:
    with pytest.raises(SourceError, match="key-value heads"):
        gguf_layout(config(num_key_value_heads=4), headers(config()))


def test_mixtral_8x7b_has_its_known_sizes() -> None:
    found = config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, vocab_size=32000,
    )  # fmt: skip
    tensors = headers(found)
    assert gguf_layout(found, tensors).parameters == 46_702_792_704
    predicted = predict_sizes(found, tensors, ["Q8_0", "Q4_K_M"]).files
    # As published for Mixtral-8x7B-Instruct-v0.1 by current versions of llama.cpp: 49.6 and 28.4 GB.
    assert predicted["Q8_0"] == pytest.approx(49.62e9, rel=0.002)
    assert predicted["Q4_K_M"] == pytest.approx(28.45e9, rel=0.005)


@given(
    st.sampled_from(sorted(FILE_TYPES)),
    st.integers(1, 2000),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 90),
)
def test_every_tensor_gets_a_type_that_divides_its_rows(
    kind: str, row: int, rows: int, experts: int, layers: int
) -> None:
    found = {f"blk.{layer}.ffn_down_exps.weight": (experts, rows, row) for layer in range(layers)}
    found |= {f"blk.{layer}.attn_v.weight": (rows, row) for layer in range(layers)}
    found |= {"token_embd.weight": (rows, row)}
    types = tensor_types(FILE_TYPES[kind], found, ModelShape(layers, experts, 4, 2))
    for name, shape in found.items():
        stored = TENSOR_TYPES[types[name]]
        assert tensor_bytes(types[name], shape) * stored.elements == stored.nbytes * rows * row * (
            experts if len(shape) == 3 else 1
        )


def test_headers_alone_need_no_torch() -> None:
    code = "import sys, quants.filetypes, quants.layout; print('torch' in sys.modules, 'numpy' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert finished.stdout.split() == ["False", "False"]
