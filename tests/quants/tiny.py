"""Tiny models with weights that are the same on every machine, and tokenizers built by hand for them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# Tokens of the byte_fallback and sentencepiece tokenizers, the latter without its added one.
PIECES = 359
WORDS = [
    "the",
    "capital",
    "of",
    "france",
    "is",
    "paris",
    "and",
    "a",
    "model",
    "with",
    "many",
    "small",
    "experts",
    "reads",
    "text",
    "well",
    "in",
    "every",
    "language",
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def config(**changes: Any) -> dict[str, Any]:
    """config.json of a Mixtral whose rows divide into every block size; `changes` are laid over it."""
    base = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    if changes.get("model_type", "mixtral") != "mixtral":
        del base["num_local_experts"], base["num_experts_per_tok"]
    return base | changes


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, as they are on the Hub."""
    kind, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (heads * size, hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * size, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * size, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * size),
        }
        if kind == "deepseek_v3":
            for part in "qkv":
                del found[f"{at}.self_attn.{part}_proj.weight"]
            found |= _latent_attention(config, f"{at}.self_attn")
        if kind == "hunyuan_v1_moe":
            found |= {f"{at}.self_attn.{part}_layernorm.weight": (size,) for part in ("query", "key")}
        if kind == "cohere2_moe":
            del found[f"{at}.post_attention_layernorm.weight"]
        if kind == "granitemoe_swa":
            found[f"{at}.self_attn.sinks"] = (heads,)
        if kind == "qwen2_moe":
            found |= {f"{at}.self_attn.q_proj.bias": (heads * size,)}
            found |= {f"{at}.self_attn.{part}_proj.bias": (kv_heads * size,) for part in "kv"}
        if kind == "qwen3_moe":
            found |= {f"{at}.self_attn.{part}_norm.weight": (size,) for part in "qk"}
        found |= _feed_forward(config, layer)
    return found


