"""From a tokenizer's files to the vocabulary of a GGUF file.

Three kinds, told apart as llama.cpp's converter does: a SentencePiece model (tokenizer.model), the same in the form of a
tokenizer.json with byte fallback, and byte-level BPE. llama.cpp reimplements the splitting of text before BPE, and which
way a model splits can only be found by trying: the ids of a probe text, hashed, name it. An unknown hash is an error here,
for a wrong guess would give a model that reads text wrongly and says nothing.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge.checkpoint import load_json
from merge.errors import SourceError

# llama.cpp's token types, which are SentencePiece's own numbers (sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Scores of tokens that no merge makes: added ones, and rows without a token.
ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0

# The converter's probe text; the hashes below are of its ids.
# https://github.com/ggml-org/llama.cpp, conversion/base.py, get_vocab_base_pre
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 "
    "3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "  # noqa: RUF001
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
# sha256 of str(ids) to llama.cpp's name of the pre-tokenizer, for models of the architectures we write.
PRE_TOKENIZERS: Mapping[str, str] = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # Smaug Llama 3
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "c7ea5862a53e4272c035c8238367063e2b270d51faa48c0f09e9d5b54746c360": "poro-chat",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
}


# The architectures whose converter is Llama's.
LIKE_LLAMA = ("llama", "granitemoe")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer part of a GGUF file's metadata, one entry per row of the embedding.

    `model` is llama.cpp's kind (`llama` for SentencePiece, `gpt2` for byte-level BPE), `pre` its pre-tokenizer. `scores` is
    empty for BPE. `special` is gguf's SpecialVocab: merges, ids of the special tokens, chat template.
    """

    model: str
    pre: str
    tokens: tuple[bytes, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    special: Any
    add_space_prefix: bool | None = None
    add_bos: bool | None = None

    def add_to(self, writer: Any) -> None:
        """Adds the keys to a gguf.GGUFWriter."""
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        special = self.special
        if special.merges:
            writer.add_token_merges(special.merges)
        for kind, token_id in special.special_token_ids.items():
            getattr(writer, f"add_{kind}_token_id")(token_id)
        for kind, value in special.add_special_token.items():
            if kind in ("bos", "eos", "sep") and (kind != "bos" or self.add_bos is None):  # what llama.cpp has keys for
                getattr(writer, f"add_add_{kind}_token")(value)
        if special.chat_template is not None:
            writer.add_chat_template(special.chat_template)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)


def read_vocabulary(folder: Path, vocab_size: int, architecture: str = "llama") -> Vocabulary:
    """The vocabulary of the tokenizer in `folder` for an embedding of `vocab_size` rows, of a model of `architecture`.

    Rows without a token become `[PADn]`. Raises SourceError where there is no tokenizer, where it is larger than the
    embedding, or of a kind that llama.cpp (or we) do not know.
    """
    try:
        return _read(folder, vocab_size, architecture)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(f"{folder}: the tokenizer's files are not as they should be ({error!r})") from error


def _read(folder: Path, vocab_size: int, architecture: str) -> Vocabulary:
    config = _json(folder / "tokenizer_config.json")
    prefix = config.get("add_prefix_space")
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder, vocab_size, config)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = _json(folder / "tokenizer.json")
        model = tokenizer.get("model") or {}
        if model.get("type") != "BPE":
            raise SourceError(f"{folder}: a tokenizer of type {model.get('type')!r}, which llama.cpp cannot be given")
        byte_fallback = bool(model.get("byte_fallback"))
        vocabulary = (
            _byte_fallback_bpe(folder, vocab_size, tokenizer) if byte_fallback else _byte_level_bpe(folder, vocab_size)
        )
    else:
        raise SourceError(f"{folder}: neither tokenizer.json nor tokenizer.model is in it, so no GGUF can be made")
    if architecture not in LIKE_LLAMA:
        return vocabulary
    return _finish(vocabulary, vocab_size, prefix if isinstance(prefix, bool) else None)


def pre_tokenizer(ids: list[int], where: str) -> str:
    """llama.cpp's name of the pre-tokenizer that gave the probe text these ids. Raises SourceError for an unknown one."""
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    found = PRE_TOKENIZERS.get(digest)
    if found is None:
        raise SourceError(
            f"{where}: llama.cpp has no name for how this tokenizer splits text (probe {digest[:12]}…), so a GGUF would "
            "read text wrongly; use a base model with an unchanged Llama, Mistral or other known tokenizer"
        )
    return found


