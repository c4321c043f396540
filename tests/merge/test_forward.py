"""The streamed forward pass gives the ordinary model's numbers and holds one layer at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from merge.errors import SourceError, UsageError
from merge.evaluate import Evaluator, checkpoint_expressions
from merge.expr import Cast, Expr, Gate
from merge.forward import Batch, StreamedModel, resolve_device

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped queries": ("LlamaConfig", {}),
    "llama, tied head": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, biases and scaled rotary": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 4}),
    "mistral, no window, wide heads": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2, biases": ("Qwen2Config", {}),
    "gemma2, scaled embeddings and capped logits": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "granite, multipliers": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, **MOE}),
    "mixtral, one expert": ("MixtralConfig", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "mixtral, router logits asked for": (
        "MixtralConfig",
        {"num_local_experts": 4, "output_router_logits": True, **MOE},
    ),
    "qwen3_moe, first layer dense": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0], **MOE},
    ),
    "qwen2_moe, shared expert": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, **MOE},
    ),
    "granitemoe, stored fused": ("GraniteMoeConfig", {"num_local_experts": 4, **MOE}),
}


def save_model(folder: Path, config_class: str, seed: int = 0, **changes: Any) -> Path:
    """A small model of random weights, large enough that every part of it matters, as transformers saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SMALL | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def open_streamed(folder: Path, **changes: Any) -> StreamedModel:
    tensors, config, evaluator = checkpoint_expressions(folder)
    return StreamedModel(config, tensors, evaluator, device="cpu", **changes)


