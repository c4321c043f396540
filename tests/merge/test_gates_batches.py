"""Sequences that share a row: where they lie, and that they do not see each other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.evaluate import Evaluator, checkpoint_expressions, open_files
from merge.families.family import Family
from merge.families.model_types import MODEL_TYPES
from merge.forward import Batch, StreamedModel
from merge.gates.batches import ROW, packed
from merge.gates.held_out import losses
from tests.dense import planned
from tests.merge.test_families import RUNNABLE, recipe_for, small

SLIDING = {"sliding_window": 8}


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_every_sequence_lies_whole_and_alone_at_its_place(lengths: list[int], tokens: int) -> None:
    numbers = iter(range(1, 1 + sum(lengths)))
    sequences = [[next(numbers) for _ in range(length)] for length in lengths]
    made = packed(sequences, tokens)
    found = made.split([batch.input_ids for batch in made.batches])
    assert [x.tolist() for x in found] == sequences
    for b, batch in enumerate(made.batches):
        assert batch.attention_mask is None and batch.position_ids is not None
        assert batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1
        assert batch.input_ids.shape[1] <= max([ROW, *lengths])
        for i, place in made.of_batch(b):
            assert batch.input_ids.view(-1)[made.tokens(i)].tolist() == sequences[i]
            assert batch.position_ids[place.row, place.start : place.stop].tolist() == list(range(lengths[i]))
        starts = {(place.row, place.start) for _, place in made.of_batch(b)}
        ends = {(row, int(x)) for row in range(len(batch.input_ids)) for x in (batch.position_ids[row] == 0).nonzero()}
        assert starts <= ends  # and the rest of a row is at most one more
        assert len(ends - starts) <= len(batch.input_ids)


def test_short_sequences_leave_little_room() -> None:
    lengths = [random.Random(0).randint(5, 60) for _ in range(200)]
    made = packed([[1] * length for length in lengths])
    assert sum(batch.input_ids.numel() for batch in made.batches) < 1.05 * sum(lengths)


def of_a_dense_model(folder: Path, model_type: str) -> StreamedModel:
    changes = SLIDING if "sliding_window" in MODEL_TYPES[model_type].defaults else {}
    tensors, config, evaluator = checkpoint_expressions(small(folder / "base", model_type, **changes))
    return StreamedModel(config, tensors, evaluator, "cpu")


def of_a_mixture(folder: Path, family: Family) -> StreamedModel:
    plan = planned(recipe_for(family, small(folder / "base", family.ACCEPTS[0])), folder)
    gates = {layer: torch.randn(len(plan.gated), 64) for layer in range(2)}
    tensors = {tensor.name: tensor.expr for tensor in plan.tensors}
    return StreamedModel(plan.config, tensors, Evaluator(open_files(plan.sources), gates), "cpu", memory=0)


def check(model: StreamedModel) -> None:
    draw = random.Random(1)
    sequences = [[draw.randrange(1, 512) for _ in range(length)] for length in (20, 1, 33, 9, 33, 2, 60, 20, 7)]
    rows = packed(sequences)
    assert [len(batch.input_ids) for batch in rows.batches] == [2]  # of one batch, and not alike
    run = model.advance(model.start(rows.batches))
    together = losses(model, run, sequences, rows)
    for ids, hidden, loss in zip(sequences, rows.split(run.hidden), together, strict=True):
        alone = model.advance(model.start([Batch(torch.tensor([ids]))]))
        torch.testing.assert_close(hidden, alone.hidden[0][0], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(losses(model, alone, [ids], packed([ids]))[0], rel=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sequences_of_a_row_do_not_see_each_other(model_type: str, tmp_path: Path) -> None:
    check(of_a_dense_model(tmp_path, model_type))


@pytest.mark.parametrize("family", RUNNABLE, ids=lambda family: family.NAME)
def test_nor_do_they_in_a_mixture(family: Family, tmp_path: Path) -> None:
    check(of_a_mixture(tmp_path, family))
