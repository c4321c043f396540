"""What the finished model writes after a prompt: greedily, and drawn with a seed.

The prompt is given as it stands. A checkpoint's chat template is a program from a stranger and is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import DynamicCache

from evals.scores import ModelSample
from merge.evaluate import TORCH_DTYPES, checkpoint_expressions
from merge.forward import Batch, Progress, StreamedModel, free_memory, resolve_device
from merge.gates import load_tokenizer

TOKENS = 48
TEMPERATURE, TOP_P = 0.7, 0.9
# Of a longer prompt the end is used.
MAX_PROMPT = 1024
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# The logits (B, V) after the next tokens (B, T), of which the mask (B, T so far) says what is no padding.
Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def write_samples(
    folder: Path,
    prompts: Sequence[str],
    seed: int,
    *,
    device: str = "auto",
    tokens: int = TOKENS,
    memory: int | None = None,
    progress: Progress | None = None,
) -> tuple[ModelSample, ...]:
    """At most `tokens` tokens after each prompt, by the checkpoint in `folder` in its own dtype, all prompts at once.

    A checkpoint of more than `memory` bytes (what the device has, by default) is streamed layer by layer, which takes a pass
    over all of it for each token. Raises SourceError where the model cannot be run.
    """
    tokenizer = load_tokenizer(folder)
    rows = [tokenizer.encode(prompt)[-MAX_PROMPT:] or [tokenizer.bos_token_id or 0] for prompt in prompts]
    place = resolve_device(device)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    fits = size <= (free_memory(place) if memory is None else memory)
    step, config = _resident(folder, place) if fits else _streamed(folder, device)
    ends = frozenset(end for end in (*_ids(config.get("eos_token_id")), *_ids(tokenizer.eos_token_id)))
    # Each prompt twice: the first half of the rows is greedy, the second drawn.
    written = generate(step, [*rows, *rows], len(rows), seed, tokens, ends, progress)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return tuple(
        ModelSample(prompt, greedy, sampled, seed, TEMPERATURE, TOP_P, tokens)
        for prompt, greedy, sampled in zip(prompts, texts[: len(rows)], texts[len(rows) :], strict=True)
    )


def _resident(folder: Path, device: torch.device) -> tuple[Step, Mapping[str, Any]]:
    """The whole model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False
    ).to(device)
    cache = DynamicCache(config=model.config)

    def step(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model(
                ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    return step, model.config.to_dict()


def _streamed(folder: Path, device: str) -> tuple[Step, Mapping[str, Any]]:
    """The model layer by layer from disk."""
    tensors, config, evaluator = checkpoint_expressions(folder)
    dtype = TORCH_DTYPES[STORED.get(str(config.get("torch_dtype")), "BF16")]
    model = StreamedModel(config, tensors, evaluator, device=device, dtype=dtype)
    cache = DynamicCache(config=model.config)

    def step(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        run = model.advance(model.start([Batch(ids, mask)], cache))
        run.hidden[0] = run.hidden[0][:, -1:]
        return torch.cat([piece.values for piece in model.logits(run)], dim=1)[:, -1]

    return step, config


def generate(
    step: Step,
    rows: Sequence[Sequence[int]],
    greedy: int,
    seed: int,
    tokens: int,
    ends: frozenset[int],
    progress: Progress | None = None,
) -> list[list[int]]:
    """What follows each of B token sequences, at most `tokens`, until a token of `ends`: greedily for the first `greedy` of
    them, by nucleus sampling (https://arxiv.org/abs/1904.09751) for the others."""
    generator = torch.Generator().manual_seed(seed)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in rows])  # (B, T), ends aligned
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    written: list[list[int]] = [[] for _ in rows]
    running = [True] * len(rows)
    for _ in range(tokens):
        logits = step(ids, mask).float().cpu()  # (B, V)
        chosen = torch.cat([logits[:greedy].argmax(-1), _drawn(logits[greedy:], generator)])  # (B,)
        for row, token in enumerate(chosen.tolist()):
            running[row] &= token not in ends
            if running[row]:
                written[row].append(token)
        if progress:
            progress(1)
        if not any(running):
            break
        ids, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return written


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits (B, V)."""
    p, order = torch.softmax(logits / TEMPERATURE, dim=-1).sort(dim=-1, descending=True)
    before = p.cumsum(dim=-1) - p  # probability of the better tokens
    place = torch.multinomial(p.masked_fill(before > TOP_P, 0.0), 1, generator=generator)  # (B, 1)
    return order.gather(1, place)[:, 0]


def _ids(value: Any) -> list[int]:
    """Token ids where a configuration may have one, several or none."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