def left_padded() -> Batch:
    """Three rows (3, 11), the first two padded on the left."""
    ids = torch.randint(3, 100, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return Batch(ids, mask)


@pytest.mark.parametrize("name", MODELS)
def test_streamed_hidden_states_and_logits_equal_the_ordinary_models(name: str, tmp_path: Path) -> None:
    config_class, changes = MODELS[name]
    save_model(tmp_path, config_class, **changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    streamed = open_streamed(tmp_path)
    assert streamed.unused == ()
    batches = [left_padded(), Batch(left_padded().input_ids[:1, :5])]
    run = streamed.start(batches)
    expected = []
    for batch in batches:
        with torch.no_grad():
            expected.append(
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
            )
    for layer in streamed.layers():
        for b, output in enumerate(expected):
            torch.testing.assert_close(run.hidden[b], output.hidden_states[layer.index])
        layer.advance(run)
    for piece in streamed.logits(run):
        torch.testing.assert_close(piece.values, expected[piece.batch].logits)


def test_logits_come_in_slices_that_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = open_streamed(save_model(tmp_path, "LlamaConfig"))
    run = streamed.advance(streamed.start([left_padded()]))
    (whole,) = streamed.logits(run)
    monkeypatch.setattr("merge.forward.LOGITS_ELEMENTS", 3 * 100 * 4)
    pieces = list(streamed.logits(run))
    assert [piece.start for piece in pieces] == [0, 4, 8]
    torch.testing.assert_close(torch.cat([piece.values for piece in pieces], dim=1), whole.values)


def test_a_model_stored_in_bfloat16_is_widened_not_copied_wrong(tmp_path: Path) -> None:
    save_model(tmp_path / "f32", "MixtralConfig", num_local_experts=2, num_experts_per_tok=2)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    streamed = open_streamed(tmp_path / "bf16")
    batch = left_padded()
    (piece,) = streamed.logits(streamed.advance(streamed.start([batch])))
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(piece.values, expected)


def test_at_most_one_layer_has_storage_at_any_time(tmp_path: Path) -> None:
    streamed = open_streamed(save_model(tmp_path, "MixtralConfig", num_local_experts=3, num_hidden_layers=5))

    def with_storage() -> set[str]:
        return {
            f"{module_name}.{name}"
            for module, module_name in streamed._names.items()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.device.type != "meta"
        }

    run = streamed.start([left_padded()])
    assert with_storage() == set()
    for layer in streamed.layers():
        assert with_storage() == {f"model.layers.{layer.index}.{name}" for name, _ in layer.module.named_parameters()}
        layer.advance(run)
    assert with_storage() == set()
    for _ in streamed.logits(run):
        assert with_storage() == {"model.norm.weight", "lm_head.weight"}
    assert with_storage() == set()


MEMORY_SCRIPT = """
import json, sys, torch
from pathlib import Path
from merge.evaluate import checkpoint_expressions
from merge.forward import Batch, StreamedModel

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peaks = []
for folder in sys.argv[1:]:
    tensors, config, evaluator = checkpoint_expressions(Path(folder))
    model = StreamedModel(config, tensors, evaluator, device="cpu")
    run = model.start([Batch(torch.arange(8)[None])])
    before = anonymous()
    peak = before
    for layer in model.layers():
        layer.advance(run)
        peak = max(peak, anonymous())
    peaks.append(peak - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_memory_stays_that_of_one_layer_when_layers_are_added(tmp_path: Path) -> None:
    for layers in (3, 24):
        config = transformers.LlamaConfig(
            **SMALL | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": layers}
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / str(layers))
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "3"), str(tmp_path / "24")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = json.loads(done.stdout)  # KiB
    layer = 4 * (512 * 512 * 3 + 3 * 512 * 4096) // 1024  # float32, KiB
    assert few < 2 * layer
    assert many < 2 * layer


def test_gates_of_a_plan_are_read_as_routers(tmp_path: Path) -> None:
    save_model(tmp_path, "MixtralConfig", num_local_experts=3, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tensors, config, evaluator = checkpoint_expressions(tmp_path)
    routers = [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]
    gates = {layer: evaluator.tensor(tensors[name]).clone() for layer, name in enumerate(sorted(routers))}
    planned: dict[str, Expr] = dict(tensors)
    for layer, name in enumerate(sorted(routers)):
        planned[name] = Cast(Gate(layer, "F32", (3, 32)), "F32")
    streamed = StreamedModel(config, planned, Evaluator(evaluator.files, gates), device="cpu")
    batch = left_padded()
    (piece,) = streamed.logits(streamed.advance(streamed.start([batch])))
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(piece.values, expected)


def test_older_config_keys_mean_what_transformers_takes_them_to_mean(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaConfig")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"], config["head_dim"]
    config |= {"rope_theta": 500.0, "torch_dtype": "float16", "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    streamed = open_streamed(tmp_path)
    batch = left_padded()
    (piece,) = streamed.logits(streamed.advance(streamed.start([batch])))
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(piece.values, expected)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(save_model(tmp_path, "LlamaConfig"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        StreamedModel(config, tensors, evaluator, device="cpu")


def test_a_missing_expert_is_counted(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "MixtralConfig", num_local_experts=3)
    tensors, config, evaluator = checkpoint_expressions(folder)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    with pytest.raises(SourceError, match=r"layers\.1"):
        StreamedModel(config, tensors, evaluator, device="cpu")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(save_model(tmp_path, "LlamaConfig"))
    with pytest.raises(SourceError, match="the config asks for"):
        StreamedModel(config | {"intermediate_size": 64}, tensors, evaluator, device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"model_type": None},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": "many"},
        {"hidden_act": "no_such_function"},
        {"pad_token_id": 10**6},
        {"model_type": "bert"},
    ],
)
def test_a_config_that_makes_no_model_is_a_source_error(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(save_model(tmp_path, "LlamaConfig"))
    with pytest.raises(SourceError):
        StreamedModel(config | changes, tensors, evaluator, device="cpu")


def test_tensors_the_model_does_not_read_are_named(tmp_path: Path) -> None:
    tensors, config, evaluator = checkpoint_expressions(save_model(tmp_path, "LlamaConfig"))
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    streamed = StreamedModel(config, tensors | {extra: tensors["model.norm.weight"]}, evaluator, device="cpu")
    assert streamed.unused == (extra,)


def test_a_token_beyond_the_embedding_is_a_source_error(tmp_path: Path) -> None:
    streamed = open_streamed(save_model(tmp_path, "LlamaConfig"))
    with pytest.raises(SourceError, match="token 100"):
        streamed.start([Batch(torch.tensor([[1, 100]]))])


def test_progress_counts_every_layer(tmp_path: Path) -> None:
    streamed = open_streamed(save_model(tmp_path, "LlamaConfig"))
    seen: list[int] = []
    streamed.advance(streamed.start([left_padded()]), seen.append)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("device", ["cuda:99", "mps", "gpu", ""])
def test_a_device_that_is_not_there_is_wrong_use(device: str) -> None:
    with pytest.raises(UsageError):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_cuda_device_auto_is_the_cpu_and_cuda_is_wrong_use() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device cpu"):
        resolve_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama, grouped queries", "mistral, sliding window", "mixtral"])
def test_a_cuda_device_gives_the_cpus_numbers(name: str, tmp_path: Path) -> None:
    config_class, changes = MODELS[name]
    tensors, config, evaluator = checkpoint_expressions(save_model(tmp_path, config_class, **changes))
    logits = {}
    for device in ("cpu", "cuda"):
        streamed = StreamedModel(config, tensors, evaluator, device=device)
        (piece,) = streamed.logits(streamed.advance(streamed.start([left_padded()])))
        logits[device] = piece.values.cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-3, atol=1e-3)
