"""Router weights from prompts: the gate modes of mergekit-moe, with their meaning.

Each expert e gets, in each layer, one vector of the hidden size; the router's logit for e is the dot product with it.

    random          N(0, 1), the same for the same seed
    uniform_random  U(-1/sqrt(H), 1/sqrt(H)), likewise
    cheap_embed     the sum of the embeddings of the tokens of all the expert's prompts; one vector for every layer
    hidden          the dense base model's hidden state entering the layer at the last token, averaged over the prompts
    hidden_last     the same as `hidden`
    hidden_avg      averaged over all positions first, BOS and padding included

All but the random ones are scaled to length 1, after the vector of the negative prompts has been subtracted.
Meaning: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md. Unlike there, random gates are seeded, and a prompt
longer than the model's context is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge.checkpoint import Checkpoint
from merge.errors import SourceError
from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Batch, Progress, StreamedModel
from merge.gates.batches import ends_aligned
from merge.gates.prompts import ExpertPrompts, PromptError, load_tokenizer, tokenize
from merge.gates.random import random_gates
from merge.gates.report import unit
from merge.recipe import RANDOM_GATES

MODES = (*RANDOM_GATES, "cheap_embed", "hidden", "hidden_last", "hidden_avg")
# mergekit's, for everything up to the difference of positive and negative. It is part of the meaning: where these nearly
# cancel, or a mean runs over positions of very unequal size, float32 gives a vector at cosine .998 from mergekit's.
HIDDEN_DTYPE = torch.bfloat16
# Rows of prompts run together up to this many tokens; the result depends on it by rounding only.
TOKENS_PER_BATCH = 4096
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Step:
    """What a calibration has of one layer: its router (experts, hidden), float32, on the CPU; and what enters the layer, batch
    by batch (B, T, H): all that the next step needs of this one."""

    layer: int
    gates: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()


def calibrate(
    mode: str,
    experts: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[int, torch.Tensor]:
    """The router of every layer: layer -> (experts, hidden), float32, on the CPU.

    `config`, `tensors` and `evaluator` are the dense base model's. Raises PromptError for a prompt that gives no gate,
    SourceError where the base or its tokenizer cannot be read, UsageError for a device that is not there.
    """
    if mode not in MODES:
        raise ValueError(f"gate mode {mode!r} is none of {', '.join(MODES)}")
    if mode in RANDOM_GATES:
        drawn = random_gates(mode, config["num_hidden_layers"], len(experts), config["hidden_size"], seed)
        return {layer: torch.from_numpy(gate) for layer, gate in drawn.items()}
    gates = {}
    for step in calibrate_by_layer(mode, experts, config, tensors, evaluator, tokenizer_folder, device):
        gates[step.layer] = step.gates
        if progress:
            progress(1)
    return gates


def calibrate_by_layer(
    mode: str,
    experts: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    device: str = "auto",
    after: Step | None = None,
) -> Iterator[Step]:
    """The router of one layer after the other, for the modes that read the base; from the layer behind `after` on.

    A layer's needs the base's layers below it and no more, so that the base can be read layer by layer with pauses. Raises
    what `calibrate` raises.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    # Embeddings know no positions, so `cheap_embed` takes a prompt of any length.
    context = None if mode == "cheap_embed" else config.get("max_position_embeddings")
    positive, negative = [], []
    for number, expert in enumerate(experts, 1):
        positive.append(_tokenize(tokenizer, expert.positive, context, f"expert {number}: positive prompt"))
        if expert.negative:
            negative.append(_tokenize(tokenizer, expert.negative, context, f"expert {number}: negative prompt"))
    with_negative = [e for e, expert in enumerate(experts) if expert.negative]
    dtype = torch.float32 if mode == "cheap_embed" else HIDDEN_DTYPE
    model = StreamedModel(config, tensors, evaluator, device, dtype)
    sets = [*positive, *negative]  # S of them
    found: Iterator[tuple[int, torch.Tensor, tuple[torch.Tensor, ...]]]
    if mode == "cheap_embed":
        sums = _embedding_sums(model, sets)  # (S, H)
        found = ((layer, sums, ()) for layer in range(model.num_layers))
    else:
        found = _hidden_means(model, sets, mode == "hidden_avg", after)
    for layer, vectors, hidden in found:
        gates = vectors[: len(experts)].clone()  # (E, H)
        gates[with_negative] -= vectors[len(experts) :]
        if not torch.isfinite(gates).all():
            raise SourceError("the base model's hidden states are not finite numbers, so no gate can be made of them")
        if after is None or layer > after.layer:
            yield Step(layer, unit(gates.float()), hidden)


