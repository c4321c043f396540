"""The forward pass of a checkpoint that need not fit in memory: one layer's weights at a time, on any device.

The arithmetic is transformers' own. Its model is built without storage (on torch's meta device), and so are its layers;
each layer gets real weights, evaluated from the plan's expressions, only while it runs:

    model = StreamedModel(config, tensors, evaluator, device="auto")
    run = model.start(batches)                     # embeddings, masks, rotary angles
    for layer in model.layers():                   # the weights of `layer.module` are loaded now, and gone after
        ... run.hidden[b]                          # (B, T, H): what enters this layer, batch by batch
        ... layer.module.register_forward_hook     # or look inside: hooks go with the loop's turn
        layer.advance(run)                         # run.hidden[b] becomes what leaves it
    for piece in model.logits(run): ...            # final norm and head, slice by slice

How the model treats its inputs (embedding multipliers, causal and sliding masks, left padding, rotary scaling) is not
repeated here: `start` calls the model's own forward with layers that only note down what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from merge.errors import SourceError, UsageError
from merge.evaluate import TORCH_DTYPES, Evaluator
from merge.expr import Cast, Concat, Expr, Gate, Read, elements
from merge.memory import all_memory
from merge.one_expert import one_expert_at_a_time
from merge.skeleton import fill_computed_buffers, places_of, sources_of, without_storage

# What a layer is called with beside the hidden states.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
# Told of layers done, one by one.
Progress: TypeAlias = Callable[[int], None]

# Logits of about this many elements are made at a time: 256 MB in float32.
LOGITS_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T), int64; which of them are not padding (B, T), 0 or 1, where None means all of them; and each token's
    position (B, T), where None means that of its column. Positions that start again, without a mask or a cache, start another
    text."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


@dataclass
class Run:
    """Activations under way. `hidden[b]` (B, T, H) rests in host memory, in the compute dtype; `calls[layer][b]` is
    what the model passes to that layer beside it (masks, positions, rotary angles), on the device."""

    hidden: list[torch.Tensor]
    calls: list[list[Call]]


@dataclass(frozen=True)
class StreamedLayer:
    """A decoder layer whose weights are in memory for one turn of the loop over `StreamedModel.layers`; of its parameters named
    in `one_expert` one expert at a time, the model's `expert`."""

    index: int
    module: nn.Module
    device: torch.device
    one_expert: frozenset[str] = frozenset()

    def output(self, run: Run, b: int) -> torch.Tensor:
        """What this layer makes of `run.hidden[b]`: (B, T, H) on the device. Changes nothing."""
        args, kwargs = run.calls[self.index][b]
        with torch.no_grad():
            out = self.module(run.hidden[b].to(self.device), *args, **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def advance(self, run: Run) -> None:
        """Replace every `run.hidden[b]` by what leaves this layer."""
        for b in range(len(run.hidden)):
            run.hidden[b] = self.output(run, b).cpu()


@dataclass(frozen=True)
class Logits:
    """Logits (B, t, V) on the device, of positions `start` to `start + t` of batch number `batch`."""

    batch: int
    start: int
    values: torch.Tensor


class StreamedModel:
    """A causal language model of transformers whose weights are expressions.

    `config` is its config.json and `tensors` its tensors under their names on the Hub. Raises SourceError where
    transformers has no such model, or a tensor it needs is missing or of another shape, and UsageError for a device
    that is not there. `unused` names the tensors the model does not read. Where the experts of a layer would take more than
    `memory` bytes (what the device has, by default), they are loaded one at a time.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Expr],
        evaluator: Evaluator,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        memory: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = dtype
        self._memory = free_memory(self.device) if memory is None else memory
        self._tensors = tensors
        self._evaluator = evaluator
        self._model = without_storage(config, tensors)
        fill_computed_buffers(self._model, self.device)
        self.config = self._model.config
        self._prefix: str = self._model.base_model_prefix
        self._backbone = getattr(self._model, self._prefix)
        self._layers: list[nn.Module] = list(self._backbone.layers)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._sources, self.unused = sources_of(self._model, tensors)
        self.expert = 0  # of experts that are loaded one at a time, the one that is there

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def parameter_sources(self, layer: StreamedLayer) -> dict[str, list[str]]:
        """By parameter of a layer's module, the tensors that it is made of: those of the experts in turn, part after part
        (gate, up)."""
        prefix = self._names[layer.module] + "."
        return {name: self._sources[prefix + name] for name, _ in layer.module.named_parameters()}

    def embedding_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (n,) of the embedding matrix as stored, (n, H) in the compute dtype on the device. Only these
        rows are read. Raises SourceError where an id has no row."""
        (name,) = self._sources[self._names[self._model.get_input_embeddings()] + ".weight"]
        expr = self._tensors[name]
        if len(ids) and int(ids.max()) >= expr.shape[0]:
            raise SourceError(
                f"the tokenizer gives token {int(ids.max())}, but the embedding has only {expr.shape[0]} rows: "
                "the tokenizer is not this model's"
            )
        rows = torch.empty(len(ids), expr.shape[1], dtype=self.dtype)
        for i, row in enumerate(ids.tolist()):
            rows[i] = self._evaluator.rows(expr, row, row + 1)[0]
        return rows.to(self.device)

    def gates(self, layer: int) -> list[tuple[nn.Module, int]]:
        """The modules of `layer` whose weights are gates, each with its first row among the layer's: the router first, then
        that of a shared expert; none in a dense model."""
        found = []
        for parameter, sources in self._sources.items():
            expr = self._tensors[sources[0]]
            expr, before = (expr.xs[-1], elements(expr.xs[0])) if isinstance(expr, Concat) else (expr, 0)
            expr = expr.x if isinstance(expr, Cast) else expr
            if isinstance(expr, Gate) and expr.layer == layer:
                first = expr.first - before // expr.shape[1]
                found.append((self._model.get_submodule(parameter.rpartition(".")[0]), first))
        return sorted(found, key=lambda pair: pair[1])

    def start(self, batches: Sequence[Batch], cache: Any = None) -> Run:
        """Embed the batches and note down how the model calls its layers for each.

        With a `cache` of transformers (for one batch), keys and values are kept in it, and those of earlier runs seen.
        """
        run = Run(hidden=[], calls=[[] for _ in self._layers])
        # Batches of one shape, mask and positions are given the same masks and angles: these are kept once.
        known: dict[tuple[torch.Size, bytes, bytes], list[Call]] = {}
        for batch in batches:
            layout = (batch.input_ids.shape, _bytes(batch.attention_mask), _bytes(batch.position_ids))
            embedded, calls = self._record(batch, cache)
            calls = known.setdefault(layout, calls)
            run.hidden.append(embedded.cpu())
            for of_layer, call in zip(run.calls, calls, strict=True):
                of_layer.append(call)
        return run

    def layers(self, progress: Progress | None = None) -> Iterator[StreamedLayer]:
        """The decoder layers in order, each with its weights in memory until the next one is asked for."""
        storage: dict[str, torch.Tensor] = {}
        for index in range(self.num_layers):
            with self.layer(index, storage) as layer:
                yield layer
            if progress:
                progress(1)

    @contextmanager
    def layer(self, index: int, storage: dict[str, torch.Tensor]) -> Iterator[StreamedLayer]:
        """One decoder layer, with its weights in memory for the time of a `with`. `storage` keeps the memory that they lie in
        for the next one."""
        module = self._layers[index]
        with self._loaded(module, storage) as streamed:
            yield StreamedLayer(index, module, self.device, streamed)

    def advance(self, run: Run, progress: Progress | None = None) -> Run:
        """Take `run` through all layers."""
        for layer in self.layers(progress):
            layer.advance(run)
        return run

    def logits(self, run: Run) -> Iterator[Logits]:
        """The final norm and the language model head over what left the last layer, a slice of positions at a time."""
        norm, head = self._backbone.norm, self._model.get_output_embeddings()
        # The model's own forward, its backbone replaced, so that it applies its logit scales and caps itself.
        given = _Given()
        with self._loaded(norm, {}), self._loaded(head, {}), _replaced(self._model, self._prefix, given):
            for b, hidden in enumerate(run.hidden):
                step = max(1, LOGITS_ELEMENTS // (hidden.shape[0] * self.config.vocab_size))
                for start in range(0, hidden.shape[1], step):
                    with torch.no_grad():
                        given.hidden = norm(hidden[:, start : start + step].to(self.device))  # (B, t, H)
                        values = self._model(inputs_embeds=given.hidden).logits  # (B, t, V)
                    yield Logits(b, start, values)

    def _record(self, batch: Batch, cache: Any = None) -> tuple[torch.Tensor, list[Call]]:
        """The embedded batch (B, T, H) and the arguments that each layer is called with beside it."""
        # Only the rows in use are loaded, so the ids are numbered anew: `ids` (n,), their places (B, T).
        ids, places = torch.unique(batch.input_ids, return_inverse=True)
        embedding = self._model.get_input_embeddings()
        recorders = [_Recorder() for _ in self._layers]
        # It concerns gradients alone, and would have to be one of the few rows that are here.
        embedding.padding_idx = None
        storageless = {"weight": embedding.weight}
        _set_tensors(embedding, {"weight": self.embedding_rows(ids)})
        try:
            with (
                torch.no_grad(),
                _replaced(self._backbone, "layers", nn.ModuleList(recorders)),
                _replaced(self._backbone, "norm", nn.Identity()),
            ):
                out = self._backbone(
                    input_ids=places.to(self.device),
                    attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(self.device),
                    position_ids=None if batch.position_ids is None else batch.position_ids.to(self.device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            _set_tensors(embedding, storageless)
        return out.last_hidden_state, [recorder.call for recorder in recorders]

    @contextmanager
    def _loaded(self, module: nn.Module, storage: dict[str, torch.Tensor]) -> Iterator[frozenset[str]]:
        """Real weights in `module` for the time of a `with`, which gets the names of those that come expert by expert.

        `storage` keeps the memory they lie in, by name within the module, for the next module of the same shapes.
        """
        prefix = self._names[module] + "."
        storageless = dict(module.state_dict(keep_vars=True))
        for name in list(storage):
            if name not in storageless or storage[name].shape != storageless[name].shape:
                del storage[name]
        streamed = self._experts_too_large(prefix, storageless)
        resident = {name: x for name, x in storageless.items() if name not in streamed}
        _set_tensors(module, {name: self._weight(prefix, name, x, storage) for name, x in resident.items()})
        with ExitStack() as stack:
            for owner in {name.rpartition(".")[0] for name in streamed}:
                names = [name.rpartition(".")[2] for name in streamed if name.rpartition(".")[0] == owner]
                experts = streamed[f"{owner}.{names[0]}"].shape[0]

                def load(
                    name: str, expert: int, place: torch.Tensor, at: str = f"{prefix}{owner}.", experts: int = experts
                ) -> None:
                    self._load_expert(at + name, experts, expert, place)

                stack.enter_context(
                    one_expert_at_a_time(module.get_submodule(owner), names, load, self.dtype, self.device)
                )
            try:
                yield frozenset(streamed)
            finally:
                _set_tensors(module, {name: x for name, x in storageless.items() if name in resident})

    def _experts_too_large(self, prefix: str, empties: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a layer's parameters those that hold all its experts (E, ., .), if together they exceed the memory."""
        owners = {name: self._model.get_submodule((prefix + name).rpartition(".")[0]) for name in empties}
        fused = {name: x for name, x in empties.items() if x.dim() == 3 and hasattr(owners[name], "num_experts")}
        return fused if sum(x.numel() for x in fused.values()) * self.dtype.itemsize > self._memory else {}

    def _load_expert(self, parameter: str, experts: int, expert: int, place: torch.Tensor) -> None:
        """Fill `place` (1, k*R, C) with one expert's part of a parameter (E, k*R, C)."""
        self.expert = expert
        exprs = [self._tensors[source] for source in self._sources[parameter]]
        if len(exprs[0].shape) == 3:  # one tensor has all experts
            place[0].copy_(self._evaluator.rows(exprs[0], expert, expert + 1)[0])
            return
        mine = exprs[expert::experts]  # k of them: the sources are ordered by part, then by expert
        for expr, part in zip(mine, place[0].chunk(len(mine)), strict=True):
            self._copy(expr, part)

    def _copy(self, expr: Expr, place: torch.Tensor) -> None:
        """Evaluate `expr` into `place`, slice by slice."""
        start = 0
        for piece in self._evaluator.slices(expr):
            place.view(-1)[start : start + len(piece)].copy_(piece.to(self.device))
            start += len(piece)

    def _weight(self, prefix: str, name: str, empty: torch.Tensor, storage: dict[str, torch.Tensor]) -> torch.Tensor:
        """The value of a parameter or buffer on the device: a view of the file where it can be, else in `storage`."""
        exprs = [self._tensors[source] for source in self._sources[prefix + name]]
        dtype = self.dtype if empty.dtype.is_floating_point else empty.dtype
        bare = len(exprs) == 1 and isinstance(exprs[0], Read) and TORCH_DTYPES.get(exprs[0].dtype) == dtype
        if bare and self.device.type == "cpu":
            return self._evaluator.tensor(exprs[0]).view(empty.shape)
        if name not in storage:
            storage[name] = torch.empty(empty.shape, dtype=dtype, device=self.device)
        for expr, place in zip(exprs, places_of(storage[name], exprs), strict=True):
            self._copy(expr, place)
        return storage[name]


def resolve_device(device: str) -> torch.device:
    """The torch device that `device` means: `auto` is the first CUDA device, or else the CPU.

    Raises UsageError where the name is none of torch's, or that device is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is not one torch knows: use auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch finds no CUDA device here; use --device cpu (or auto)")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: this machine has only {torch.cuda.device_count()} CUDA device(s)")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    return found


def free_memory(device: torch.device) -> int:
    """Bytes that weights may take on a device: most of what is free on a GPU, half of all on the CPU: the same at every run,
    as sums in another order are other bits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.7)
    return all_memory() // 2


def _bytes(x: torch.Tensor | None) -> bytes:
    return b"" if x is None else x.int().numpy().tobytes()


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes down what it is called with and passes the hidden states on."""

    call: Call

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call = args, kwargs
        return hidden_states


class _Given(nn.Module):
    """Stands in for a backbone: its last hidden state is the one it was given."""

    hidden: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def _set_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` in the place of the parameters and buffers of these names, without a copy."""
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor


@contextmanager
def _replaced(module: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    """Another submodule under `name` for the time of a `with`."""
    original = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, original)
