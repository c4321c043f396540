"""Dense models of a wanted size for benchmarks: Llama's layout, weights random, written as they stream."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """What decides a model's size."""

    layers: int
    hidden: int = 2048
    intermediate: int = 4256
    dtype: str = "bfloat16"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        h, i = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h)}
        for n in range(self.layers):
            layer = f"model.layers.{n}."
            shapes |= {f"{layer}self_attn.{part}_proj.weight": (h, h) for part in "qkvo"}
            shapes |= {f"{layer}mlp.{part}_proj.weight": (i, h) for part in ("gate", "up")}
            shapes[f"{layer}mlp.down_proj.weight"] = (h, i)
            shapes |= {f"{layer}{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (VOCABULARY, h)}


def make_model(folder: Path, shape: Shape, seed: int) -> Path:
    """A model in `folder`, made where it is not there yet."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    size, stored = (2, "BF16") if shape.dtype == "bfloat16" else (4, "F32")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in shape.tensors().items():
        begin, end = end, end + int(np.prod(dimensions)) * size
        header[name] = {"dtype": stored, "shape": dimensions, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for dimensions in shape.tensors().values():
            count = int(np.prod(dimensions))
            # Uniform of standard deviation 0.02, norms of ones: hidden states stay finite through all layers.
            values = (generator.random(count, dtype=np.float32) - 0.5) * np.float32(0.07)
            if len(dimensions) == 1:
                values = np.ones(count, dtype=np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).data if size == 2 else values.data)
    _tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": shape.dtype,
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with `<s>` and `</s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **special})
    )
