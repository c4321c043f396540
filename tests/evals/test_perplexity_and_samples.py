"""Perplexity and samples are what transformers itself computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.perplexity import WINDOW, text_losses, token_ids, windows
from evals.samples import write_samples
from merge.evaluate import checkpoint_expressions
from tests.dense import save_dense

TEXT = "the capital of france is paris and the river is the seine. " * 15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("model"), max_position_embeddings=512, dtype=torch.float32)


def test_losses_are_those_of_transformers_window_by_window(model: Path) -> None:
    [ids, short] = token_ids(model, [TEXT, "the capital"])
    assert len(ids) > WINDOW
    tensors, config, evaluator = checkpoint_expressions(model)
    found, other = text_losses(config, tensors, evaluator, [ids, short], device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(model)
    total = count = 0.0
    with torch.no_grad():
        for batch in windows(ids):
            for row in batch.input_ids:
                total += float(dense(row[None], labels=row[None]).loss) * (len(row) - 1)
                count += len(row) - 1
    assert found.loss == pytest.approx(total / count, abs=1e-4)
    assert found.tokens == count
    assert other.tokens == len(short) - 1


def test_a_greedy_sample_is_transformers_own_and_a_seed_gives_the_same_text_twice(model: Path) -> None:
    prompts = ("the capital of", "the river")
    one = write_samples(model, prompts, 7, device="cpu", tokens=8)
    assert one == write_samples(model, prompts, 7, device="cpu", tokens=8)
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for sample in one:
        ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
        out = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert sample.greedy == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    other = write_samples(model, prompts, 8, device="cpu", tokens=8)
    assert [sample.greedy for sample in other] == [sample.greedy for sample in one]
    assert [sample.sampled for sample in other] != [sample.sampled for sample in one]


def test_a_model_that_does_not_fit_is_streamed_and_says_the_same(model: Path) -> None:
    prompts = ("the capital of", "the river of the city is")
    fits = write_samples(model, prompts, 3, device="cpu", tokens=4)
    streamed = write_samples(model, prompts, 3, device="cpu", tokens=4, memory=0)
    # What is drawn may differ: of random weights all tokens are about as likely, and a rounding decides their order.
    assert [sample.greedy for sample in streamed] == [sample.greedy for sample in fits]
