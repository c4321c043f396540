"""Tokenizers that cannot be carried over are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bot.quants import open_model
from merge.errors import SourceError
from quants.build import quantize
from quants.layout import gguf_layout
from quants.metadata import folder_info
from quants.proof import generate
from quants.tokenizer import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
    read_vocabulary,
    sentencepiece_pieces,
)
from tests.quants.real_tokenizer import REFERENCE, TEXTS, write_mistral
from tests.quants.smollm2 import summary
from tests.quants.tiny import PIECES, byte_fallback, byte_level, sentencepiece


def test_an_unknown_pre_tokenizer_is_an_error(tmp_path: Path) -> None:
    byte_level(tmp_path)
    with pytest.raises(SourceError, match="splits text"):
        read_vocabulary(tmp_path, 640)
    with pytest.raises(SourceError, match="somewhere"):
        pre_tokenizer([1, 2, 3], "somewhere")


@pytest.mark.parametrize("make", [byte_fallback, sentencepiece, byte_level])
def test_a_tokenizer_larger_than_the_embedding_is_an_error(make: object, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path)
    with pytest.raises(SourceError, match="only 300 rows"):
        read_vocabulary(tmp_path, 300)


@pytest.mark.parametrize("make", [byte_fallback, sentencepiece])
def test_rows_without_a_token_are_padded(make: object, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path)
    vocabulary = read_vocabulary(tmp_path, PIECES + 3)
    assert vocabulary.tokens[-2:] == (f"[PAD{PIECES + 1}]".encode(), f"[PAD{PIECES + 2}]".encode())
    assert vocabulary.types[-2:] == (UNUSED, UNUSED)
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == PIECES + 3


def test_added_tokens_of_a_sentencepiece_model_keep_their_kind(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"extra": PIECES + 1}))
    vocabulary = read_vocabulary(tmp_path, PIECES + 2)
    assert vocabulary.tokens[PIECES:] == (b"<|turn|>", b"extra")
    assert vocabulary.types[PIECES:] == (CONTROL, USER_DEFINED)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_vocabulary(tmp_path, 300)


@pytest.mark.parametrize("raw", [b"\x00", b"\x0a\xff", b"\x0a\x02\x12\x00", b"{}", b"\x0a\x80"])
def test_a_damaged_sentencepiece_model_is_an_error(raw: bytes) -> None:
    with pytest.raises(SourceError, match="SentencePiece"):
        list(sentencepiece_pieces(raw, "tokenizer.model"))


def test_damaged_settings_are_an_error(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": {}}}))
    with pytest.raises(SourceError, match="not as they should be"):
        read_vocabulary(tmp_path, 512)


def test_a_damaged_tokenizer_json_is_an_error(tmp_path: Path) -> None:
    byte_fallback(tmp_path)
    broken = json.loads((tmp_path / "tokenizer.json").read_text())
    broken["model"]["merges"] = ["not in vocabulary"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(SourceError, match="does not load"):
        read_vocabulary(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(SourceError, match="WordPiece"):
        read_vocabulary(tmp_path, 512)


def test_a_real_sentencepiece_tokenizer_is_carried_over_as_llama_cpp_does_and_reads_text_as_sentencepiece_does(
    tmp_path: Path,
) -> None:
    model = open_model(write_mistral(tmp_path / "Tiny"))
    info = folder_info(model.folder, parameters=gguf_layout(model.config, model.tensors).parameters)
    (file,) = quantize(
        model.config, model.tensors, model.contents, model.folder, tmp_path, "Tiny", ["BF16"], info, prove=False
    )
    recorded = json.loads(REFERENCE.read_text())
    assert summary(file.path)["keys"] == recorded["keys"]
    for text, ids in zip(TEXTS, recorded["ids"], strict=True):
        said = generate(file.path, text, 2)
        assert said.prompt_tokens == len(ids) + 1  # and the token that text begins with
        assert said.logprobs == generate(file.path, [1, *ids], 2).logprobs
