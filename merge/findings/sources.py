"""What may be wrong with a source model."""

from __future__ import annotations

from merge.findings.base import ERROR, NOTICE, SOURCE, WARNING, Finding


class CustomCode(Finding):
    """The model's config names Python code of its own (`auto_map`). moerge never runs code from a model repository, so such
    models cannot be sources. Look for a version of the model in the ordinary format."""

    id = "custom-code"
    level = ERROR
    fault = SOURCE
    message = "{model} needs code of its own (auto_map in its config.json), which is never run"


class PickleOnly(Finding):
    """The repository has shards of a PyTorch pickle checkpoint (`pytorch_model-00001-of-0000N.bin`) but no
    `pytorch_model.bin.index.json` that lists them, so it cannot be told whether they are all there. Add the index, or use a
    copy of the model that is whole. Whole pickle checkpoints are sources like any other: they are read without being
    unpickled."""

    id = "pickle-only"
    level = ERROR
    fault = SOURCE
    message = "{model} has pickle shards (pytorch_model*.bin) without their pytorch_model.bin.index.json"


class AdapterUnusable(Finding):
    """A LoRA adapter changes a matrix W to W + (alpha / r) B A, and that is what a merge can apply. DoRA, adapters with biases or
    whole modules in the MLPs, and adapters that were initialised from their base's own weights (PiSSA, OLoRA, CorDA, LoftQ)
    compute something else. Merge such an adapter into its base with PEFT, and use the result as the source."""

    id = "adapter-unusable"
    level = ERROR
    fault = SOURCE
    message = "adapter {adapter} cannot be used: {problem}"


class AdapterWithoutMlp(Finding):
    """Only the MLPs of a source become an expert; all experts share the attention of the base model. An adapter that changes
    nothing in the MLPs would give an expert that is its unchanged base."""

    id = "adapter-without-mlp"
    level = ERROR
    message = "adapter {adapter} changes no MLP ({parts}): the expert would be {model} itself"


class AdapterPartlyUsed(Finding):
    """The adapter changes more than the MLPs: attention, embeddings or the output matrix. All experts share those of the base
    model, so only the adapter's MLP part is used. The expert differs from what was trained; an adapter trained on the MLPs
    alone loses nothing."""

    id = "adapter-partly-used"
    level = WARNING
    message = "adapter {adapter} also changes {parts}; only its {used} MLP matrices are used"


class AdapterOfAnotherBase(Finding):
    """The adapter says that it was trained on another model than the one it is named with. That is right where the one is a
    copy of the other; otherwise its deltas fit other weights."""

    id = "adapter-of-another-base"
    level = NOTICE
    message = "adapter {adapter} says it was trained on {trained_on}, not on {model}"


class AdapterOnBase(Finding):
    """`base_model` gives the attention, the embeddings and the norms, and a router is calibrated on it: it must be a model as it
    stands. Merge the adapter into it with PEFT first, or name the adapter at an expert."""

    id = "adapter-on-base"
    level = ERROR
    message = "base_model {model} cannot have an adapter; experts can"


class HeadersMissing(Finding):
    """Only the model's config.json is here, not its weights. The figures are computed from the config; a build will need
    the weights."""

    id = "headers-missing"
    level = WARNING
    fault = SOURCE
    message = "{model} has no weights here: figures are computed from its config.json alone"


class LocalNotAllowed(Finding):
    """A recipe in a repository may only use models from the Hub, or folders inside the repository itself; one that comes
    from a pull request may use no folder at all."""

    id = "local-not-allowed"
    level = ERROR
    message = "local folder {model} may not be used here; name a model on the Hub"


class SourceUnavailable(Finding):
    """The source could not be asked: it does not exist, is private or gated, or the Hub did not answer."""

    id = "source-unavailable"
    level = ERROR
    fault = SOURCE
    message = "{problem}"


class UnknownFamily(Finding):
    """`architecture` names the family of the result. Without it, the family is chosen by the base model."""

    id = "unknown-architecture"
    level = ERROR
    message = "architecture {value!r} is not one we can make{hint}; it is one of {choices}"


