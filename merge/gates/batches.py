"""Token sequences as batches for the forward pass, and where each lies in them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from merge.forward import Batch
from merge.gates.held_out import Layout

TOKENS_PER_BATCH = 4096


def batched(rows: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> tuple[list[int], list[Batch]]:
    """Token sequences as batches of similar lengths and at most `tokens` tokens, padded on the right, where padding changes
    nothing before it; and their numbers in the order in which they stand there."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]]) <= tokens:
            stop += 1
        width = len(rows[order[stop - 1]])
        lengths = torch.tensor([len(rows[i]) for i in order[start:stop]])
        ids = torch.tensor([[*rows[i], *[rows[i][0]] * (width - len(rows[i]))] for i in order[start:stop]])  # (B, T)
        batches.append(Batch(ids, (torch.arange(width) < lengths[:, None]).long()))
        start = stop
    return order, batches


def ends_aligned(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Token sequences as one batch, padded on the left."""
    width = max(len(row) for row in rows)  # T
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask)


def layout_of(order: Sequence[int], batches: Sequence[Batch]) -> Layout:
    """Where the sequences of `batched` lie."""
    numbers = iter(order)
    rows = tuple(tuple(itertools.islice(numbers, len(batch.input_ids))) for batch in batches)
    return Layout(rows, tuple(batch.input_ids.shape[1] for batch in batches))
