"""Router weights from prompts: the gate modes of mergekit-moe, with their meaning.

Each expert e gets, in each layer, one vector of the hidden size; the router's logit for e is the dot product with it.

    random          N(0, 1), the same for the same seed
    uniform_random  U(-1/sqrt(H), 1/sqrt(H)), likewise
    cheap_embed     the sum of the embeddings of the tokens of all the expert's prompts; one vector for every layer
    hidden          the dense base model's hidden state entering the layer at the last token, averaged over the prompts
    hidden_last     the same as `hidden`
    hidden_avg      averaged over all positions first, BOS and padding included

All but the random ones are scaled to length 1, after the vector of the negative prompts has been subtracted.
Meaning: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md. Unlike there, random gates are seeded, and a prompt
longer than the model's context is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from merge.checkpoint import Checkpoint
from merge.errors import MoergeError, SourceError
from merge.evaluate import Evaluator
from merge.expr import Expr
from merge.files import write_atomically, writing
from merge.forward import Batch, Progress, StreamedModel

# Part of every content address: to be raised when the same inputs give other gates.
ALGORITHM = 1
RANDOM_MODES = ("random", "uniform_random")
MODES = (*RANDOM_MODES, "cheap_embed", "hidden", "hidden_last", "hidden_avg")
# mergekit's, for everything up to the difference of positive and negative. It is part of the meaning: where these nearly
# cancel, or a mean runs over positions of very unequal size, float32 gives a vector at cosine .998 from mergekit's.
HIDDEN_DTYPE = torch.bfloat16
# Rows of prompts run together up to this many tokens; the result depends on it by rounding only.
TOKENS_PER_BATCH = 4096
EMBEDDING = "model.embed_tokens.weight"
# Above this ratio of the largest to the smallest singular value mergekit warns of a degenerate router.
MAX_CONDITION = 5.0
# A vector shorter than this is not scaled up to length 1.
MIN_NORM = 1e-8


class PromptError(MoergeError):
    """A prompt that no gate can be made of."""

    exit_code = 1


@dataclass(frozen=True)
class ExpertPrompts:
    """What should go to an expert, and what should not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One layer's router. `condition` is the ratio of its largest to its smallest singular value (infinite where an
    expert's vector is a combination of the others); `cosine` the largest between two experts, `pair` (0 and None for a
    single expert)."""

    layer: int
    condition: float
    cosine: float
    pair: tuple[int, int] | None

    @property
    def is_degenerate(self) -> bool:
        return self.condition > MAX_CONDITION


def calibrate(
    mode: str,
    experts: Sequence[ExpertPrompts],
    config: Mapping[str, Any],
    tensors: Mapping[str, Expr],
    evaluator: Evaluator,
    tokenizer_folder: Path,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[int, torch.Tensor]:
    """The router of every layer: layer -> (experts, hidden), float32, on the CPU.

    `config`, `tensors` and `evaluator` are the dense base model's. Raises PromptError for a prompt that gives no gate,
    SourceError where the base or its tokenizer cannot be read, UsageError for a device that is not there.
    """
    if mode not in MODES:
        raise ValueError(f"gate mode {mode!r} is none of {', '.join(MODES)}")
    if mode in RANDOM_MODES:
        gates = random_gates(mode, config["num_hidden_layers"], len(experts), config["hidden_size"], seed)
        return dict(enumerate(gates))
    tokenizer = load_tokenizer(tokenizer_folder)
    # Embeddings know no positions, so `cheap_embed` takes a prompt of any length.
    context = None if mode == "cheap_embed" else config.get("max_position_embeddings")
    positive, negative = [], []
    for number, expert in enumerate(experts, 1):
        positive.append(_tokenize(tokenizer, expert.positive, context, f"expert {number}: positive prompt"))
        if expert.negative:
            negative.append(_tokenize(tokenizer, expert.negative, context, f"expert {number}: negative prompt"))
    dtype = torch.float32 if mode == "cheap_embed" else HIDDEN_DTYPE
    model = StreamedModel(config, tensors, evaluator, device, dtype)
    sets = [*positive, *negative]  # S of them
    if mode == "cheap_embed":
        vectors = _embedding_sums(model, sets)[:, None].expand(-1, model.num_layers, -1)  # (S, L, H)
    else:
        vectors = _hidden_means(model, sets, mode == "hidden_avg", progress)  # (S, L, H)
    gates = vectors[: len(experts)].clone()  # (E, L, H)
    with_negative = [e for e, expert in enumerate(experts) if expert.negative]
    gates[with_negative] -= vectors[len(experts) :]
    if not torch.isfinite(gates).all():
        raise SourceError("the base model's hidden states are not finite numbers, so no gate can be made of them")
    return dict(enumerate(_unit(gates.float()).transpose(0, 1).contiguous()))  # L x (E, H)


def base_files(mode: str, base: Checkpoint) -> tuple[str, ...]:
    """The files of the dense base model that `calibrate` reads: none, the tokenizer's and the embedding's, or all."""
    if mode in RANDOM_MODES:
        return ()
    shards = {
        info.file
        for name, info in (base.tensors or {}).items()
        if info.file is not None and (mode != "cheap_embed" or name == EMBEDDING)
    }
    return tuple(sorted({*shards, *base.companions}))


def random_gates(mode: str, layers: int, experts: int, hidden: int, seed: int) -> torch.Tensor:
    """Random routers (layers, experts, hidden), float32: the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if mode == "random":
        return torch.randn(layers, experts, hidden, generator=generator)
    bound = 1 / math.sqrt(hidden)
    return torch.rand(layers, experts, hidden, generator=generator) * 2 * bound - bound


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, from files alone: no code of the model's is run. Raises SourceError without one."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer's classes raise whatever their parsers raise
        raise SourceError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from None


