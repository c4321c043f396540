"""Text from prompts of a few words: what a language model writes about them says more of a domain than the words do.

The model (the base, or the expert itself) continues several phrasings of each short prompt. Sampling is seeded and runs for
a fixed number of tokens, so the same inputs on the same machine give the same text, and the time is bounded by the work: with
the weights in memory a few seconds, streamed from disk one pass over them per token.

A chat phrasing is used where the tokenizer has the special tokens of a well-known chat format. These formats are written out
here: a checkpoint's own chat template is a program from a stranger and is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Batch, Progress, Run, StreamedModel
from merge.gates.batches import ends_aligned
from merge.gates.prompts import ExpertPrompts, load_tokenizer, tokenize

# A prompt of fewer tokens is expanded: a sentence has more.
SHORT = 7
# For each expert about so many samples, of at most so many tokens.
SAMPLES, TOKENS = 45, 48
# Keys and values of so many bytes are one batch. Those of more batches rest in host memory, and are on the device layer by layer.
CACHE_BYTES = 2 << 30
TEMPERATURE, TOP_P, MOST_LIKELY = 0.8, 0.95, 200
DTYPE = torch.bfloat16
# The words alone, and in sentences that a text about them might begin with.
PLAIN = ("{words}", "Here is an example of {words}:\n\n", "{title}\n\n")
# What a user might ask; the answer is the text.
ASKED = ("{words}", "Write a short example of {words}.", "Please help me with this: {words}")
# Chat formats by the special tokens that they need: what stands before and after the question.
CHAT_FORMATS = (
    (("<|im_start|>", "<|im_end|>"), "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (("<start_of_turn>", "<end_of_turn>"), "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
)


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote: for which expert (from 0), from which of its positive prompts, after what beginning."""

    expert: int
    prompt: str
    beginning: str
    text: str


def is_short(tokenizer: Any, prompt: str) -> bool:
    return len(tokenize(tokenizer, prompt)) - (tokenizer.bos_token_id is not None) < SHORT


