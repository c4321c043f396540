"""Gates on disk, under their content address. No torch but where a tensor is asked for."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from merge.errors import SourceError
from merge.files import write_atomically, writing
from merge.recipe import RANDOM_GATES

if TYPE_CHECKING:
    import torch

    from merge.gates.prompts import ExpertPrompts

# Part of every content address: to be raised when the same inputs give other gates.
ALGORITHM = 2

Gates = Mapping[int, "torch.Tensor | npt.NDArray[np.float32]"]


def gates_key(mode: str, experts: Sequence[ExpertPrompts], seed: int, base: str) -> str:
    """The content address of gates: 64 hexadecimal digits, equal where all that they are made from is equal.

    `base` is the base checkpoint's fingerprint.
    """
    made_from: dict[str, Any] = {"algorithm": ALGORITHM, "mode": mode, "experts": len(experts), "base": base}
    if mode in RANDOM_GATES:
        made_from["seed"] = seed
    else:
        made_from["mode"] = "hidden" if mode == "hidden_last" else mode
        made_from["prompts"] = [[list(expert.positive), list(expert.negative)] for expert in experts]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def gates_path(folder: Path, key: str) -> Path:
    """Where the gates of a content address lie in `folder`."""
    return folder / f"gates-{key[:16]}.safetensors"


def save_gates(gates: Gates, folder: Path, key: str, metadata: Mapping[str, str]) -> Path:
    """Write gates, layer -> (experts, hidden), into `folder` under their content address; returns the file.

    `metadata` goes to the header, with the key. The file appears whole or not at all. Raises DestinationError.
    """
    path = gates_path(folder, key)
    write_gates(gates, path, key, metadata)
    return path


def write_gates(gates: Gates, path: Path, key: str, metadata: Mapping[str, str]) -> None:
    """Write gates as the safetensors file `path`: the same gates and metadata give the same bytes."""
    # Not with the safetensors library, whose order of metadata changes from run to run.
    header: dict[str, Any] = {"__metadata__": {**metadata, "key": key}}
    data = b""
    for layer, gate in sorted(gates.items()):
        array = gate if isinstance(gate, np.ndarray) else gate.detach().cpu().float().numpy()
        weight = np.ascontiguousarray(array, dtype="<f4").tobytes()
        offsets = [len(data), len(data) + len(weight)]
        header[f"layers.{layer}.gate"] = {"dtype": "F32", "shape": list(gate.shape), "data_offsets": offsets}
        data += weight
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned to eight bytes
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, struct.pack("<Q", len(raw)) + raw + data)


def load_gates(path: Path) -> dict[int, torch.Tensor]:
    """Like `read_gates`, as tensors."""
    import torch

    return {layer: torch.from_numpy(gate) for layer, gate in read_gates(path).items()}


def read_gates(path: Path) -> dict[int, npt.NDArray[np.float32]]:
    """The gates of a file: layer -> (experts, hidden). Raises SourceError where it is damaged or no gates."""
    try:
        with safe_open(path, framework="np") as file:
            gates = {int(name.split(".")[1]): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise SourceError(f"{path}: not a gates file ({error})") from None
    if not gates or "key" not in metadata or any(gate.ndim != 2 or gate.dtype != np.float32 for gate in gates.values()):
        raise SourceError(f"{path}: not a gates file")
    return gates
