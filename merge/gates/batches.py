"""Token sequences as batches for the forward pass, and where each lies in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from merge.forward import Batch

TOKENS_PER_BATCH = 4096
# Short sequences share a row of this many tokens, as hardly anything is computed for padding then. Attention looks at whole
# rows, so longer ones would cost more than they save.
ROW = 128


@dataclass(frozen=True)
class Place:
    """Where a sequence lies: in a batch, its row, from column `start` to `stop`."""

    batch: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """Batches whose rows hold one sequence after the other, each with positions of its own from 0 on, which keeps them from
    seeing each other (transformers finds the borders where positions start again); `places[i]` is where sequence i lies."""

    batches: tuple[Batch, ...]
    places: tuple[Place, ...]

    def of_batch(self, b: int) -> Iterator[tuple[int, Place]]:
        """The sequences of batch b."""
        return ((i, place) for i, place in enumerate(self.places) if place.batch == b)

    def tokens(self, i: int, skipped: int = 0) -> torch.Tensor:
        """The numbers (n,) of sequence i's tokens among its batch's B*T, without so many at its beginning."""
        place = self.places[i]
        first = place.row * self.batches[place.batch].input_ids.shape[1]
        return torch.arange(first + place.start + skipped, first + place.stop)

    def split(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of what each batch's tokens have, (B, T, H), what each sequence's have, (n, H)."""
        return [values[place.batch][place.row, place.start : place.stop] for place in self.places]


def packed(sequences: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> Packed:
    """Token sequences as batches of at most `tokens` tokens, unless one alone has more."""
    lengths = [len(ids) for ids in sequences]
    width, shortest = max([ROW, *lengths]), min(lengths, default=0)
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # of rows that have enough for the shortest
    for i in sorted(range(len(sequences)), key=lambda i: -lengths[i]):
        row = next((row for row, left in room.items() if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] = room.get(row, width if lengths[i] > ROW else ROW) - lengths[i]
        if room[row] < shortest:
            del room[row]
    places: dict[int, Place] = {}
    batches: list[Batch] = []
    filled = [sum(lengths[i] for i in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: filled[row])
    while order:
        count = next((n - 1 for n in range(2, len(order) + 1) if n * filled[order[n - 1]] > tokens), len(order))
        taken, order = order[:count], order[count:]
        wide = filled[taken[-1]]  # T
        ids = torch.zeros(count, wide, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, number in enumerate(taken):
            start = 0
            for i in rows[number]:
                stop = start + lengths[i]
                places[i] = Place(len(batches), row, start, stop)
                ids[row, start:stop] = torch.tensor(sequences[i])
                positions[row, start:stop] = torch.arange(lengths[i])
                start = stop
            # What is left of a row is one more sequence, of a token that is there in any case.
            ids[row, start:] = ids[row, :1]
            positions[row, start:] = torch.arange(wide - start)
        batches.append(Batch(ids, position_ids=positions))
    return Packed(tuple(batches), tuple(places[i] for i in range(len(sequences))))


def ends_aligned(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Token sequences as one batch, padded on the left."""
    width = max(len(row) for row in rows)  # T
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask)
