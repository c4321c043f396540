"""Perplexity on texts: how well a model predicts each next token, streamed layer by layer through merge.forward.

A text is cut into windows of WINDOW tokens, the last one shorter; in each every token but the first is predicted from those
before it in that window. So the figures of models with the same tokenizer can be compared, and with figures over longer
windows they cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evals.scores import TextLoss
from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.forward import Batch, Progress, StreamedModel
from merge.gates import load_tokenizer

WINDOW = 256
# Of a text so many tokens are used; what comes after changes the figure little and costs time.
MAX_TOKENS = 8192


def token_ids(folder: Path, texts: Sequence[str], limit: int | None = MAX_TOKENS) -> list[tuple[int, ...]]:
    """The texts in the tokens of the tokenizer in `folder`, the first `limit` of each, special tokens at the beginning as it
    adds them."""
    tokenizer = load_tokenizer(folder)
    return [tuple(tokenizer.encode(text))[:limit] for text in texts]


def text_losses(
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    texts: Sequence[Sequence[int]],
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[TextLoss]:
    """The mean loss on each text, given as token ids; every weight is read once for all of them.

    Raises SourceError where the model cannot be run. A text of one token has no token that could be predicted: its count is 0.
    """
    model = StreamedModel(config, tensors, evaluator, device=device)
    batches: list[Batch] = []
    owners: list[int] = []
    for number, ids in enumerate(texts):
        for batch in windows(ids):
            batches.append(batch)
            owners.append(number)
    run = model.advance(model.start(batches), progress)
    losses, counts = [0.0] * len(texts), [0] * len(texts)
    for piece in model.logits(run):
        known = batches[piece.batch].input_ids
        # What follows each position of the slice; nothing follows the last one.
        targets = known[:, piece.start + 1 : piece.start + 1 + piece.values.shape[1]].to(piece.values.device)  # (B, t)
        logits = piece.values[:, : targets.shape[1]].float()  # (B, t, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        losses[owners[piece.batch]] += float(loss)
        counts[owners[piece.batch]] += targets.numel()
    return [TextLoss(loss / count if count else 0.0, count) for loss, count in zip(losses, counts, strict=True)]


def windows(ids: Sequence[int]) -> list[Batch]:
    """Token ids in windows: the whole ones as one batch (B, WINDOW), what is left as another (1, T)."""
    whole = len(ids) // WINDOW * WINDOW
    found = [Batch(torch.tensor(ids[:whole]).view(-1, WINDOW))] if whole else []
    return [*found, Batch(torch.tensor([ids[whole:]]))] if len(ids) - whole > 1 else found