def _tokenize(tokenizer: Any, prompts: Sequence[str], context: int | None, where: str) -> Batch:
    """The prompts (N) as token ids (N, T), padded on the left to the longest: BOS first where the tokenizer has one,
    no other special token, padding of BOS or else EOS. None may have more than `context` tokens."""
    rows: list[list[int]] = []
    for number, prompt in enumerate(prompts, 1):
        # No warning about the length: the check is below.
        row = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not row:
            raise PromptError(f"{where} {number} has no tokens: write some text, or take the prompt out")
        if context is not None and len(row) > context:
            raise PromptError(
                f"{where} {number} has {len(row)} tokens, but the base model reads {context} "
                "(max_position_embeddings): shorten it"
            )
        rows.append(row)
    if not rows:
        raise PromptError(f"{where}s are missing: this gate mode makes the router from them")
    width = max(len(row) for row in rows)  # T
    pad = next(
        (x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if x is not None), None
    )
    if pad is None and any(len(row) < width for row in rows):
        raise SourceError(
            "the tokenizer has no BOS, EOS or padding token, so prompts of unequal length cannot be padded"
        )
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(ids, mask)


def _embedding_sums(model: StreamedModel, sets: Sequence[Batch]) -> torch.Tensor:
    """For each of S sets of prompts the sum of its tokens' embeddings, scaled to length 1: (S, H)."""
    sums = []
    for batch in sets:
        assert batch.attention_mask is not None
        ids, counts = torch.unique(batch.input_ids[batch.attention_mask == 1], return_counts=True)  # (n,), (n,)
        sums.append(counts.float() @ model.embedding_rows(ids).cpu())  # (H,)
    return _unit(torch.stack(sums))


