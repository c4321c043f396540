"""Measuring an importance matrix: what goes into each matrix of a model while text runs through it, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quants.imatrix import Imatrix
from quants.layout import Layout, Origin
from quants.mixtures import layer_of, stays_f32
from quants.nodes import GgufExpr, HeadRows

if TYPE_CHECKING:
    from merge.forward import Batch, Progress, StreamedLayer, StreamedModel


def collect(
    model: StreamedModel,
    layout: Layout,
    batches: Sequence[Batch],
    datasets: Sequence[str],
    progress: Progress | None = None,
) -> Imatrix:
    """Runs `batches` (equally long, without padding) through the model and sums up what its matrices are given.

    Layer by layer, on the model's device. `layout` says what each matrix is called in a GGUF file.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for tensor in layout.tensors:
        shape = tensor.expr.shape
        if layer_of(tensor.name) is not None and not stays_f32(tensor.name, shape):
            experts = shape[0] if len(shape) == 3 else 1
            sums[tensor.name] = torch.zeros(experts, shape[-1], dtype=torch.float64)
            counts[tensor.name] = torch.zeros(experts)
    run = model.start(batches)
    for layer in model.layers(progress):
        places = dict(_places(model, layer, layout))
        meter = _Meter({pointer: [at for at in found if at[0] in sums] for pointer, found in places.items()}, model)
        with meter:
            layer.advance(run)
        for (name, expert), (total, count) in meter.totals.items():
            sums[name][expert] += total.cpu()
            counts[name][expert] += count
    chunk = batches[0].input_ids.shape[1]
    return Imatrix(
        {name: total.float().numpy() for name, total in sums.items()},
        {name: count.numpy() for name, count in counts.items()},
        sum(batch.input_ids.shape[0] for batch in batches),
        chunk,
        tuple(datasets),
    )


# A row of the matrix file: GGUF tensor and expert, of experts that are loaded one at a time HERE.
_Place = tuple[str, int]
HERE = -1


class _Meter(TorchFunctionMode):
    """Sees every matrix product of a layer while it runs, and sums the squares of what goes into it.

    `places` says which weights they are by the address of their numbers: modules of all families end in the same function,
    whether their experts are modules or slices of one tensor.
    """

    def __init__(self, places: Mapping[int, Sequence[_Place]], model: StreamedModel) -> None:
        super().__init__()
        self.places, self.model = places, model
        self.totals: dict[_Place, tuple[torch.Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and (places := self.places.get(args[1].data_ptr())):
            x = args[0].reshape(-1, args[0].shape[-1])  # (tokens, columns)
            squares = x.double().square().sum(0)
            for name, expert in places:
                place = name, self.model.expert if expert == HERE else expert
                total, count = self.totals.get(place, (torch.zeros_like(squares), 0))
                self.totals[place] = total + squares, count + len(x)
        return func(*args, **(kwargs or {}))


def _places(model: StreamedModel, layer: StreamedLayer, layout: Layout) -> Iterator[tuple[int, list[_Place]]]:
    """Of each matrix in a layer the address, and the rows of the file that it belongs to."""
    sources = model.parameter_sources(layer)
    exprs = {tensor.name: tensor.expr for tensor in layout.tensors}
    for name, parameter in layer.module.named_parameters():
        names = sources[name]
        if parameter.dim() == 2:
            origins = [origin for source in names for origin in layout.origins.get(source, ())]
            yield parameter.data_ptr(), [row for origin in origins for row in _rows(origin, exprs.get(origin.tensor))]
        elif name in layer.one_expert:
            origins = [origin for source in names for origin in layout.origins.get(source, ())]
            yield (
                parameter.data_ptr(),
                [(tensor, HERE) for tensor in dict.fromkeys(origin.tensor for origin in origins)],
            )
        elif parameter.dim() == 3:
            experts = len(parameter)
            for expert in range(experts):
                # One tensor of all experts, or those of the experts in turn, part after part.
                own = names if len(names) < experts else names[expert::experts]
                origins = [origin for source in own for origin in layout.origins.get(source, ())]
                yield parameter[expert].data_ptr(), [(origin.tensor, expert) for origin in origins]


def _rows(origin: Origin, x: GgufExpr | None) -> list[_Place]:
    """The rows of the file that a matrix belongs to. All heads' values are made of one latent; what llama.cpp multiplies the
    keys' turned matrix with, the queries, is no input of the checkpoint's."""
    if isinstance(x, HeadRows):
        return [] if x.turned else [(origin.tensor, head) for head in range(x.heads)]
    return [(origin.tensor, origin.expert or 0)]
