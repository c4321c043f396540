"""The tensors of a merge: what a base keeps, and each layer's mixture, as expressions over the sources and the gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge.adapters import Delta
from merge.checkpoint import Checkpoint
from merge.expr import Concat, Expr, Gate, LowRank, Noise, Read, Scale, Zeros, cast
from merge.families.family import GATED_SHARED, Block, Family, Mlp
from merge.families.mixture import MoeLayer
from merge.families.model_types import MLP_PARTS
from merge.plan import OutputTensor
from merge.recipe import Expert
from merge.source_models import SourceModel


@dataclass(frozen=True)
class Mixing:
    """What the result is made of: `models` are the sources by key, `base` is the base's key, `experts` and `shared` are the
    recipe's, each with its source. `deltas` are what an adapter changes in a source's MLPs, by the keys of both. `dtype` is the
    result's; `seed` begins that of every noise."""

    family: Family
    models: Mapping[str, SourceModel]
    base: str
    experts: Sequence[tuple[Expert, Checkpoint]]
    shared: Sequence[tuple[Expert, Checkpoint]]
    deltas: Mapping[tuple[str, str], Mapping[str, Delta]]
    dtype: str
    seed: str

    def tensors(self) -> Iterator[OutputTensor]:
        """The result's tensors, in the order of the base's layers."""
        base = self.models[self.base]
        for name, _ in base.dense.tensors():
            if self.family.keeps(name):
                yield OutputTensor(name, cast(base.read(name), self.dtype))
            elif name.endswith(f".mlp.{MLP_PARTS[0]}.weight"):
                layer = int(name.split(".")[2])
                block = self._added(layer, base.layers[layer]) if base.mixture else self._block(layer)
                for output_name, x in self.family.block_tensors(block):
                    yield OutputTensor(output_name, x)

    def _block(self, layer: int) -> Block:
        """The mixture of one layer, of the recipe's experts."""
        base, count = self.models[self.base].dense, len(self.experts)
        gated = self.shared and self.family.SHARED == GATED_SHARED
        return Block(
            layer=layer,
            base=base,
            dtype=self.dtype,
            router=Gate(layer, self.dtype, (count, base.hidden_size)),
            experts=tuple(self._experts(layer, 0)),
            shared=self._mlp(layer, *self.shared[0], "shared") if self.shared else None,
            shared_gate=Gate(layer, self.dtype, (1, base.hidden_size), first=count) if gated else None,
        )

    def _added(self, layer: int, kept: MoeLayer) -> Block:
        """The mixture of one layer of a base that is a mixture already, the recipe's experts behind its own."""
        base, before, count = self.models[self.base].dense, len(kept.experts), len(self.experts)
        shared = self._mlp(layer, *self.shared[0], "shared") if self.shared else None
        correction: Expr | None = None
        if kept.correction:
            correction = Concat((cast(kept.correction, self.dtype), Zeros(self.dtype, (count,))))
        new = Gate(layer, self.dtype, (count, base.hidden_size), first=before)
        return Block(
            layer=layer,
            base=base,
            dtype=self.dtype,
            router=Concat((cast(kept.router, self.dtype), new)),
            experts=(*map(self._cast, kept.experts), *self._experts(layer, before)),
            shared=self._cast(kept.shared) if kept.shared else shared,
            shared_gate=cast(kept.shared_gate, self.dtype) if kept.shared_gate else None,
            correction=correction,
        )

    def _experts(self, layer: int, first: int) -> Iterator[Mlp]:
        """The recipe's experts of a layer, `first` the number of the first."""
        for number, (expert, checkpoint) in enumerate(self.experts, first):
            yield self._mlp(layer, expert, checkpoint, f"experts.{number}")

    def _mlp(self, layer: int, expert: Expert, checkpoint: Checkpoint, name: str) -> Mlp:
        """An expert's MLP: its source's, with what an adapter adds and the recipe changes."""
        found: dict[str, Expr] = {}
        for part, x in self.models[checkpoint.key].mlp(layer, expert.expert).items():
            altered = self._altered(expert, part, self._adapted(checkpoint, x), f"layers.{layer}.{name}.{part}")
            found[part] = cast(altered, self.dtype)
        return found

    def _cast(self, mlp: Mlp) -> Mlp:
        return {part: cast(x, self.dtype) for part, x in mlp.items()}

    def _adapted(self, checkpoint: Checkpoint, x: Expr) -> Expr:
        """A matrix of a source with the delta that the source's adapter has for it."""
        adapter = checkpoint.adapter
        if adapter is None or not isinstance(x, Read):
            return x
        delta = self.deltas[checkpoint.key, adapter.key].get(x.tensor)
        if delta is None:
            return x
        infos = adapter.tensors or {}
        b, a = (Read(adapter.key, name, infos[name].dtype, infos[name].shape) for name in (delta.b, delta.a))
        return LowRank(x, b, a, delta.scale)

    def _altered(self, expert: Expert, part: str, x: Expr, place: str) -> Expr:
        """`noise_scale` adds noise to each matrix of the expert, `residual_scale` then scales the one that writes to the
        residual stream: mergekit's meaning and order."""
        if expert.noise_scale:
            x = Noise(x, expert.noise_scale, f"{self.seed}:{place}")
        if expert.residual_scale is not None and part == "down_proj":
            x = Scale(x, expert.residual_scale)
        return x
