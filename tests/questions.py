"""What a model answers to questions with choices, by its own logits: what lm-eval's score is held to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def percent_right(model: Path, questions: Path, shots: int) -> float:
    """The share, in percent, of the questions after the first `shots`, which stand answered in the prompt, for which the right
    choice has the largest likelihood a character."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")  # as the harness does
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    asked = [f"Question: {row['question']}\nAnswer:" for row in rows]
    shown = "".join(f"{asked[n]} {rows[n]['choices'][rows[n]['answer']]}\n\n" for n in range(shots))
    right = 0
    for row, prompt in list(zip(rows, asked, strict=True))[shots:]:
        scored = []
        for choice in row["choices"]:
            before = len(tokenizer(shown + prompt).input_ids)
            ids = tokenizer(f"{shown}{prompt} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logits = network(ids).logits[0].float().log_softmax(-1)
            places = range(before, ids.shape[1])
            scored.append(sum(float(logits[at - 1, ids[0, at]]) for at in places) / len(choice))
        right += scored.index(max(scored)) == row["answer"]
    return 100 * right / (len(rows) - shots)
