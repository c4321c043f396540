"""A real model with its real tokenizer, as a mixture that exists only as a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge.evaluate import Evaluator, checkpoint_expressions
from merge.expr import Expr, Gate
from quants.build import quantize
from quants.metadata import folder_info
from quants.proof import generate

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def test_two_experts_like_the_base_speak_as_the_base(smollm2: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2 / "moerge-demo" / "SmolLM2-135M-Instruct"
    dense, config, evaluator = checkpoint_expressions(folder)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    tensors: dict[str, Expr] = {}
    for name, x in dense.items():
        if ".mlp." not in name:
            tensors[name] = x
            continue
        block, part = name.removesuffix(".weight").split(".mlp.")
        tensors |= {f"{block}.block_sparse_moe.experts.{e}.{PARTS[part]}.weight": x for e in range(2)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = Gate(layer, "BF16", (2, hidden))
    random = torch.Generator().manual_seed(0)
    gates = {layer: torch.randn(2, hidden, generator=random) for layer in range(layers)}
    info = folder_info(folder, "Twice SmolLM2")
    files = quantize(
        config, tensors, Evaluator(evaluator.files, gates), folder, tmp_path, "Twice", ["BF16", "Q8_0"], info
    )
    prompt = "The capital of France is"
    ids = AutoTokenizer.from_pretrained(folder).encode(prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for file, tolerance in zip(files, (0.1, 0.3), strict=True):
        assert file.proof is not None
        said = generate(file.path, prompt, 8)
        assert said.prompt_tokens == len(ids)
        assert "Paris" in said.text
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *said.tokens]])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(8), list(said.tokens)]
        assert expected.tolist() == pytest.approx(list(said.logprobs), abs=tolerance)
        fields = GGUFReader(file.path).fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        assert fields["tokenizer.ggml.add_bos_token"].contents() is False


EVERY_DAY = ("deepseek", "granitemoe_swa")
OTHERS = ("dense", "qwen2_moe", "qwen3_moe", "granitemoe", "ernie4_5_moe", "cohere2_moe")


@pytest.mark.parametrize("case", [*EVERY_DAY, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_every_family_reads_text_as_the_real_tokenizer_does(case: str, smollm2: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    from bot.quants import open_model
    from tests.quants.cases import CASES
    from tests.quants.tiny import write_model

    real = smollm2 / "moerge-demo" / "SmolLM2-135M-Instruct"
    changes = {"vocab_size": 49152, "tie_word_embeddings": True}
    folder = write_model(tmp_path / "Tiny", CASES[case][0] | changes)
    for path in real.glob("*token*"):
        shutil.copy(path, folder / path.name)
    model = open_model(folder)
    (file,) = quantize(
        model.config,
        model.tensors,
        model.contents,
        folder,
        tmp_path,
        "Tiny",
        ["BF16"],
        folder_info(folder),
        prove=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(real)
    ids = tokenizer.encode("<|im_start|>user\nHow's 1234.5 + 67 in Zürich, naïve 🦙?<|im_end|>")
    said = generate(file.path, tokenizer.decode(ids), 2)
    assert said.prompt_tokens == len(ids)
    assert said.tokens == generate(file.path, ids, 2).tokens
