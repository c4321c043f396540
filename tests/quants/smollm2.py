"""A mixture of a real model's layers with its real tokenizer, the same on every machine: it is made of copies alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from merge.evaluate import Evaluator, checkpoint_expressions
from merge.expr import Expr, Gate
from quants.filetypes import FILE_TYPES

# What llama.cpp's converter and quantiser make of it, recorded by benchmarks/gguf_reference.py.
REFERENCE = Path(__file__).with_name("smollm2.json")
BASE = "SmolLM2-135M-Instruct"
PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Types whose files of the whole model are compared; of the others those of its first layers are, and of all of them the types
# of the whole model's tensors.
WHOLE = ("BF16", "Q8_0", "Q4_K_M")
FIRST_LAYERS = 4
# Every file type; with an importance matrix the types that need one, and some that heed it.
PLAIN = tuple(name for name, kind in FILE_TYPES.items() if not kind.needs_imatrix)
WEIGHED = ("IQ4_XS", "Q4_0", "Q4_K_M", *(name for name, kind in FILE_TYPES.items() if kind.needs_imatrix))


def mixture(
    folder: Path, shift: int = 0, layers: int | None = None
) -> tuple[dict[str, Any], dict[str, Expr], Evaluator]:
    """config.json, tensors and their contents of a Mixtral of two experts made of SmolLM2's layers, or of the first of them: the
    second expert of a layer is the MLP of the layer that is `shift` further on."""
    dense, config, evaluator = checkpoint_expressions(folder)
    layers, hidden, experts = layers or config["num_hidden_layers"], config["hidden_size"], 2
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": layers}
    config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    kept = {f"model.layers.{layer}." for layer in range(layers)}
    tensors = {
        name: x
        for name, x in dense.items()
        if ".mlp." not in name and (not name.startswith("model.layers.") or any(map(name.startswith, kept)))
    }
    for layer in range(layers):
        at = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{at}.gate.weight"] = Gate(layer, "BF16", (experts, hidden))
        for expert in range(experts):
            source = f"model.layers.{(layer + expert * shift) % layers}.mlp"
            tensors |= {
                f"{at}.experts.{expert}.{w}.weight": dense[f"{source}.{part}.weight"] for part, w in PARTS.items()
            }
    random = torch.Generator().manual_seed(0)
    gates = {layer: torch.randn(experts, hidden, generator=random) for layer in range(layers)}
    return config, tensors, Evaluator(evaluator.files, gates)


def write_mixture(base: Path, folder: Path, layers: int | None = None) -> dict[str, Any]:
    """The mixture as a checkpoint, for programs that need one. Returns its config.json."""
    config, tensors, contents = mixture(base, 1, layers)
    write_small_files(base, folder, config)
    whole = {name: contents.tensor(x).clone() for name, x in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def write_small_files(base: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """All of the checkpoint but its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for path in (*base.glob("*token*"), base / "generation_config.json"):
        shutil.copy(path, folder)


def recorded(model: str, file_type: str) -> dict[str, Any]:
    """What `summary` gave of llama.cpp's file of a type, of the "whole" model or of its "first" layers."""
    of: dict[str, Any] = json.loads(REFERENCE.read_text())[f"{model} {file_type}"]
    return of


def summary(path: Path) -> dict[str, Any]:
    """Of a GGUF file its keys (the long ones as hashes) and of each tensor type, shape and the first 32 bits of its sha256,
    without a first dimension of one."""
    reader = GGUFReader(path)
    keys = {name: of.contents() for name, of in reader.fields.items() if not name.startswith("GGUF.")}
    for name, value in keys.items():
        if isinstance(value, list) and len(value) > 100:
            keys[name] = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
    tensors = {}
    for tensor in reader.tensors:
        shape = "x".join(str(size) for size in reversed(tensor.shape.tolist()))
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()[:8]
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape.removeprefix('1x')} {digest}"
    found: dict[str, Any] = json.loads(json.dumps({"keys": keys, "tensors": tensors}))
    return found
