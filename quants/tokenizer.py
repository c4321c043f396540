"""From a tokenizer's files to the vocabulary of a GGUF file.

Three kinds, told apart as llama.cpp's converter does: a SentencePiece model (tokenizer.model), the same in the form of a
tokenizer.json with byte fallback, and byte-level BPE. llama.cpp reimplements the splitting of text before BPE, and which
way a model splits can only be found by trying: the ids of a probe text, hashed, name it (quants.pre_tokenizers). An unknown hash is an error here,
for a wrong guess would give a model that reads text wrongly and says nothing.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge.checkpoint import load_json
from merge.collector import paused_collector
from merge.errors import SourceError
from merge.gates import load_tokenizer
from quants.pre_tokenizers import PRE_TOKENIZERS, PROBE

# llama.cpp's token types, which are SentencePiece's own numbers (sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Scores of tokens that no merge makes: added ones, and rows without a token.
ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0

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
        with paused_collector():
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
            _byte_fallback_bpe(folder, vocab_size, tokenizer)
            if byte_fallback
            else _byte_level_bpe(folder, vocab_size, tokenizer)
        )
    else:
        raise SourceError(f"{folder}: neither tokenizer.json nor tokenizer.model is in it, so no GGUF can be made")
    if architecture not in LIKE_LLAMA:
        return vocabulary
    return _finish(vocabulary, vocab_size, prefix if isinstance(prefix, bool) else None)


def pre_tokenizer(ids: list[int], where: str) -> str:
    """llama.cpp's name of the pre-tokenizer that gave the probe text these ids. Raises SourceError for an unknown one."""
    found = pre_tokenizer_of(ids)
    if found is None:
        raise SourceError(
            f"{where}: llama.cpp has no name for how this tokenizer splits text (probe {_digest(ids)[:12]}…), so a GGUF would "
            "read text wrongly; use a base model with an unchanged tokenizer of a kind that is known"
        )
    return found


def pre_tokenizer_of(ids: list[int]) -> str | None:
    """Like `pre_tokenizer`; None for an unknown one."""
    return PRE_TOKENIZERS.get(_digest(ids))


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(str(ids).encode()).hexdigest()


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


def _byte_level_bpe(folder: Path, vocab_size: int, file: Mapping[str, Any]) -> Vocabulary:
    """GPT-2's kind of tokenizer: Llama 3, Mistral Nemo, SmolLM."""
    import gguf

    tokenizer = _load(folder)
    by_id, added = tokenizer.tokens, tokenizer.added
    _check_size(folder, max(by_id, default=-1) + 1, vocab_size)
    pre = pre_tokenizer(tokenizer.encode(PROBE, True), str(folder))
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
                text = tokenizer.decode(tokenizer.encode(text, False))
            control = entry.special or _looks_special(text)
            tokens.append((text if control else text.replace("▁", " ")).encode())
            types.append(CONTROL if control else USER_DEFINED)
    merges = file["model"].get("merges")
    special = gguf.SpecialVocab(folder, load_merges=not merges)
    if merges:
        special.merges = [_merge_text(merge) for merge in merges]
    return Vocabulary("gpt2", pre, tuple(tokens), tuple(types), (), special)


def _byte_fallback_bpe(folder: Path, vocab_size: int, file: Mapping[str, Any]) -> Vocabulary:
    """A SentencePiece model that has become a tokenizer.json: Llama 2, Mistral.

    llama.cpp joins the pair of the highest score first, so the scores are what remains of the merges' order: a token's is
    minus the rank of the first merge that makes it, which is how SentencePiece numbers them.
    """
    import gguf

    tokenizer = _load(folder)
    by_id, special_ids, added = tokenizer.tokens, tokenizer.special, tokenizer.added
    _check_size(folder, max(by_id, default=-1) + 1, vocab_size)
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


def _merge_text(merge: Any) -> str:
    """A merge as GGUF has it, with a space between its parts: a space in one of them is written as bytes are."""
    return merge if isinstance(merge, str) else " ".join([part.replace(" ", "Ġ") for part in merge])


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


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tokenizer that has been loaded: its tokens by id, those that were added, the ids of the special ones, and text in and
    out. `encode` adds special tokens where told to."""

    tokens: Mapping[int, str]
    added: Mapping[int, Any]
    special: frozenset[int]
    encode: Callable[[str, bool], list[int]]
    decode: Callable[[list[int]], str]


def _load(folder: Path) -> _Reader:
    """The tokenizer of a folder with a tokenizer.json. Raises SourceError where it does not load.

    transformers takes two seconds to import and builds some tokenizers anew from their tokens. The file itself says the
    same where tokenizer_config.json adds no token to it, and llama.cpp knows how it splits text.
    """
    from tokenizers import Tokenizer

    config = _json(folder / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises its bare Exception
        raise SourceError(f"{folder}: its tokenizer does not load ({error})") from None
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab()
    named = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    named += config.get("additional_special_tokens") or ()
    texts = {token.get("content") if isinstance(token, dict) else token for token in named if token is not None}
    texts |= {token.get("content") for token in (config.get("added_tokens_decoder") or {}).values()}
    byte_level = pre_tokenizer_of(tokenizer.encode(PROBE).ids)
    if texts - vocabulary.keys() or not (byte_level or tokenizer.model.byte_fallback):
        return _load_with_transformers(folder)
    return _Reader(
        {index: token for token, index in vocabulary.items()},
        added,
        frozenset(index for index, token in added.items() if token.special or token.content in texts),
        lambda text, special: list(tokenizer.encode(text, add_special_tokens=special).ids),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
    )


def _load_with_transformers(folder: Path) -> _Reader:
    tokenizer = load_tokenizer(folder)
    return _Reader(
        {index: token for token, index in tokenizer.get_vocab().items()},
        tokenizer.added_tokens_decoder,
        frozenset(tokenizer.all_special_ids),
        lambda text, special: list(tokenizer.encode(text, add_special_tokens=special)),
        lambda ids: str(tokenizer.decode(ids)),
    )


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
