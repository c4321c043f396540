"""The models that a recipe names, read from config.json and headers: what each is, and where its matrices lie.

A source is a dense model, or a mixture of experts of the result's own family: then each of its experts can be an expert of the
result, and as the base all of them are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.dtypes import WEIGHT_DTYPES, from_config
from merge.expr import Expr, Read
from merge.families import FAMILIES, WITHOUT_CLASS
from merge.families.dense import ConfigError, DenseModel, dense_model, mlp_tensor
from merge.families.family import Family, Mlp
from merge.families.mixture import MoeLayer, MoeModel, locate, moe_model
from merge.families.model_types import MLP_PARTS
from merge.tensors import TensorInfo

# A wrong config makes every tensor wrong: so many findings say enough.
SAID = 50


@dataclass(frozen=True)
class SourceModel:
    """One source: `dense` is its shape, for a mixture that of the dense model it is a mixture of. `tensors` are those that the
    merge may read."""

    checkpoint: Checkpoint
    dense: DenseModel
    mixture: MoeModel | None = None
    tensors: Mapping[str, TensorInfo] | None = None

    @cached_property
    def layers(self) -> tuple[MoeLayer, ...]:
        """Where the experts of a mixture lie, layer by layer."""
        if self.mixture is None:
            return ()
        infos = self.tensors or {} if self.checkpoint.tensors is None else self.checkpoint.tensors
        return tuple(locate(self.mixture, layer, self.checkpoint.key, infos) for layer in range(self.dense.layers))

    def expected(self, family: Family, is_base: bool, experts: Collection[int]) -> dict[str, tuple[int, ...]]:
        """The tensors that the merge reads, with the shapes that the config means: of the base all, of another dense model its
        MLPs, of another mixture the MLPs of `experts`."""
        if self.mixture is None:
            return {name: shape for name, shape in self.dense.tensors() if is_base or ".mlp." in name}
        if is_base:
            found = {name: shape for name, shape in self.dense.tensors() if family.keeps(name)}
            return found | {name: shape for layer in self.layers for name, shape in layer.tensors.items()}
        return {
            name: layer.tensors[name]
            for layer in self.layers
            for expert in experts
            for name in _tensors(layer.experts[expert])
        }

    def read(self, name: str) -> Read:
        """A tensor as it is."""
        assert self.tensors is not None
        info = self.tensors[name]
        return Read(self.checkpoint.key, name, info.dtype, info.shape)

    def mlp(self, layer: int, expert: int | None) -> Mlp:
        """The MLP of a layer, or that of its expert number `expert`."""
        if expert is not None:
            return self.layers[layer].experts[expert]
        return {part: self.read(mlp_tensor(layer, part)) for part in MLP_PARTS}

    def is_known(self, tensor: str) -> bool:
        """Whether a tensor of an MLP is one that such a model has."""
        if self.mixture is None:
            return ".mlp." in tensor and tensor.endswith(".weight") and tensor in (self.tensors or {})
        return tensor in self._mixture_tensors

    @cached_property
    def _mixture_tensors(self) -> frozenset[str]:
        return frozenset(name for layer in self.layers for name in layer.tensors)


def mixture_family(checkpoint: Checkpoint) -> Family | None:
    """The family of a checkpoint that is a mixture of experts; None for any other."""
    return next((family for family in FAMILIES if checkpoint.config.get("model_type") == family.NAME), None)


def read_model(checkpoint: Checkpoint, family: Family, line: int | None) -> tuple[SourceModel | None, list[f.Finding]]:
    """What a source's config.json says, or what is wrong with it as a source of a `family` model."""
    config, name = checkpoint.config, checkpoint.name
    found: list[f.Finding] = []
    model_type, mixed = config.get("model_type"), mixture_family(checkpoint)
    model: SourceModel | None = None
    # The code that DeepSeek's config names is not needed to read its tensors, and never run.
    if config.get("auto_map") and not (mixed and mixed.NAME in WITHOUT_CLASS):
        found.append(f.CustomCode(line, model=name))
    elif mixed is not None and mixed is not family:
        what = "an expert can only come from a mixture of the result's own family"
        found.append(f.OtherFamily(line, model=name, family=mixed.TITLE, result=family.TITLE, what=what))
    elif mixed is None and model_type not in family.ACCEPTS:
        accepted, shown = " and ".join(family.ACCEPTS), str(model_type)
        found.append(f.UnsupportedModel(line, model=name, model_type=shown, family=family.TITLE, accepted=accepted))
    else:
        try:
            if mixed is None:
                model = SourceModel(checkpoint, dense_model(config))
            else:
                mixture = moe_model(config, mixed)
                model = SourceModel(checkpoint, mixture.dense, mixture)
        except ConfigError as error:
            found.append(f.BadConfig(line, model=name, problem=str(error)))
    if model is not None and model.mixture is not None and (lacking := model.mixture.dense_layers):
        shown = (
            f"layer {lacking[0]}" if len(lacking) == 1 else f"{len(lacking)} of its layers (layer {lacking[0]} first)"
        )
        found.append(f.LayersWithoutExperts(line, model=name, layers=shown))
    if checkpoint.why_no_headers == "pickle":
        found.append(f.PickleOnly(line, model=name))
    elif checkpoint.why_no_headers is not None:
        found.append(f.HeadersMissing(line, model=name))
    return model, found


def check_expert(model: SourceModel, expert: int | None, line: int | None, number_line: int | None) -> f.Finding | None:
    """What is wrong with the choice of an expert, `expert`, from this source. `number_line` is where it is made."""
    name = model.checkpoint.name
    if model.mixture is None:
        return None if expert is None else f.ExpertOfDense(number_line, model=name, number=expert)
    count = model.mixture.experts
    if expert is None:
        return f.ExpertNotChosen(line, model=name, count=count, last=count - 1)
    if expert >= count:
        return f.NoSuchExpert(number_line, model=name, count=count, last=count - 1, number=expert)
    return None


def headers(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], line: int | None
) -> tuple[dict[str, TensorInfo], list[f.Finding]]:
    """The tensors of a source that the merge may read, from its headers, or from its config where there are none; and what is
    wrong with them."""
    if checkpoint.tensors is None:
        stored = from_config(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")) or "F32"
        return {name: TensorInfo(stored, shape) for name, shape in expected.items()}, []
    found: dict[str, TensorInfo] = {}
    said: list[f.Finding] = []
    model = checkpoint.name
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            said.append(f.MissingTensor(line, model=model, tensor=name))
        elif info.shape != shape:
            said.append(
                f.WrongTensorShape(line, model=model, tensor=name, shape=list(info.shape), expected=list(shape))
            )
        elif info.dtype not in WEIGHT_DTYPES:
            said.append(f.UnsupportedDtype(line, model=model, tensor=name, dtype=info.dtype))
        else:
            found[name] = info
        if len(said) > SAID:
            break
    return found, said


def _tensors(mlp: Mapping[str, Expr]) -> list[str]:
    return [x.tensor for x in mlp.values() if isinstance(x, Read)]
