"""Whole files: they run in llama.cpp and agree with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merge.errors import DestinationError, ProofError, SourceError, UsageError
from merge.evaluate import checkpoint_expressions
from quants import tokenizer as tokenizers
from quants.build import QuantFile, quantize
from quants.filetypes import FILE_TYPES
from quants.layout import gguf_layout, predict_sizes
from quants.metadata import ModelInfo, folder_info
from quants.mixtures import quantised_bytes
from quants.proof import generate
from tests.quants.cases import CASES
from tests.quants.tiny import PIECES, config, write_model

# One type of each kind of block; tests/quants/test_types.py has the others.
SOME_TYPES = ("F32", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "Q4_0")


def build(folder: Path, out: Path, *types: str, **options: Any) -> list[QuantFile]:
    tensors, found, evaluator = checkpoint_expressions(folder)
    return quantize(found, tensors, evaluator, folder, out, folder.name, types, ModelInfo(folder.name), **options)


def test_every_file_type_runs_and_has_the_predicted_size(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES))
    tensors, found, _ = checkpoint_expressions(folder)
    layout = gguf_layout(found, tensors)
    predicted = predict_sizes(found, tensors, SOME_TYPES).files
    seen: list[int] = []
    files = build(folder, tmp_path / "out", *SOME_TYPES, progress=seen.append)
    assert [file.path.name for file in files] == [f"Tiny-{name}.gguf" for name in SOME_TYPES]
    for file in files:
        assert file.proof is not None
        assert file.proof.kind == "ran"
        assert len(file.proof.generation.tokens) == 16
        assert file.bytes == file.path.stat().st_size
        # Tensor data is exact; what precedes it is metadata.
        data = quantised_bytes(FILE_TYPES[file.file_type], layout.shapes, layout.model)
        assert _data_bytes(file.path) == data
        assert abs(predicted[file.file_type] - file.bytes) < 16_384
    assert sorted(tmp_path.glob("out/*")) == sorted(file.path for file in files)
    assert 0 <= sum(file.bytes for file in files) - sum(seen) < 32_768 * len(files)


@pytest.mark.parametrize("case", ["open_llama", "tied_open_llama", "odd_rows", "head_dim", "llama3_rope", "dense"])
def test_unusual_shapes_run(case: str, tmp_path: Path) -> None:
    found, tokenizer, _ = CASES[case]
    (file,) = build(write_model(tmp_path / case, found, tokenizer), tmp_path, "Q4_K_M")
    assert file.proof is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_local_experts": 2, "tie_word_embeddings": True},
        {"num_local_experts": 16, "num_experts_per_tok": 3, "num_hidden_layers": 1},
        {"head_dim": 64, "num_key_value_heads": 8},
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        },
    ],
    ids=["grouped heads", "tied", "16 experts", "head_dim", "llama3 rope"],
)
def test_llama_cpp_and_transformers_agree(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES, dtype="float32", **changes))
    (file,) = build(folder, tmp_path, "F32", prove=False)
    prompt = [1, *range(259, 330, 3)]
    theirs = generate(file.path, prompt, 12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *theirs.tokens]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (12, vocabulary)
    ours = logprobs[torch.arange(12), list(theirs.tokens)]
    # llama.cpp keeps keys and values in half precision.
    assert torch.all(ours > logprobs.amax(-1) - 0.01)
    for value, told in zip(ours.tolist(), theirs.logprobs, strict=True):
        assert told is None or value == pytest.approx(told, abs=0.01)


@pytest.mark.parametrize("kind", ["byte_fallback", "sentencepiece", "byte_level"])
def test_llama_cpp_reads_text_as_transformers_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    if kind == "byte_level":
        monkeypatch.setattr(tokenizers, "pre_tokenizer", lambda ids, where: "gpt-2")
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=640), kind)
    (file,) = build(folder, tmp_path, "BF16", prove=False)
    # transformers has no reader for a tokenizer.model alone; the other kind has the same vocabulary.
    reader = write_model(tmp_path / "Reader", config(num_hidden_layers=1), "byte_fallback")
    tokenizer = AutoTokenizer.from_pretrained(reader if kind == "sentencepiece" else folder)
    for text in ("many small experts", "language and Paris: 42!", "there, then parish, ünder łand 🦙"):
        from_text = generate(file.path, text, 4)
        ids = tokenizer.encode(text)
        assert from_text.prompt_tokens == len(ids)
        assert from_text.tokens == generate(file.path, ids, 4).tokens
        assert from_text.logprobs == generate(file.path, ids, 4).logprobs


def test_metadata_says_what_the_caller_says(tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [moe, merge]\nbase_model: owner/Some-7B\n---\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.9}')
    tensors, found, evaluator = checkpoint_expressions(folder)
    info = folder_info(folder, "My Model")
    (file,) = quantize(found, tensors, evaluator, folder, tmp_path, "My-Model", ["BF16"], info, prove=False)
    fields = {name: field.contents() for name, field in GGUFReader(file.path).fields.items()}
    assert fields["general.name"] == "My Model"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.tags"] == ["moe", "merge"]
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/owner/Some-7B"
    assert fields["general.sampling.temp"] == pytest.approx(0.5)
    assert fields["general.size_label"] == "4x743K"


def test_a_file_that_does_not_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))

    def refuse(*_: object, **__: object) -> None:
        raise ProofError("it does not run")

    monkeypatch.setattr("quants.proof.generate", refuse)
    files = build(folder, tmp_path / "out", "BF16")
    assert [file.failure for file in files] == ["it does not run"]
    assert not list((tmp_path / "out").iterdir())


def test_front_matter_with_aliases_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    (folder / "README.md").write_text("---\na: &a [x]\ntags: [*a, *a]\n---\n")
    with pytest.raises(SourceError, match="front matter"):
        folder_info(folder)


@pytest.mark.parametrize(
    ("rope", "message"),
    [({"rope_type": "dynamic", "factor": 2.0}, "'dynamic', which"), ({"rope_type": "linear"}, "factor")],
)
def test_rotary_scaling_that_a_file_cannot_say_is_refused(rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    found = config(num_hidden_layers=1, vocab_size=PIECES)
    folder = write_model(tmp_path / "Tiny", found)
    tensors, _, evaluator = checkpoint_expressions(folder)
    found["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    with pytest.raises(SourceError, match=message):
        quantize(found, tensors, evaluator, folder, tmp_path / "out", "Tiny", ["BF16"], ModelInfo("Tiny"))


def test_wrong_calls_are_refused_before_any_work(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    with pytest.raises(UsageError, match="Q4_K_M"):
        build(folder, tmp_path, "Q4_K_X")
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError):
        build(folder, tmp_path / "file" / "out", "BF16")


def _data_bytes(path: Path) -> int:
    from gguf import GGUFReader

    return path.stat().st_size - int(GGUFReader(path).data_offset)