def _sentencepiece(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> Vocabulary:
    """A SentencePiece model with the tokens that were added to it in added_tokens.json and tokenizer_config.json."""
    import gguf

    pieces = list(sentencepiece_pieces((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model")))
    added = {int(index): token for token, index in _json(folder / "added_tokens.json").items()}
    decoder = {int(index): entry for index, entry in (config.get("added_tokens_decoder") or {}).items()}
    _check_size(folder, max([len(pieces) - 1, *added, *decoder]) + 1, vocab_size)
    tokens = [f"[PAD{index}]".encode() for index in range(vocab_size)]
    scores = [PAD_SCORE] * vocab_size
    types = [UNUSED] * vocab_size
    for index, (text, score, kind) in enumerate(pieces):
        # llama.cpp has no use for user-defined pieces of the model itself: the merges find them.
        tokens[index], scores[index], types[index] = text, score, NORMAL if kind == USER_DEFINED else kind
    for index, token in added.items():
        tokens[index], scores[index], types[index] = token.encode(), ADDED_SCORE, USER_DEFINED
    for index, entry in decoder.items():
        token = entry["content"]
        control = entry.get("special") or _looks_special(token)
        tokens[index] = (token if control else token.replace("▁", " ")).encode()
        scores[index], types[index] = ADDED_SCORE, CONTROL if control else USER_DEFINED
    special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), tuple(scores), special)


def sentencepiece_pieces(raw: bytes, where: str) -> Iterator[tuple[bytes, float, int]]:
    """Text, score and type of each piece of a SentencePiece model, in the order of their ids.

    Reads the two levels of protobuf that matter, field 1 (`pieces`) of ModelProto and fields 1 to 3 of each, so that the
    sentencepiece package is not needed. Raises SourceError where the bytes are not such a model.
    """
    try:
        for number, value in _protobuf_fields(raw):
            if number == 1:
                assert isinstance(value, bytes)
                fields = dict(_protobuf_fields(value))
                text, score, kind = fields[1], fields.get(2, bytes(4)), fields.get(3, NORMAL)
                if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                    raise ValueError("a piece of another form")
                yield text, struct.unpack("<f", score)[0], kind
    except (ValueError, KeyError, IndexError, AssertionError, struct.error):
        raise SourceError(f"{where}: not a SentencePiece model, or damaged") from None


def _protobuf_fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(raw):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length = varint()
        if length is None or at + length > len(raw):
            raise ValueError("not a protobuf message")
        yield key >> 3, raw[at : at + length]
        at += length


def _byte_level_bpe(folder: Path, vocab_size: int) -> Vocabulary:
    """GPT-2's kind of tokenizer: Llama 3, Mistral Nemo, SmolLM."""
    import gguf

    tokenizer = _load(folder)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    _check_size(folder, max(by_id, default=-1) + 1, vocab_size)
    pre = pre_tokenizer(tokenizer.encode(PROBE), str(folder))
    added = tokenizer.added_tokens_decoder
    tokens: list[bytes] = []
    types: list[int] = []
    for index in range(vocab_size):
        text = by_id.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]".encode())
            types.append(UNUSED)
        elif index not in added:
            tokens.append(text.encode())
            types.append(NORMAL)
        else:
            entry = added[index]
            if not entry.normalized:  # llama.cpp matches added tokens in normalised text
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            control = entry.special or _looks_special(text)
            tokens.append((text if control else text.replace("▁", " ")).encode())
            types.append(CONTROL if control else USER_DEFINED)
    special = gguf.SpecialVocab(folder, load_merges=True)
    return Vocabulary("gpt2", pre, tuple(tokens), tuple(types), (), special)


def _byte_fallback_bpe(folder: Path, vocab_size: int, file: Mapping[str, Any]) -> Vocabulary:
    """A SentencePiece model that has become a tokenizer.json: Llama 2, Mistral.

    llama.cpp joins the pair of the highest score first, so the scores are what remains of the merges' order: a token's is
    minus the rank of the first merge that makes it, which is how SentencePiece numbers them.
    """
    import gguf

    tokenizer = _load(folder)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    _check_size(folder, max(by_id, default=-1) + 1, vocab_size)
    special_ids = set(tokenizer.all_special_ids)
    added = set(tokenizer.added_tokens_decoder)
    base = set(file["model"]["vocab"].values())
    ranks = _merge_ranks(file["model"].get("merges") or ())
    tokens: list[bytes] = []
    types: list[int] = []
    scores: list[float] = []
    for index in range(vocab_size):
        text = by_id.get(index, f"[PAD{index}]")
        if index not in by_id:
            kind = UNUSED
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = BYTE
        elif index in special_ids:
            kind = CONTROL
        else:
            kind = USER_DEFINED if index in added and index not in base else NORMAL
        tokens.append(text.encode())
        types.append(kind)
        scores.append(-float(ranks.get(text, len(ranks))) if kind == NORMAL else ADDED_SCORE)
    special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), tuple(scores), special)


def _merge_ranks(merges: Iterable[Any]) -> dict[str, int]:
    """What each merge makes, with the rank of the first one that does. Merges are pairs, or texts with a space between."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return ranks


def _finish(vocabulary: Vocabulary, vocab_size: int, add_space_prefix: bool | None) -> Vocabulary:
    """What llama.cpp's converter adds for models of Llama's kind, known by the size of their vocabulary."""
    if vocab_size == 32016:  # Code Llama's infilling tokens
        ids = vocabulary.special.special_token_ids
        for kind, token_id in (("prefix", 32007), ("suffix", 32008), ("middle", 32009), ("eot", 32010)):
            ids.setdefault(kind, token_id)
    # A vocabulary of this size is StarCoder's kind (Granite code, SmolLM): text does not begin with BOS.
    return replace(vocabulary, add_space_prefix=add_space_prefix, add_bos=False if vocab_size == 49152 else None)


def _load(folder: Path) -> Any:
    """transformers' tokenizer of the folder. Raises SourceError where it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file provokes
        raise SourceError(f"{folder}: its tokenizer does not load ({error})") from None


def _check_size(folder: Path, tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise SourceError(
            f"{folder}: the tokenizer has {tokens} tokens, the embedding only {vocab_size} rows; remove the tokens that "
            "the model does not know, or resize the embedding"
        )


def _looks_special(token: str) -> bool:
    """Whether a token is a control token by its looks: some models do not mark theirs as special."""
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(start) and token.endswith(end)
        for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # noqa: RUF001
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    return load_json(path.read_bytes(), str(path))