def base_files(mode: str, base: Checkpoint) -> tuple[str, ...]:
    """The files of the dense base model that `calibrate` reads: none, the tokenizer's and the embedding's, or all."""
    if mode in RANDOM_GATES:
        return ()
    shards = {
        info.file
        for name, info in (base.tensors or {}).items()
        if info.file is not None and (mode != "cheap_embed" or name == EMBEDDING)
    }
    return tuple(sorted({*shards, *base.companions}))


def _tokenize(tokenizer: Any, prompts: Sequence[str], context: int | None, where: str) -> Batch:
    """The prompts (N) as token ids (N, T), padded on the left to the longest: BOS first where the tokenizer has one,
    no other special token, padding of BOS or else EOS. None may have more than `context` tokens."""
    rows: list[list[int]] = []
    for number, prompt in enumerate(prompts, 1):
        row = tokenize(tokenizer, prompt)
        if not row:
            raise PromptError(f"{where} {number} has no tokens: write some text, or take the prompt out")
        if context is not None and len(row) > context:
            raise PromptError(
                f"{where} {number} has {len(row)} tokens, but the base model reads {context} "
                "(max_position_embeddings): shorten it"
            )
        rows.append(row)
    if not rows:
        raise PromptError(f"{where}s are missing: this gate mode makes the router from them")
    pad = next(
        (x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if x is not None), None
    )
    if pad is None and len({len(row) for row in rows}) > 1:
        raise SourceError(
            "the tokenizer has no BOS, EOS or padding token, so prompts of unequal length cannot be padded"
        )
    return ends_aligned(rows, pad or 0)


def _embedding_sums(model: StreamedModel, sets: Sequence[Batch]) -> torch.Tensor:
    """For each of S sets of prompts the sum of its tokens' embeddings, scaled to length 1: (S, H)."""
    sums = []
    for batch in sets:
        assert batch.attention_mask is not None
        ids, counts = torch.unique(batch.input_ids[batch.attention_mask == 1], return_counts=True)  # (n,), (n,)
        sums.append(counts.float() @ model.embedding_rows(ids).cpu())  # (H,)
    return unit(torch.stack(sums))


def _hidden_means(
    model: StreamedModel, sets: Sequence[Batch], over_positions: bool, after: Step | None
) -> Iterator[tuple[int, torch.Tensor, tuple[torch.Tensor, ...]]]:
    """For each of S sets of prompts the mean hidden state entering a layer (S, H), layer by layer, and the states themselves.

    Of a prompt it is the mean over all its positions, or the last position alone.
    """
    batches: list[Batch] = []
    owner: list[int] = []
    for number, batch in enumerate(sets):
        assert batch.attention_mask is not None
        width = batch.input_ids.shape[1]
        step = max(1, TOKENS_PER_BATCH // width)
        for rows in range(0, len(batch.input_ids), step):
            batches.append(Batch(batch.input_ids[rows : rows + step], batch.attention_mask[rows : rows + step]))
            owner.append(number)
    counts = torch.tensor([len(batch.input_ids) for batch in sets])
    run = model.start(batches)
    first = 0
    if after is not None:
        first, run.hidden = after.layer, list(after.hidden)
    storage: dict[str, torch.Tensor] = {}
    for layer in range(first, model.num_layers):
        sums = torch.zeros(len(sets), model.config.hidden_size, dtype=model.dtype)
        for number, hidden in zip(owner, run.hidden, strict=True):  # (B, T, H)
            vectors = hidden.sum(dim=1) / hidden.shape[1] if over_positions else hidden[:, -1]  # (B, H)
            sums[number] += vectors.sum(dim=0)
        yield layer, sums / counts[:, None], tuple(run.hidden)
        # What enters the last layer is known once the one before has run: the last one's weights are not needed.
        if layer + 1 < model.num_layers:
            with model.layer(layer, storage) as loaded:
                loaded.advance(run)
