"""A router that is calibrated while the files that hold it are written, so that the base is read once for both.

The modes that read the dense base alone need, for a layer's router, the layers below it. What is known is kept on the disk, so
that a build goes on with the very routers that its uploaded files hold, whatever interrupted it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bot.gates import prompts_of
from bot.work import Work
from merge.files import write_atomically, writing
from merge.gates.store import save_gates
from merge.progress import say
from merge.source_files import open_files

if TYPE_CHECKING:
    from merge.gates.added import Rows
    from merge.gates.mergekit import Step

# Hidden states of more bytes than these are not kept: a run after a kill then begins with the first layer again.
STATES = 2_000_000


class GatesByLayer(Mapping[int, "Rows"]):
    """The routers of a plan, layer -> (experts, hidden): those that `advance` has come to."""

    def __init__(self, work: Work) -> None:
        self._work, self._started = work, time.monotonic()
        self._path = work.out / "gates.partial"
        self._known: dict[int, Rows] = {}
        self._after: Step | None = None
        self._steps: Iterator[Step] | None = None
        self._read()

    def __getitem__(self, layer: int) -> Rows:
        return self._known[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def advance(self, layer: int) -> None:
        """Calibrate until the router of `layer` is known. Raises what `merge.gates.mergekit.calibrate` raises."""
        while layer not in self._known:
            if self._steps is None:
                self._steps = self._begin()
            step = next(self._steps)
            if step.layer not in self._known:
                self._known[step.layer] = step.gates.numpy()
                self._write(step)

    def finish(self) -> Path:
        """The file of all routers, under their content address; a finished stage of the build."""
        work = self._work
        self.advance(work.plan.config["num_hidden_layers"] - 1)
        made = save_gates(self._known, work.out, work.gates_key, {"mode": work.plan.gate_mode})
        work.state.finish("gates", work.gates_key, [made], {"seconds": time.monotonic() - self._started})
        self._path.unlink(missing_ok=True)
        return made

    def _begin(self) -> Iterator[Step]:
        from merge.evaluate import Evaluator
        from merge.gates.mergekit import calibrate_by_layer

        plan, base = self._work.plan, self._work.local[self._work.plan.base]
        assert base.folder is not None
        say(f"gates ({plan.gate_mode}): calibrated layer by layer, as they are written")
        return calibrate_by_layer(
            plan.gate_mode,
            prompts_of(self._work.loaded, plan),
            base.config,
            plan.dense_tensors,
            Evaluator(open_files({plan.base: base})),
            base.folder,
            self._work.on_device,
            self._after,
        )

    def _write(self, step: Step) -> None:
        import torch

        tensors = {f"gates.{layer}": torch.from_numpy(gate) for layer, gate in self._known.items()}
        if sum(states.nbytes for states in step.hidden) <= STATES:
            tensors |= {f"hidden.{number:06}": states.clone() for number, states in enumerate(step.hidden)}
        with writing(self._path):
            write_atomically(self._path, save(tensors, {"key": self._work.gates_key, "layer": str(step.layer)}))

    def _read(self) -> None:
        """What an earlier run left of the same calibration."""
        from merge.gates.mergekit import Step

        try:
            with safe_open(self._path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self._work.gates_key:
                    return
                found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError):
            return
        gates = {name: x for name, x in found.items() if name.startswith("gates.")}
        self._known = {int(name.removeprefix("gates.")): np.ascontiguousarray(x.numpy()) for name, x in gates.items()}
        if hidden := tuple(x for name, x in found.items() if name.startswith("hidden.")):
            layer = int(about["layer"])
            self._after = Step(layer, gates[f"gates.{layer}"], hidden)
