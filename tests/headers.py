"""Models known from their headers alone, as the Hub would tell them: real shapes, no weights."""

from __future__ import annotations

import json
from pathlib import Path

from merge.checkpoint import Checkpoint
from merge.plan import MergePlan
from merge.planner import build_plan
from merge.recipe import LoadedRecipe
from merge.tensors import TensorInfo

# Bytes of a shard of the originals on the Hub.
SHARD = 5_000_000_000


def mistral(name: str, config: Path) -> Checkpoint:
    """A Mistral-7B of the Hub in BF16 with this config.json."""
    value = json.loads(config.read_text())
    hidden, middle, vocab = value["hidden_size"], value["intermediate_size"], value["vocab_size"]
    kv = hidden // value["num_attention_heads"] * value["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(value["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (middle, hidden),
            f"{at}.mlp.up_proj.weight": (middle, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, middle),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    tensors, files, shard, start = {}, {"config.json": 600, "tokenizer.json": 1_800_000}, 1, 30_000
    for tensor, shape in shapes.items():
        info = TensorInfo("BF16", shape, f"model-{shard:05d}.safetensors", start)
        if start + info.nbytes > SHARD:
            shard, start = shard + 1, 30_000
            info = TensorInfo("BF16", shape, f"model-{shard:05d}.safetensors", start)
        tensors[tensor] = info
        start += info.nbytes
        files[f"model-{shard:05d}.safetensors"] = start
    return Checkpoint(f"{name}@{'0' * 40}", name, value, tensors, files, commit="0" * 40, fingerprint=name)


def planned(loaded: LoadedRecipe, configs: Path) -> MergePlan:
    """The plan of a recipe over Mistral-7B models, whose config.json are in `configs` as owner/name/config.json."""
    return build_plan(
        loaded,
        {
            reference: mistral(reference.path, configs / reference.path / "config.json")
            for reference in loaded.recipe.references
        },
    )