def expand(
    experts: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    seed: int,
    device: str = "auto",
    only: int | None = None,
    progress: Progress | None = None,
    tokens: int = TOKENS,
) -> tuple[Sample, ...]:
    """What the dense model writes from the experts' short positive prompts (from those of expert number `only`), at most
    `tokens` tokens each. Of many short prompts of one expert SAMPLES are taken, evenly.

    Raises SourceError where the model or its tokenizer cannot be read, UsageError for a device that is not there.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    plan: list[tuple[int, str, str]] = []
    for number, expert in enumerate(experts):
        short = [prompt for prompt in expert.positive if is_short(tokenizer, prompt)]
        if not short or (only is not None and number != only):
            continue
        forms = len(_beginnings(tokenizer, short[0]))
        if len(short) * forms <= SAMPLES:
            beginnings = [(prompt, beginning) for prompt in short for beginning in _beginnings(tokenizer, prompt)]
        else:  # evenly from the prompts, in one form after the other
            taken = [short[i * len(short) // SAMPLES] for i in range(SAMPLES)]
            beginnings = [(prompt, _beginnings(tokenizer, prompt)[i % forms]) for i, prompt in enumerate(taken)]
        times = max(1, round(SAMPLES / len(beginnings)))
        plan += [(number, *pair) for pair in beginnings for _ in range(times)]
    if not plan:
        return ()
    rows = [tokenize(tokenizer, beginning) for _, _, beginning in plan]
    model = StreamedModel(config, tensors, evaluator, device, DTYPE)
    written = _generate(model, tokenizer, rows, seed, tokens, progress)
    samples = []
    for (number, prompt, beginning), ids in zip(plan, written, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # Of a chat the answer is the text; otherwise the beginning belongs to it.
        whole = text if any(beginning.startswith(before) for _, before, _ in CHAT_FORMATS) else beginning + text
        if whole.strip():
            samples.append(Sample(number, prompt, beginning, whole.strip()))
    return tuple(samples)


def with_samples(experts: Sequence[ExpertPrompts], samples: Sequence[Sample]) -> list[ExpertPrompts]:
    """The prompts with what was written from them in the place of the short ones."""
    expanded = []
    for number, expert in enumerate(experts):
        mine = [sample for sample in samples if sample.expert == number]
        replaced = {sample.prompt for sample in mine}
        kept = tuple(prompt for prompt in expert.positive if prompt not in replaced)
        expanded.append(ExpertPrompts((*kept, *(sample.text for sample in mine)), expert.negative))
    return expanded


def _beginnings(tokenizer: Any, prompt: str) -> list[str]:
    words = prompt.strip()
    beginnings = [form.format(words=words, title=words.capitalize()) for form in PLAIN]
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    for needed, before, after in CHAT_FORMATS:
        if set(needed) <= special:
            return beginnings + [before + form.format(words=words) + after for form in ASKED]
    return beginnings


def _generate(
    model: StreamedModel,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    seed: int,
    tokens: int,
    progress: Progress | None,
) -> list[list[int]]:
    """What follows each of B token sequences, at most `tokens`, ended by the tokenizer's EOS. A layer's weights are read once
    for all batches."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, CACHE_BYTES // _cache_bytes(model.config, max(map(len, rows)) + tokens))
    batches = [ends_aligned(rows[start : start + count], rows[0][0]) for start in range(0, len(rows), count)]
    caches = [DynamicCache(config=model.config) for _ in batches]
    written: list[list[int]] = [[] for _ in rows]
    running = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(tokens):
        runs = [model.start([batch], cache) for batch, cache in zip(batches, caches, strict=True)]
        for layer in model.layers():
            for run, cache in zip(runs, caches, strict=True):
                if len(caches) == 1:
                    layer.advance(run)
                    continue
                _move(cache, layer.index, model.device)
                layer.advance(run)
                _move(cache, layer.index, torch.device("cpu"))
        last = Run([run.hidden[0][:, -1:] for run in runs], [])
        # One token of each row for each batch, (b,)
        drawn = [_sample(piece.values[:, -1].float().cpu(), generator) for piece in model.logits(last)]
        chosen = torch.cat(drawn)  # (B,)
        running &= chosen != (tokenizer.eos_token_id if tokenizer.eos_token_id is not None else -1)
        for row, token in enumerate(chosen.tolist()):
            if running[row]:
                written[row].append(token)
        if progress:
            progress(1)
        if not running.any():
            break
        batches = [_next(batch, ids) for batch, ids in zip(batches, drawn, strict=True)]
    return written


def _next(batch: Batch, ids: torch.Tensor) -> Batch:
    """The batch of the tokens (B,) that follow what a cache has seen of `batch`."""
    assert batch.attention_mask is not None
    return Batch(ids[:, None], torch.cat([batch.attention_mask, torch.ones(len(ids), 1, dtype=torch.long)], dim=1))


def _cache_bytes(config: Any, tokens: int) -> int:
    """About what the keys and values of so many tokens take in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * DTYPE.itemsize * tokens)


def _move(cache: DynamicCache, layer: int, device: torch.device) -> None:
    """Put a layer's keys and values, where there are any yet, on a device."""
    kept = cache.layers[layer]
    if kept.keys is not None and kept.values is not None:
        kept.keys, kept.values = kept.keys.to(device), kept.values.to(device)


def _sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits (B, V): nucleus sampling (Holtzman et al., https://arxiv.org/abs/1904.09751), among
    the MOST_LIKELY tokens at most, so that no vocabulary need be sorted."""
    best, order = torch.topk(logits, min(MOST_LIKELY, logits.shape[1]), dim=1)  # (B, K)
    p = torch.softmax(best / TEMPERATURE, dim=1)
    below = p.cumsum(dim=1) - p  # probability of the better tokens
    place = torch.multinomial(p.masked_fill(below > TOP_P, 0.0), 1, generator=generator)  # (B, 1)
    return order.gather(1, place)[:, 0]
