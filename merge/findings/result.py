"""What there is to say about the model that a recipe asks for."""

from __future__ import annotations

from merge.findings.base import ERROR, NOTICE, SOURCE, WARNING, Finding


class TooFewExperts(Finding):
    """Each token is sent to `experts_per_token` experts, so there must be at least that many."""

    id = "too-few-experts"
    level = ERROR
    message = "experts_per_token is {per_token}, more than there are experts ({experts})"


class AllExpertsSame(Finding):
    """All experts are the same model: the result takes more memory and gives the same output as the dense model. That is
    what sparse upcycling wants, where the model is trained afterwards; otherwise it is a mistake."""

    id = "all-experts-same"
    level = WARNING
    message = "all {experts} experts are {model}: without training, the result answers as the dense model does"


class SameExpertTwice(Finding):
    """Two experts are the same model with the same settings, so they are equal in every layer: choosing between them changes
    nothing, and one of them takes memory for nothing. Leave one out and give its prompts to the other, or make them differ
    (`noise_scale`, `residual_scale`) where the model is trained afterwards."""

    id = "same-expert-twice"
    level = WARNING
    message = "experts {first} and {second} are the same, {model}: one of them takes memory for nothing"


class ManyExpertsPerToken(Finding):
    """With every expert used for every token the model is as slow as all experts together, and the router only weighs."""

    id = "all-experts-per-token"
    level = WARNING
    message = "experts_per_token equals the number of experts ({experts}): every expert runs for every token"


class LargeNoise(Finding):
    """`noise_scale` is the standard deviation of the noise added to each weight. Weights of language models have a
    standard deviation around 0.02; noise of that size or more destroys the expert."""

    id = "large-noise"
    level = WARNING
    message = "noise_scale {value} of {expert} is as large as the weights themselves (about 0.02)"


class TooLittleDisk(Finding):
    """`build.max_disk` is the room that a build may take. Under it every file is uploaded and deleted before the next is
    made, which still takes the largest file and the source tensors it is made of. Give it more, or leave the key out."""

    id = "too-little-disk"
    level = ERROR
    message = "build.max_disk cannot be kept: {problem}"


class ReadAgain(Finding):
    """A `discriminant` router and an importance matrix are measured on the merged model before its files are written, so the
    sources are read several times; what `build.max_disk` has no room for is downloaded each time. Give it more room, or
    take a `gate_mode` of mergekit's, which is calibrated while the files are written."""

    id = "read-again"
    level = NOTICE
    message = "within build.max_disk {download} are downloaded, more than all sources have ({sources}): they are read again and again"


class TooManySharedExperts(Finding):
    """A shared expert runs for every token beside the routed ones. Mixtral, Qwen3-MoE and most others have none, Qwen2-MoE
    and DeepSeek-MoE one. Take it out, or name another `architecture`."""

    id = "too-many-shared-experts"
    level = ERROR
    message = "shared_experts has {count}; a {family} model has {limit}"


class SettingWithoutPlace(Finding):
    """The base computes something that a model of this family cannot compute, so the result would not be the model that was
    asked for. Another `architecture` may be able to; docs/families.md says which."""

    id = "setting-without-place"
    level = ERROR
    message = "{model} has {what}, which a {family} model cannot have"


class WindowLost(Finding):
    """The base looks back only as far as its sliding window; models of this family always see the whole text. Up to the
    window both compute the same."""

    id = "window-lost"
    level = WARNING
    message = "{model} has a sliding window, {family} models have none: beyond {window} tokens the result reads on differently"


class WeightsNotNormalised(Finding):
    """In this family the router's weights of a token's experts are shares of all experts, not of the chosen ones: with fewer
    experts per token than there are, they sum to less than one, and every MLP's output is that much too small. (The
    config's `norm_topk_prob` could ask for more, but llama.cpp does not read it for this family, so the two would disagree.)
    With all experts for every token the sum is one."""

    id = "weights-not-normalised"
    level = WARNING
    message = (
        "the weights of {per_token} of {experts} experts do not sum to one in a {family} model, "
        "so the experts' output is too small; set experts_per_token to {experts}{hint}"
    )


class NoGguf(Finding):
    """No GGUF can be made of the result: llama.cpp has no such models, or moerge does not write them. The checkpoint is built
    as usual. Set `release.quants: []` to say that none is wanted."""

    id = "no-gguf"
    level = WARNING
    message = "no GGUF is made of this {family} model: {why}"


class MissingTensor(Finding):
    """A tensor that the architecture needs is not in the checkpoint."""

    id = "missing-tensor"
    level = ERROR
    fault = SOURCE
    message = "{model} lacks tensor {tensor!r}"


class WrongTensorShape(Finding):
    """A tensor has another shape than the config says."""

    id = "wrong-tensor-shape"
    level = ERROR
    fault = SOURCE
    message = "tensor {tensor!r} of {model} has shape {shape}; its config means {expected}"


class TensorWithoutPlace(Finding):
    """The base has a tensor that the result's architecture has no place for (a bias, for example). Dropping it silently
    would give a model that computes something else, so the merge is refused."""

    id = "tensor-without-place"
    level = ERROR
    message = "tensor {tensor!r} of {model} has no place in a {family} model; a merge would lose it"


class PrecisionLost(Finding):
    """The weights are stored with more precision than the recipe's dtype keeps. BF16 has 8 significant bits, F16 has 11 but
    a small range, F32 has 24."""

    id = "precision-lost"
    level = NOTICE
    message = "{model} is stored as {stored}; {dtype} rounds its weights"


class ExpertUnreached(Finding):
    """While the importance matrix was measured, the router sent no token of the calibration text to this expert in this
    layer. Its quantised weights are made as if all columns mattered alike, and it may be that no text reaches it at all: look
    at the routing table, and at the prompts that the expert was given."""

    id = "expert-unreached"
    level = WARNING
    message = "expert {expert} was reached by no token of the calibration text in {layers}"


class SharedExpertKept(Finding):
    """The base is a mixture that has a shared expert already, which is kept; its family has room for one. Take `shared_experts`
    out of the recipe."""

    id = "shared-expert-kept"
    level = ERROR
    message = "{model} has a shared expert of its own, which is kept; a {family} model has one at most"


class ReadersDisagree(Finding):
    """The config.json of the base, or of the model that is quantised, says with `norm_topk_prob` whether the weights of a token's
    experts are scaled to sum to one. llama.cpp has no such setting for this family and does the other thing, so the GGUF files
    answer otherwise than the checkpoint: docs/gguf.md has the divergence. Both agree where every expert runs for every token
    (`experts_per_token`)."""

    id = "readers-disagree"
    level = WARNING
    message = "{model} has norm_topk_prob: {value}, llama.cpp computes {family} models the other way: GGUF files will answer differently"


class DoesNotFit(Finding):
    """The sources, the checkpoint and the GGUF files need more disk than the runner has, or a forward pass more memory. The build
    would fail after it has downloaded for a while. Name another runner in `build.runner`, or make fewer quants."""

    id = "does-not-fit"
    level = WARNING
    message = "the build needs {needs}; {runner} has {has}"


class GgufWithoutWindow(Finding):
    """The checkpoint has the base's sliding window, but llama.cpp (b11434) has none in models of this family, as it has none in
    dense Mistral models: its answers are the same up to the window, and beyond it the GGUF files go on seeing the whole text."""

    id = "gguf-without-window"
    level = WARNING
    message = "{model} has a sliding window, which llama.cpp ignores in {family} models: beyond {window} tokens GGUF files read on differently"
