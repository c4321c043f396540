"""A model too small to say anything, with the real SentencePiece tokenizer of Mistral-7B."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.quants.tiny import config, write_model

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizers" / "mistral-7b"
REFERENCE = TOKENIZER / "reference.json"
TEXTS = (
    "The capital of France is Paris.",
    "  two spaces, a\ttab\n\nand 1234.5 + 67 = ?",
    "naïve façade in Zürich, 東京, Привет, 🦙 and \u200b nothing",
    "def f(x):\n    return x ** 2  # squared",
)


def write_mistral(folder: Path) -> Path:
    """The checkpoint, its tokenizer with one token added, as people who fine-tune do."""
    found = config(
        model_type="mistral", architectures=["MistralForCausalLM"], vocab_size=32002, hidden_size=64, head_dim=8,
        intermediate_size=128, num_hidden_layers=1,
    )  # fmt: skip
    write_model(folder, found, "sentencepiece")
    shutil.copy(TOKENIZER / "tokenizer.model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {str(number): {"content": text, "special": True} for number, text in enumerate(("<unk>", "<s>", "</s>"))}
    settings["added_tokens_decoder"] = special | {"32000": {"content": "<|im_end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