def _hidden_means(
    model: StreamedModel, sets: Sequence[Batch], over_positions: bool, progress: Progress | None
) -> torch.Tensor:
    """For each of S sets of prompts the mean hidden state entering each layer: (S, L, H).

    Of a prompt it is the mean over all its positions, or the last position alone.
    """
    batches: list[Batch] = []
    owner: list[int] = []
    for number, batch in enumerate(sets):
        assert batch.attention_mask is not None
        width = batch.input_ids.shape[1]
        step = max(1, TOKENS_PER_BATCH // width)
        for rows in range(0, len(batch.input_ids), step):
            batches.append(Batch(batch.input_ids[rows : rows + step], batch.attention_mask[rows : rows + step]))
            owner.append(number)
    sums = torch.zeros(len(sets), model.num_layers, model.config.hidden_size, dtype=model.dtype)
    counts = torch.tensor([len(batch.input_ids) for batch in sets])
    run = model.start(batches)

    def collect(layer: int) -> None:
        for number, hidden in zip(owner, run.hidden, strict=True):  # (B, T, H)
            vectors = hidden.sum(dim=1) / hidden.shape[1] if over_positions else hidden[:, -1]  # (B, H)
            sums[number, layer] += vectors.sum(dim=0)
        if progress:
            progress(1)

    collect(0)
    # What enters the last layer is known once the one before has run: the last one's weights are not needed.
    for layer in itertools.islice(model.layers(), model.num_layers - 1):
        layer.advance(run)
        collect(layer.index + 1)
    return sums / counts[:, None, None]


def _unit(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., H) scaled to length 1 along its last dimension."""
    length: torch.Tensor = x.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM)  # (..., 1)
    return x / length


def gate_report(gates: Mapping[int, torch.Tensor]) -> tuple[LayerReport, ...]:
    """How well each layer's router can tell the experts apart; `gates` maps a layer to (experts, hidden)."""
    layers = []
    for layer, gate in sorted(gates.items()):
        gate = gate.float()
        condition = float(torch.linalg.cond(gate)) if torch.isfinite(gate).all() else math.inf
        cosines = (_unit(gate) @ _unit(gate).T).fill_diagonal_(-math.inf)  # (E, E)
        pair = None
        if len(gate) > 1:
            first, second = divmod(int(cosines.argmax()), len(gate))
            pair = (min(first, second), max(first, second))
        layers.append(LayerReport(layer, condition, float(cosines.max()) if pair else 0.0, pair))
    return tuple(layers)


def gates_key(mode: str, experts: Sequence[ExpertPrompts], seed: int, base: str) -> str:
    """The content address of gates: 64 hexadecimal digits, equal where all that they are made from is equal.

    `base` is the base checkpoint's fingerprint.
    """
    made_from: dict[str, Any] = {"algorithm": ALGORITHM, "mode": mode, "experts": len(experts), "base": base}
    if mode in RANDOM_MODES:
        made_from["seed"] = seed
    else:
        made_from["mode"] = "hidden" if mode == "hidden_last" else mode
        made_from["prompts"] = [[list(expert.positive), list(expert.negative)] for expert in experts]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def gates_path(folder: Path, key: str) -> Path:
    """Where the gates of a content address lie in `folder`."""
    return folder / f"gates-{key[:16]}.safetensors"


def save_gates(gates: Mapping[int, torch.Tensor], folder: Path, key: str, metadata: Mapping[str, str]) -> Path:
    """Write gates, layer -> (experts, hidden), into `folder` under their content address; returns the file.

    `metadata` goes to the header, with the key. The file appears whole or not at all. Raises DestinationError.
    """
    path = gates_path(folder, key)
    write_gates(gates, path, key, metadata)
    return path


def write_gates(gates: Mapping[int, torch.Tensor], path: Path, key: str, metadata: Mapping[str, str]) -> None:
    """Write gates as the safetensors file `path`: the same gates and metadata give the same bytes."""
    # Not with the safetensors library, whose order of metadata changes from run to run.
    header: dict[str, Any] = {"__metadata__": {**metadata, "key": key}}
    data = b""
    for layer, gate in sorted(gates.items()):
        weight = gate.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).tobytes()
        offsets = [len(data), len(data) + len(weight)]
        header[f"layers.{layer}.gate"] = {"dtype": "F32", "shape": list(gate.shape), "data_offsets": offsets}
        data += weight
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned to eight bytes
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, struct.pack("<Q", len(raw)) + raw + data)


def load_gates(path: Path) -> dict[int, torch.Tensor]:
    """The gates of a file: layer -> (experts, hidden), float32. Raises SourceError where it is damaged or no gates."""
    try:
        with safe_open(path, framework="pt") as file:
            gates = {int(name.split(".")[1]): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise SourceError(f"{path}: not a gates file ({error})") from None
    if not gates or "key" not in metadata or any(gate.dim() != 2 for gate in gates.values()):
        raise SourceError(f"{path}: not a gates file")
    return gates
