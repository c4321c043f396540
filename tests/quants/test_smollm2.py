"""A real model with its real tokenizer, as a mixture that exists only as a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quants.build import imatrix_path, quantize
from quants.families import FAMILIES
from quants.filetypes import FILE_TYPES
from quants.imatrix import load_imatrix
from quants.layout import gguf_layout
from quants.metadata import folder_info
from quants.proof import generate
from tests.quants.cases import CASES, write_imatrix
from tests.quants.smollm2 import (
    BASE,
    FIRST_LAYERS,
    PLAIN,
    WEIGHED,
    WHOLE,
    mixture,
    recorded,
    summary,
    write_small_files,
)

# What says which file the importance matrix was in.
OF_IMATRIX = "quantize.imatrix.file"


def test_two_experts_like_the_base_speak_as_the_base(smollm2: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2 / "moerge-demo" / "SmolLM2-135M-Instruct"
    config, tensors, contents = mixture(folder)
    info = folder_info(folder, "Twice SmolLM2")
    files = quantize(config, tensors, contents, folder, tmp_path, "Twice", ["BF16", "Q8_0"], info)
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


@pytest.mark.parametrize(
    ("model", "types", "weighed"),
    [
        ("whole", ("BF16", "Q8_0"), False),
        pytest.param("whole", ("Q4_K_M",), False, marks=pytest.mark.slow),
        pytest.param("whole", ("Q4_K_M",), True, marks=pytest.mark.slow),
        pytest.param("first", PLAIN, False, marks=pytest.mark.slow),
        pytest.param("first", WEIGHED, True, marks=pytest.mark.slow),
    ],
)
def test_a_real_model_s_files_are_those_of_llama_cpp_key_by_key_and_byte_by_byte(
    model: str, types: tuple[str, ...], weighed: bool, smollm2: Path, tmp_path: Path
) -> None:
    base, folder = smollm2 / "moerge-demo" / BASE, tmp_path / "Mixture"
    config, tensors, contents = mixture(base, 1, FIRST_LAYERS if model == "first" else None)
    write_small_files(base, folder, config)
    info = folder_info(folder, parameters=gguf_layout(config, tensors).parameters)
    imatrix = None
    if weighed:
        write_imatrix(tmp_path / "imatrix.gguf", config)
        imatrix = load_imatrix(tmp_path / "imatrix.gguf")
    files = quantize(config, tensors, contents, folder, tmp_path, "Mixture", types, info, prove=False, imatrix=imatrix)
    for file in files:
        ours, theirs = summary(file.path), recorded(model, f"{file.file_type}+imatrix" if weighed else file.file_type)
        assert ours["tensors"] == theirs["tensors"], file.file_type
        if weighed:
            assert ours["keys"].pop(OF_IMATRIX) == imatrix_path(tmp_path, "Mixture").name
            assert theirs["keys"].pop(OF_IMATRIX) == "imatrix.gguf"
        assert ours["keys"] == theirs["keys"], file.file_type
        file.path.unlink()


def test_each_type_gives_a_real_model_s_tensors_the_types_of_llama_quantize(smollm2: Path) -> None:
    config, tensors, _ = mixture(smollm2 / "moerge-demo" / BASE, shift=1)
    layout = gguf_layout(config, tensors)
    for kind in (*PLAIN, *(f"{name}+imatrix" for name in WEIGHED)):
        name, _, imatrix = kind.partition("+")
        if name in WHOLE or not FILE_TYPES[name].is_quantised:
            continue  # the files are compared
        theirs = recorded("whole", kind)
        others = {tensor: of for of, names in theirs["others"].items() for tensor in names}
        ours = layout.types(FILE_TYPES[name], bool(imatrix))
        assert {tensor: of for tensor, of in ours.items() if of != "F32"} == {
            tensor: others.get(tensor, theirs["most"]) for tensor, of in ours.items() if of != "F32"
        }, kind


EVERY_DAY = ("deepseek", "granitemoe_swa")
OTHERS = tuple(sorted({"dense", *CASES} & {"dense", *FAMILIES} - set(EVERY_DAY)))


@pytest.mark.parametrize("case", [*EVERY_DAY, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_every_family_reads_text_as_the_real_tokenizer_does(case: str, smollm2: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    from bot.quants import open_model
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
