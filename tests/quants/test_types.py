"""Every file type there is: made with an importance matrix where it needs one, split, loaded, generating, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evals.quality import measure
from merge.errors import ProofError, SourceError
from merge.evaluate import checkpoint_expressions
from merge.forward import Batch
from quants import tokenizer as tokenizers
from quants.build import QuantFile, quantize
from quants.dequantised import dequantised
from quants.families import FAMILIES
from quants.filetypes import FILE_TYPES
from quants.imatrix import load_imatrix
from quants.layout import gguf_layout
from quants.metadata import ModelInfo
from quants.proof import generate
from quants.structure import check
from tests.quants.cases import CASES, PRE_TOKENIZER, write_imatrix
from tests.quants.tiny import PIECES, config, write_model

SMALL = {"num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": PIECES}


def build(folder: Path, out: Path, *types: str, with_imatrix: bool = False, **options: Any) -> list[QuantFile]:
    tensors, found, evaluator = checkpoint_expressions(folder)
    if with_imatrix:
        write_imatrix(folder / "imatrix.gguf", found)
        options["imatrix"] = load_imatrix(folder / "imatrix.gguf")
    return quantize(found, tensors, evaluator, folder, out, folder.name, types, ModelInfo(folder.name), **options)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["mixtral", "odd_rows"])
def test_all_types_run(shape: str, tmp_path: Path) -> None:
    """Of rows that fit every block, and of rows that fit none. tests/quants/test_trouble.py has the shapes of real models."""
    folder = write_model(tmp_path / shape, config(**SMALL) if shape == "mixtral" else CASES[shape][0])
    files = build(folder, tmp_path / "out", *FILE_TYPES, with_imatrix=True)
    assert [file.failure for file in files if file.failure] == []


def test_the_smallest_types_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(**SMALL))
    files = build(folder, tmp_path / "out", "IQ3_XXS", "IQ2_M", "Q2_K_S", with_imatrix=True)
    assert [file.failure for file in files] == [None] * 3
    assert (tmp_path / "out" / "Tiny-imatrix.gguf").is_file()


def test_a_type_that_needs_an_importance_matrix_is_refused_without(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(**SMALL))
    with pytest.raises(SourceError, match=r"IQ2_XS needs an importance matrix, and there is none for blk\.0"):
        build(folder, tmp_path / "out", "Q8_0", "IQ2_XS")
    assert not list((tmp_path / "out").iterdir())


def test_a_split_file_runs_and_says_the_same_as_a_whole_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES))
    (whole,) = build(folder, tmp_path / "whole", "Q8_0")
    (split,) = build(folder, tmp_path / "split", "Q8_0", max_bytes=2_000_000)
    names = [part.path.name for part in split.parts]
    assert names == [f"Tiny-Q8_0-{index:05d}-of-{len(names):05d}.gguf" for index in range(1, len(names) + 1)]
    assert len(names) > 2
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == names
    assert whole.proof is not None
    assert split.proof is not None
    assert split.proof.generation.tokens == whole.proof.generation.tokens
    assert all(part.bytes < 2_010_000 for part in split.parts[1:])


def test_a_file_too_large_for_the_machine_is_proven_by_its_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES))
    monkeypatch.setattr("quants.proof.available_memory", lambda: 1 << 20)
    (file,) = build(folder, tmp_path / "out", "Q4_K_M", max_bytes=1_000_000)
    assert file.proof is not None
    assert file.proof.kind == "structural"
    assert len(file.proof.generation.tokens) == 16
    assert sorted((tmp_path / "out").iterdir()) == sorted(part.path for part in file.parts)
    # A block that is not a number is found, wherever it is.
    tensors, found, _ = checkpoint_expressions(folder)
    layout = gguf_layout(found, tensors)
    paths, types = [part.path for part in file.parts], layout.types(FILE_TYPES["Q4_K_M"])
    check(paths, layout, types)
    from quants.structure import read_tensors

    at = int(read_tensors(paths)["blk.2.ffn_up_exps.weight"].data_offset)
    damaged = next(path for path in paths if "blk.2.ffn_up_exps.weight" in read_tensors([path]))
    with damaged.open("r+b") as opened:
        opened.seek(at)
        opened.write(b"\x00\x7e")  # half-precision NaN, the first block's scale
    with pytest.raises(ProofError, match=r"blk\.2\.ffn_up_exps\.weight has blocks that are not finite"):
        check(paths, layout, types)
    with pytest.raises(ProofError, match="should be"):
        check(paths, layout, layout.types(FILE_TYPES["Q8_0"]))


@pytest.mark.parametrize("family", sorted(CASES.keys() & FAMILIES.keys()))
def test_weights_read_back_from_a_file_are_the_checkpoints(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tokenizer, _ = CASES[family]
    if tokenizer == "byte_level":
        monkeypatch.setattr(tokenizers, "pre_tokenizer", lambda ids, where: PRE_TOKENIZER)
    folder = write_model(tmp_path / "Tiny", found, tokenizer)
    tensors, found, evaluator = checkpoint_expressions(folder)
    files = build(folder, tmp_path / "out", "BF16", "Q8_0", "Q2_K", prove=False)
    layout = gguf_layout(found, tensors)
    for file, error in zip(files, (0.0, 0.01, 0.35), strict=True):
        back, reader = dequantised([part.path for part in file.parts], layout, tensors)
        assert back.keys() == tensors.keys()
        for name, x in tensors.items():
            original = evaluator.tensor(x).float()
            again = reader.tensor(back[name])
            assert again.shape == original.shape
            assert (again - original).norm() <= error * original.norm(), f"{file.file_type} {name}"
            assert torch.equal(reader.rows(back[name], 0, 1), again[:1])


def test_fewer_bits_are_further_from_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES, dtype="float32"))
    tensors, found, evaluator = checkpoint_expressions(folder)
    files = build(folder, tmp_path / "out", "F32", "Q8_0", "Q4_K_M", "Q2_K", prove=False)
    layout = gguf_layout(found, tensors)
    random = torch.Generator().manual_seed(0)
    batches = [Batch(torch.randint(3, PIECES, (1, 40), generator=random)) for _ in range(3)]
    opened = {file.file_type: lambda file=file: dequantised([file.path], layout, tensors) for file in files}
    measured = measure(found, (tensors, evaluator), opened, batches, device="cpu")
    assert measured.tokens == 117
    qualities = [measured.quants[file.file_type] for file in files]
    assert qualities[0].kl == 0
    assert qualities[0].top1 == 1
    assert qualities[0].perplexity == pytest.approx(measured.perplexity)
    assert qualities[0].kl < qualities[1].kl < qualities[2].kl < qualities[3].kl
    assert qualities[1].top1 > qualities[3].top1
    # Less time, less text.
    assert measure(found, (tensors, evaluator), {}, batches, device="cpu", budget=0).tokens == 39


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("experts", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4, 8, 16))])
def test_families_agree_with_transformers(
    family: str, experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all experts chosen, where llama.cpp scales their weights otherwise than the family's models do."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(tokenizers, "pre_tokenizer", lambda ids, where: PRE_TOKENIZER)
    key = "num_local_experts" if family == "granitemoe" else "num_experts"
    chosen = experts if family == "qwen2_moe" else 2
    found = CASES[family][0] | {"dtype": "float32", key: experts, "num_experts_per_tok": chosen}
    folder = write_model(tmp_path / "Tiny", found, "byte_level")
    (file,) = build(folder, tmp_path, "F32", prove=False)
    prompt = [*range(259, 330, 3)]
    theirs = generate(file.path, prompt, 12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *theirs.tokens]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (12, vocabulary)
    ours = logprobs[torch.arange(12), list(theirs.tokens)]
    assert torch.all(ours > logprobs.amax(-1) - 0.01)
    for value, told in zip(ours.tolist(), theirs.logprobs, strict=True):
        assert told is None or value == pytest.approx(told, abs=0.01)


def test_experts_in_one_tensor_give_the_same_file(tmp_path: Path) -> None:
    """What mergekit-moe writes under transformers 5: the experts of a layer fused, under names of the module."""
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=2, vocab_size=PIECES))
    (plain,) = build(folder, tmp_path / "plain", "Q4_K_M", prove=False)
    weights = load_file(folder / "model.safetensors")
    fused = {name: x for name, x in weights.items() if "block_sparse_moe" not in name}
    for layer in range(2):
        at, to = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        parts = {
            w: torch.stack([weights[f"{at}.experts.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w2", "w3")
        }
        fused[f"{to}.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        fused[f"{to}.experts.down_proj"] = parts["w2"]
        fused[f"{to}.gate.weight"] = weights[f"{at}.gate.weight"]
    save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    (file,) = build(folder, tmp_path / "fused", "Q4_K_M")
    assert file.failure is None
    assert file.path.read_bytes() == plain.path.read_bytes()
