"""Which experts a BOS goes to, chosen by the merged model's loss.

A BOS says nothing of the text that it begins, so no prompt can tell whose it is; but all later tokens attend to it, and what
the experts make of it differs. Each expert in turn is given the BOS, while each prompt's other tokens go to the prompt's own
expert; those with the lowest losses, as many as each token has, share it. That takes one pass over the model, with few and
short texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge.forward import StreamedModel
from merge.gates.batches import TOKENS_PER_BATCH, packed
from merge.gates.held_out import losses, routed, sent
from merge.gates.prompts import Text

# At most so many prompts, one for each expert, and so many tokens of each.
TEXTS, TOKENS = 8, 24
# The trials of many experts run in batches of no more tokens than the texts have, to take no more memory than the calibration
# itself, but of so many in any case.
LEAST_PER_BATCH = 512


def first_token_experts(model: StreamedModel, texts: Sequence[Text], experts: int, per_token: int) -> tuple[int, ...]:
    """The experts, `per_token` of them, that the BOS which `texts` begin with is to go to."""
    if experts <= per_token:
        return tuple(range(experts))
    step = -(-experts // TEXTS)
    chosen = [next(text for text in texts if text.expert == e and text.positive) for e in range(0, experts, step)]
    # Every text once for each expert that its BOS may go to.
    trials = [(first, text.expert, text.ids[:TOKENS]) for first in range(experts) for text in chosen]
    most = max(LEAST_PER_BATCH, sum(len(text.ids) for text in texts))
    rows = packed([ids for *_, ids in trials], min(most, TOKENS_PER_BATCH))
    given = []
    for b, batch in enumerate(rows.batches):
        sequences = [(trials[i], rows.tokens(i)) for i, _ in rows.of_batch(b)]
        to = [pair for (first, own, _), at in sequences for pair in ((at[:1], first), (at[1:], own))]
        given.append(sent(batch, experts, to))
    run = model.start(rows.batches)
    for layer in model.layers():
        ((router, _), *_) = model.gates(layer.index)
        with routed(router, torch.zeros(experts, model.config.hidden_size), given):
            layer.advance(run)
    found = losses(model, run, [ids for *_, ids in trials], rows)
    totals = [0.0] * experts
    for (first, _, ids), loss in zip(trials, found, strict=True):
        totals[first] += loss / max(1, len(ids) - 1)
    return tuple(sorted(sorted(range(experts), key=lambda e: totals[e])[:per_token]))
