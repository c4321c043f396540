"""transformers' model of a config without its weights, and which tensors each of its parameters is made of."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merge.errors import SourceError
from merge.expr import Expr

# How transformers makes one parameter of many experts' tensors: stacked, and gate and up one after the other.
FUSIONS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
# Parts of config.json that do not concern the forward pass, or ask for outputs that would only cost memory here.
IGNORED_CONFIG = ("auto_map", "quantization_config", "torch_dtype", "dtype", "transformers_version")
FORCED_CONFIG = {
    "use_cache": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}


def without_storage(config: Mapping[str, Any], tensors: Mapping[str, Expr]) -> Any:
    """transformers' causal language model of `config`, all of it on the meta device."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise SourceError(f"model_type {model_type!r}: transformers {transformers_version} knows no such model")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):
        raise SourceError(f"the config names {layers} layers, but the checkpoint has only {len(tensors)} tensors")
    known = {key: value for key, value in copy.deepcopy(dict(config)).items() if key not in IGNORED_CONFIG}
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(known | FORCED_CONFIG)
        with torch.device("meta"):
            # One expert after the other: the one way of running experts that takes every dtype on every device.
            model = AutoModelForCausalLM.from_config(parsed, experts_implementation="eager")
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        AssertionError,
        StrictDataclassError,
    ) as error:
        raise SourceError(f"transformers cannot make a {model_type} language model of the config: {error}") from None
    backbone = getattr(model, model.base_model_prefix, None)
    if not all(isinstance(getattr(backbone, part, None), nn.Module) for part in ("layers", "norm")):
        raise SourceError(
            f"model_type {model_type!r} is not a stack of decoder layers and a norm: it cannot be streamed"
        )
    return model.eval()


def fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers no checkpoint stores (rotary frequencies, embedding scales), as from_pretrained does."""
    owners = []
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = torch.empty_like(buffer, device=device)
        owners.append(owner)
    for owner in dict.fromkeys(owners):
        model._init_weights(owner)


def sources_of(model: Any, tensors: Mapping[str, Expr]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """For each parameter of `model` the tensors it is read from, and the tensors left over.

    A fused parameter (E, k*R, C) of E experts has k*E sources, ordered by part (gate before up), then by expert.
    """
    empties: dict[str, torch.Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, list[tuple[int, list[int], str]]] = {}
    unused = []
    for name in tensors:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, empties)
        if name in empties:  # already under the model's own name
            parameter, pattern = name, None
        if parameter not in empties:
            unused.append(name)
            continue
        part = 0
        if pattern is not None:
            converter = next(converter for converter in converters if pattern in converter.source_patterns)
            if [type(step).__name__ for step in converter.operations] not in FUSIONS:
                raise SourceError(f"tensor {name!r}: transformers rearranges it in a way that is not known here")
            part = converter.source_patterns.index(pattern)
        found.setdefault(parameter, []).append((part, [int(digits) for digits in re.findall(r"\d+", name)], name))
    # An output head tied to the embedding is stored once, under either name.
    for one, other in model.all_tied_weights_keys.items():
        if one not in found and other in found:
            found[one] = found[other]
        elif other not in found and one in found:
            found[other] = found[one]
    sources: dict[str, list[str]] = {}
    for parameter, empty in empties.items():
        sources[parameter] = names = [name for *_, name in sorted(found.get(parameter, []))]
        if not names:
            raise SourceError(f"the checkpoint has no tensor for {parameter!r}")
        places = places_of(empty, [tensors[name] for name in names])
        if len(places) != len(names):
            raise SourceError(f"{parameter!r} is made of {len(places)} tensors, but the checkpoint has {len(names)}")
        for name, place in zip(names, places, strict=True):
            if tensors[name].shape != tuple(place.shape):
                has, wants = tensors[name].shape, tuple(place.shape)
                raise SourceError(f"tensor {name!r} has shape {has}, but the config asks for {wants}")
    return sources, tuple(unused)


def places_of(target: torch.Tensor, pieces: Sequence[Expr]) -> list[torch.Tensor]:
    """Where in a parameter its `pieces` go: the whole of it, or of a fused (E, k*R, C) the k*E blocks (R, C)."""
    if len(pieces[0].shape) == target.dim():
        return [target]
    parts = max(1, len(pieces) // target.shape[0])  # k
    return [block for part in target.chunk(parts, dim=1) for block in part]