class UnsupportedModel(Finding):
    """No family of mixture-of-experts models that we know takes this model."""

    id = "unsupported-model"
    level = ERROR
    message = "{model} is a {model_type!r} model; the {family} family takes {accepted}"


class BadConfig(Finding):
    """The model's config.json lacks a value that its architecture needs, or has one that cannot be."""

    id = "bad-config"
    level = ERROR
    fault = SOURCE
    message = "config.json of {model}: {problem}"


class ShapeMismatch(Finding):
    """Experts share the base's attention and embeddings, so their hidden size, MLP size and number of layers must be the
    base's."""

    id = "shape-mismatch"
    level = ERROR
    message = "{model} has {key} {value}, the base has {base_value}; experts must have the base's"


class ActivationMismatch(Finding):
    """An expert's MLP was trained with another activation function than the result will use: it would compute nonsense."""

    id = "activation-mismatch"
    level = ERROR
    message = "{model} uses activation {value!r}, the base {base_value!r}; experts must have the base's"


class RopeMismatch(Finding):
    """The expert was trained with other rotary position embeddings than the base. Its attention is not used, but its MLPs
    learned on what that attention made: they work less well under the base's."""

    id = "rope-mismatch"
    level = WARNING
    message = (
        "{model} was trained with another RoPE ({value}) than the base ({base_value}); its MLPs may work less well"
    )


class OtherVocabulary(Finding):
    """The expert has a vocabulary of another size. Only its MLPs are used; embeddings, output matrix and tokenizer are the
    base's, so this does not hinder the merge. Its MLPs did learn from text that was cut into other tokens."""

    id = "other-vocabulary"
    level = NOTICE
    message = (
        "{model} has a vocabulary of {value}, the base one of {base_value}: the base's is used, and no expert's matters"
    )


class UnsupportedDtype(Finding):
    """The weights are stored in a type that is not a plain floating-point number (quantised, FP8). Use the original."""

    id = "unsupported-dtype"
    level = ERROR
    fault = SOURCE
    message = "tensor {tensor!r} of {model} is stored as {dtype}; a merge reads F32, F16 and BF16"


class TokenizerMissing(Finding):
    """The base model has no tokenizer file, so the result would have none either."""

    id = "tokenizer-missing"
    level = WARNING
    fault = SOURCE
    message = "{model} has no tokenizer (tokenizer.json or tokenizer.model); the result will have none, and no GGUF"


class ExpertNotChosen(Finding):
    """The source of this expert is itself a mixture of experts. `expert` says which of them is meant, counted from 0. (To keep
    all of them and add others, name the mixture as `base_model`.)"""

    id = "expert-not-chosen"
    level = ERROR
    message = "{model} is a mixture of {count} experts; say which is meant with expert: 0 to expert: {last}"


class NoSuchExpert(Finding):
    """`expert` counts the experts of a mixture from 0, so the last one's number is one less than there are."""

    id = "no-such-expert"
    level = ERROR
    message = "{model} has {count} experts, numbered from 0 to {last}: there is no expert {number}"


class ExpertOfDense(Finding):
    """`expert` picks one of the experts of a mixture. A dense model has a single MLP in each layer, which is the whole of what it
    gives to a merge. Take the key out."""

    id = "expert-of-dense-model"
    level = ERROR
    message = "{model} is a dense model, with no expert {number} to choose"


class OtherFamily(Finding):
    """An expert can come from a mixture only where that is of the same family as the result; a mixture as `base_model` decides
    the family. `architecture` can name the source's family where the base fits into it."""

    id = "other-family"
    level = ERROR
    message = "{model} is a {family} model, the result a {result} model; {what}"


class LayersWithoutExperts(Finding):
    """Some mixtures have an ordinary MLP instead of experts in their first layers, or in every second one. Such a layer has no
    expert to take, and none to add another to."""

    id = "layers-without-experts"
    level = ERROR
    message = "{model} has no experts in {layers}, but a merge needs one for every layer"