def _latent_attention(config: Mapping[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    """DeepSeek-V3's queries, keys and values, which are made through latents."""
    hidden, heads, q_rank, rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    plain, turned, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return {
        f"{at}.q_a_proj.weight": (q_rank, hidden),
        f"{at}.q_a_layernorm.weight": (q_rank,),
        f"{at}.q_b_proj.weight": (heads * (plain + turned), q_rank),
        f"{at}.kv_a_proj_with_mqa.weight": (rank + turned, hidden),
        f"{at}.kv_a_layernorm.weight": (rank,),
        f"{at}.kv_b_proj.weight": (heads * (plain + value), rank),
        f"{at}.o_proj.weight": (hidden, heads * value),
    }


def _feed_forward(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Of one layer what comes after the attention."""
    kind, hidden, inter = config["model_type"], config["hidden_size"], config["intermediate_size"]
    at = f"model.layers.{layer}"
    if kind in ("llama", "mistral") or layer < config.get("first_k_dense_replace", 0):
        return _mlp(f"{at}.mlp", inter, hidden)
    if kind == "mixtral":
        experts = config["num_local_experts"]
        found = {f"{at}.block_sparse_moe.gate.weight": (experts, hidden)}
        for expert in range(experts):
            found |= _mlp(f"{at}.block_sparse_moe.experts.{expert}", inter, hidden, ("w1", "w3", "w2"))
        return found
    if kind in ("granitemoe", "granitemoeshared"):
        experts, moe = config["num_local_experts"], f"{at}.block_sparse_moe"
        found = {
            f"{moe}.router.layer.weight": (experts, hidden),
            f"{moe}.input_linear.weight": (experts, 2 * inter, hidden),
            f"{moe}.output_linear.weight": (experts, hidden, inter),
        }
        if shared := config.get("shared_intermediate_size"):
            found[f"{at}.shared_mlp.input_linear.weight"] = (2 * shared, hidden)
            found[f"{at}.shared_mlp.output_linear.weight"] = (hidden, shared)
        return found
    if kind == "granitemoe_swa":
        experts, moe = config["num_local_experts"], f"{at}.block_sparse_moe"
        return {
            f"{moe}.router.weight": (experts, hidden),
            f"{moe}.experts.gate_up_proj": (experts, 2 * inter, hidden),
            f"{moe}.experts.down_proj": (experts, hidden, inter),
        }
    keys = {"deepseek": "n_routed_experts", "deepseek_v3": "n_routed_experts", "ernie4_5_moe": "moe_num_experts"}
    experts = config[keys.get(kind, "num_experts")]
    found: dict[str, tuple[int, ...]] = {
        f"{at}.mlp.gate{'.wg' if kind == 'hunyuan_v1_moe' else ''}.weight": (experts, hidden)
    }
    if kind == "hunyuan_v1_moe":
        found |= _mlp(f"{at}.mlp.shared_mlp", inter, hidden)
    else:
        inter = config.get("moe_intermediate_size", inter)
    for expert in range(experts):
        found |= _mlp(f"{at}.mlp.experts.{expert}", inter, hidden)
    if kind == "deepseek_v3":
        found[f"{at}.mlp.gate.e_score_correction_bias"] = (experts,)
    if kind.startswith("deepseek"):
        found |= _mlp(f"{at}.mlp.shared_experts", inter * config["n_shared_experts"], hidden)
    if kind == "ernie4_5_moe":
        found[f"{at}.mlp.moe_statics.e_score_correction_bias"] = (1, experts)
        found |= _mlp(f"{at}.mlp.shared_experts", inter * config["moe_num_shared_experts"], hidden)
    if kind == "qwen2_moe":
        found |= _mlp(f"{at}.mlp.shared_expert", config["shared_expert_intermediate_size"], hidden)
        found[f"{at}.mlp.shared_expert_gate.weight"] = (1, hidden)
    return found


def _mlp(
    at: str, inter: int, hidden: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    return {f"{at}.{gate}.weight": (inter, hidden), f"{at}.{up}.weight": (inter, hidden)} | {
        f"{at}.{down}.weight": (hidden, inter)
    }


def weight(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor near the normal distribution, from integers alone and so the same everywhere; norms are near one."""
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    total = random.integers(-(1 << 15), 1 << 15, (4, *shape), dtype=np.int64).sum(0).astype(np.float32) / (1 << 16)
    if len(shape) == 1:
        return torch.from_numpy(1 + total / 8).to(dtype)
    return torch.from_numpy(total * np.float32(2.0 / 16)).to(dtype)


def write_model(folder: Path, model_config: Mapping[str, Any], tokenizer: str = "byte_fallback") -> Path:
    """A checkpoint with the tokenizer of that name, one of TOKENIZERS."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[model_config["dtype"]]
    tensors = {name: weight(name, shape, dtype) for name, shape in shapes(model_config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model_config, indent=1))
    TOKENIZERS[tokenizer](folder)
    return folder


def _words() -> list[str]:
    """Pieces of several letters in the order of their scores: two that occur inside of words, then each word's beginnings.

    The two come first: `there` is `▁th`, `er`, `e`, and not `▁the`, `r`, `e`, for a reader that heeds the order.
    """
    beginnings = ("▁" + word[:end] for word in WORDS for end in range(1, len(word) + 1))
    return list(dict.fromkeys(("an", "er", *beginnings)))


def _merges() -> list[tuple[str, str]]:
    """Every way to make each piece of two others, as transformers lists them for a SentencePiece model."""
    known = {*_words(), *_letters()}
    splits = [(piece[:cut], piece[cut:]) for piece in _words() for cut in range(1, len(piece))]
    return [(left, right) for left, right in splits if left in known and right in known]


def _letters() -> list[str]:
    return sorted({letter for word in WORDS for letter in word} | {"▁"})


def _pieces() -> list[str]:
    """The vocabulary of both SentencePiece-like tokenizers, in the order of its ids."""
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_words(), *_letters()]


def byte_fallback(folder: Path) -> None:
    """Llama 2's kind of tokenizer.json."""
    special = [
        {"id": index, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(_pieces())},
            "merges": [" ".join(merge) for merge in _merges()],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    _tokenizer_config(folder, add_bos_token=True, add_eos_token=False)


def sentencepiece(folder: Path) -> None:
    """The same vocabulary as a tokenizer.model, with an added token in tokenizer_config.json."""

    def field(number: int, raw: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(raw)) + raw

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    model = b""
    for index, piece in enumerate(_pieces()):
        kind = 2 if index == 0 else 3 if index < 3 else 6 if index < 259 else 1
        score = 0.0 if index < 259 else 259.0 - index
        model += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
    # trainer_spec: kind BPE, byte fallback, ids of <unk>, <s> and </s>
    model += field(2, b"\x18\x02" + b"\x98\x02\x01" + b"\xc0\x02\x00" + b"\xc8\x02\x01" + b"\xd0\x02\x02")
    model += field(3, field(1, b"identity"))
    (folder / "tokenizer.model").write_bytes(model)
    added = {str(len(_pieces())): {"content": "<|turn|>", "special": True}}
    _tokenizer_config(folder, add_bos_token=True, add_eos_token=False, added_tokens_decoder=added)


def byte_level(folder: Path) -> None:
    """GPT-2's kind of tokenizer.json; llama.cpp has no name for it, so a test names its probe."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    merges = [(left.replace("▁", "Ġ"), right) for left, right in _merges()]
    vocabulary = ["<|end|>", *characters, *(word.replace("▁", "Ġ") for word in _words())]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<|end|>", "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary)},
            "merges": [list(merge) for merge in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))


def _tokenizer_config(folder: Path, **settings: Any) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    named |= {
        "tokenizer_class": "PreTrainedTokenizerFast" if "added_tokens_decoder" not in settings else "LlamaTokenizer"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))


TOKENIZERS = {"byte_fallback": byte_fallback, "sentencepiece": sentencepiece, "byte_level": byte_level}
