"""Prompts: what an expert is for, in text; the tokenizer; and prompts as the token sequences a router is fitted on."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.collector import paused_collector
from merge.errors import MoergeError, SourceError

# A longer text is cut into pieces: attention's cost grows with the square of the length, and routing is local.
WINDOW = 1024
# Of one expert's positive or negative texts so many tokens are used, taken evenly: more change the router hardly at all.
MAX_TOKENS = 8192


class PromptError(MoergeError):
    """A prompt that no gate can be made of."""

    exit_code = 1


@dataclass(frozen=True)
class ExpertPrompts:
    """What should go to an expert, and what should not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of calibration text: token ids (BOS first where the tokenizer has one), whose it is, which of the expert's
    prompts it came from, and how many tokens of it (a BOS) say nothing about it."""

    ids: tuple[int, ...]
    expert: int
    positive: bool
    prompt: int
    skipped: int

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.skipped


@dataclass(frozen=True)
class Texts:
    """All calibration text, and what had to be done to it: numbers of the experts (from 1) whose texts were cut into
    pieces, or thinned out; and whether each begins with a BOS."""

    texts: tuple[Text, ...]
    cut: tuple[int, ...] = ()
    thinned: tuple[int, ...] = ()
    has_bos: bool = True


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, from files alone: no code of the model's is run. Raises SourceError without one."""
    from transformers import AutoTokenizer

    try:
        with paused_collector():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer's classes raise whatever their parsers raise
        raise SourceError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from None


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text`, BOS first where the tokenizer has one, no other special token."""
    # No warning about the length: whoever calls knows what to do with a long text.
    ids: list[int] = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def calibration_texts(tokenizer: Any, experts: Sequence[ExpertPrompts], config: Mapping[str, Any]) -> Texts:
    """The prompts of all experts as token sequences that fit the model's context.

    Raises PromptError where a prompt has no tokens or an expert no prompts.
    """
    window = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
    found: list[Text] = []
    cut, thinned = [], []
    for number, expert in enumerate(experts):
        for positive, prompts in ((True, expert.positive), (False, expert.negative)):
            pieces: list[Text] = []
            for prompt, text in enumerate(prompts):
                made = _pieces(tokenizer, text, window, number, positive, prompt)
                if not made:
                    kind = "positive" if positive else "negative"
                    raise PromptError(
                        f"expert {number + 1}: {kind} prompt {prompt + 1} has no tokens: write some text, or take the "
                        "prompt out"
                    )
                cut += [number + 1] * (len(made) > 1)
                pieces += made
            kept = _thin(pieces)
            thinned += [number + 1] * (len(kept) < len(pieces))
            found += kept
        if not expert.positive:
            raise PromptError(
                f"expert {number + 1}: positive prompts are missing: this gate mode makes the router from them"
            )
    has_bos = tokenizer.bos_token_id is not None
    return Texts(tuple(found), tuple(dict.fromkeys(cut)), tuple(dict.fromkeys(thinned)), has_bos)


def _pieces(tokenizer: Any, text: str, window: int, expert: int, positive: bool, prompt: int) -> list[Text]:
    ids = tokenize(tokenizer, text)
    bos = ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []
    body = ids[len(bos) :]
    step = max(1, window - len(bos))
    pieces = [(*bos, *body[start : start + step]) for start in range(0, len(body), step)]
    # Without a BOS the first token takes its place: all others attend to it, and its activation says little of the text.
    return [Text(piece, expert, positive, prompt, len(bos) or int(len(piece) > 1)) for piece in pieces]


def _thin(pieces: Sequence[Text]) -> list[Text]:
    """Every n-th piece, so that about MAX_TOKENS are left."""
    total = sum(piece.tokens for piece in pieces)
    return list(pieces[:: -(-total // MAX_TOKENS)]) if total > MAX_TOKENS else list(pieces)


def read_prompts(
    raw: bytes, name: str, field: str = "text", limit: int | None = None, cut: bool = False
) -> tuple[str, ...]:
    """The prompts in a file of texts, by its name's ending.

    `.jsonl`: one JSON value per line, a text or an object whose `field` is the text; `.json`: a list of such; `.csv`: a table
    whose column `field` has the texts; otherwise plain text with a blank line between prompts. At most `limit` of them. With
    `cut` the file goes on after `raw`, and its last, broken record is left out. Raises PromptError where it is not such a
    file.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=not cut)
        values: list[Any]
        if name.endswith(".jsonl"):
            lines = [line for line in text.split("\n")[: -1 if cut else None] if line.strip()]
            values = [json.loads(line) for line in lines[:limit]]
        elif name.endswith(".json"):
            if cut:
                raise PromptError(f"{name}: too large to be read in part; take a .jsonl file")
            values = json.loads(text)[:limit]
        elif name.endswith(".csv"):
            values = list(itertools.islice(csv.DictReader(io.StringIO(text), strict=not cut), limit and limit + cut))
            values = values[: -1 if cut and len(values) != (limit or 0) + 1 else limit]
        else:
            values = [part.strip("\n") for part in _paragraphs(text)[: -1 if cut else None]][:limit]
        prompts = tuple(value if isinstance(value, str) else value[field] for value in values)
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        problem = f"no field {field!r}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise PromptError(f"{name}: not a file of prompts ({problem})") from None
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise PromptError(f"{name}: field {field!r} is not a text everywhere")
    prompts = tuple(prompt for prompt in prompts if prompt.strip())
    if not prompts:
        raise PromptError(f"{name}: no prompts in it")
    return prompts


def read_prompts_by_expert(raw: bytes, name: str) -> dict[str, tuple[str, ...]]:
    """The prompts of several experts in one file: `.json`, an object with a list of texts under each expert's name; `.jsonl`,
    objects with `expert` and `text`. Raises PromptError where it is not such a file."""
    try:
        text = raw.decode("utf-8-sig")
        found: dict[str, list[Any]] = {}
        if name.endswith(".jsonl"):
            for value in (json.loads(line) for line in text.split("\n") if line.strip()):
                found.setdefault(str(value["expert"]), []).append(value["text"])
        elif name.endswith(".json"):
            found = {str(expert): list(texts) for expert, texts in json.loads(text).items()}
        else:
            raise PromptError(f"{name}: a file for several experts ends in .json or .jsonl")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PromptError(f"{name}: not a file of experts' prompts ({type(error).__name__}: {error})") from None
    for expert, texts in found.items():
        if not texts or not all(isinstance(prompt, str) and prompt.strip() for prompt in texts):
            raise PromptError(f"{name}: what stands under {expert!r} is not a list of texts")
    return {expert: tuple(texts) for expert, texts in found.items()}


def _paragraphs(text: str) -> list[str]:
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]
