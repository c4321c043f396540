"""Everything moerge says about a recipe, as data.

A finding has an identifier that never changes, a level, a message with named holes, and a docstring: what is wrong, why it
matters, how to mend it. docs/findings.md is made from these docstrings.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

ERROR = "error"
WARNING = "warning"
NOTICE = "notice"


class Finding:
    """One statement about a recipe, at a line of it where it has one. Made by calling a subclass with its holes."""

    id: ClassVar[str]
    level: ClassVar[str]
    message: ClassVar[str]

    def __init__(self, line: int | None = None, **holes: Any) -> None:
        self.line = line
        self.holes = holes

    @property
    def text(self) -> str:
        """The message with its holes filled, in one line, control characters shown as escapes."""
        return printable(self.message.format(**{name: _shortened(value) for name, value in self.holes.items()}))

    def located(self, path: str) -> str:
        """`path:line: level[id]: text`, the form editors and compilers use."""
        place = path if self.line is None else f"{path}:{self.line}"
        return f"{place}: {self.level}[{self.id}]: {self.text}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.id, self.line, self.text))

    def __repr__(self) -> str:
        return f"<{self.id} line {self.line}: {self.text}>"


def printable(text: str) -> str:
    """`text` in one line, with what would steer a terminal or reorder the line written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(value: Any, limit: int = 300) -> Any:
    """A text of at most `limit` characters: a hostile value must not fill the screen."""
    return f"{value[:limit]}…" if isinstance(value, str) and len(value) > limit else value


def all_findings() -> list[type[Finding]]:
    """Every kind of finding, by id."""
    return sorted(_subclasses(Finding), key=lambda kind: kind.id)


def documentation() -> str:
    """docs/findings.md."""
    parts = [
        "# Findings",
        "",
        "What `moerge` may say about a recipe. An *error* stops a build, a *warning* does not, a *notice* only informs.",
        "This page is made from the code: `python -m merge.findings > docs/findings.md`.",
    ]
    for kind in all_findings():
        parts += [
            "",
            f"## {kind.id}",
            "",
            f"*{kind.level}*: `{kind.message}`",
            "",
            inspect.cleandoc(kind.__doc__ or ""),
        ]
    return "\n".join(parts) + "\n"


def _subclasses(kind: type[Finding]) -> list[type[Finding]]:
    return [found for sub in kind.__subclasses__() for found in [sub, *_subclasses(sub)]]


# ---------------------------------------------------------------------------------------------------- the file as YAML


class NotYaml(Finding):
    """The file is not valid YAML. Most often an indentation, a missing space after a colon, or an unclosed quote or
    bracket at the line named."""

    id = "not-yaml"
    level = ERROR
    message = "this is not valid YAML: {problem}"


class NotText(Finding):
    """The file is not UTF-8 text, or it holds characters that YAML does not allow (NUL and other control characters).
    Save it as plain UTF-8."""

    id = "not-text"
    level = ERROR
    message = "this is not plain UTF-8 text: {problem}"


class NotReadable(Finding):
    """The recipe file cannot be opened. Check the path and the permissions."""

    id = "not-readable"
    level = ERROR
    message = "the recipe cannot be read: {problem}"


class TooLarge(Finding):
    """A recipe is a page of text. A larger file is refused before it is parsed, because parsing a hostile one can take
    minutes. Long prompts belong in a file of their own."""

    id = "too-large"
    level = ERROR
    message = "the file has {size} bytes; a recipe may have {limit}"


class TooDeep(Finding):
    """Lists and mappings are nested deeper than any recipe needs; refused before anything walks them."""

    id = "too-deep"
    level = ERROR
    message = "nested more than {limit} levels deep"


class AliasUsed(Finding):
    """YAML aliases (`*name`, and the merge key `<<`) are refused: a few hundred bytes of them can expand to gigabytes.
    Write the value out where it is used."""

    id = "alias-used"
    level = ERROR
    message = "YAML aliases and merge keys ({shown}) are not allowed here; write the value out"


class TagUsed(Finding):
    """YAML tags (`!something`) ask a loader to build objects. A recipe needs none."""

    id = "tag-used"
    level = ERROR
    message = "YAML tag {tag!r} is not allowed; write the plain value"


class DuplicateKey(Finding):
    """The same key stands twice in one mapping. YAML readers silently keep the last one, which is rarely what was
    meant. Delete one of them."""

    id = "duplicate-key"
    level = ERROR
    message = "key {key!r} stands here a second time (first at line {first}); keep one of them"


class NotARecipe(Finding):
    """The file is valid YAML, but not a recipe: its top level must be a mapping with `base_model` and `experts`."""

    id = "not-a-recipe"
    level = ERROR
    message = "a recipe is a mapping with base_model and experts; this is {found}"


# -------------------------------------------------------------------------------------------------- keys and their values


class UnknownKey(Finding):
    """The key is not one of a recipe's. A misspelt key would otherwise be ignored and its default used without a word.
    `moerge schema` prints all keys for your editor."""

    id = "unknown-key"
    level = ERROR
    message = "{key!r} is not a key of {what}{hint}"


class IgnoredKey(Finding):
    """The key belongs to mergekit's other merge methods. mergekit-moe ignores it, and so do we; it can be deleted."""

    id = "ignored-key"
    level = WARNING
    message = "{key!r} has no meaning in a mixture-of-experts recipe and is ignored, as mergekit-moe ignores it"


class MissingKey(Finding):
    """A key without which there is nothing to build."""

    id = "missing-key"
    level = ERROR
    message = "{key!r} is missing from {what}"


class WrongType(Finding):
    """The value has another type than the key needs. YAML reads some plain words as other things: `no` as false, `12:30`
    as a number, `2024-01-01` as a date. Put such text in quotes."""

    id = "wrong-type"
    level = ERROR
    message = "{key} must be {expected}, not {found}{hint}"


class OutOfRange(Finding):
    """The number lies outside what can be meant."""

    id = "out-of-range"
    level = ERROR
    message = "{key} is {value}: {problem}"


class UnknownValue(Finding):
    """The value is not one of those the key takes."""

    id = "unknown-value"
    level = ERROR
    message = "{key} cannot be {value!r}{hint}; it is one of {choices}"


class BadModelReference(Finding):
    """A source model is `owner/name` on the Hub, `owner/name@revision` for a branch, tag or commit of it, or a local folder
    (`./models/mine`). An expert may have a LoRA adapter: `model+adapter`, each written like that."""

    id = "bad-model-reference"
    level = ERROR
    message = "{value!r} is not a model reference ({problem}); write owner/name, owner/name@revision or ./folder"


class BadRepository(Finding):
    """`release.repo` is where the model goes: `owner/name`, with letters, digits, `.`, `-` and `_`."""

    id = "bad-repository"
    level = ERROR
    message = "{value!r} is not the name of a Hub repository; write owner/name"


class BadText(Finding):
    """The value must be a text that can stand in a title, a tag or a label: one line, no control characters, not too
    long."""

    id = "bad-text"
    level = ERROR
    message = "{key} {problem}"


class KeyWithoutEffect(Finding):
    """The key is part of the recipe format, but this version of moerge does nothing with it. The model is built as if it
    were not there."""

    id = "key-without-effect"
    level = WARNING
    message = "{key} has no effect in this version of moerge"


class NotSupportedYet(Finding):
    """The key is part of the recipe format and would change the model, but this version of moerge cannot do what it asks.
    Building without it would give another model than the one asked for, so it is an error."""

    id = "not-supported-yet"
    level = ERROR
    message = "{key} is not supported by this version of moerge{hint}"


# ------------------------------------------------------------------------------------------------ what the recipe asks for


class TooFewExperts(Finding):
    """Each token is sent to `experts_per_token` experts, so there must be at least that many."""

    id = "too-few-experts"
    level = ERROR
    message = "experts_per_token is {per_token}, but there are only {experts} experts"


class PromptsMissing(Finding):
    """This gate mode makes the router from prompts: every expert needs `positive_prompts` that show what should be routed
    to it. With `gate_mode: random` no prompts are needed."""

    id = "prompts-missing"
    level = ERROR
    message = "expert {number} has no positive_prompts, which gate_mode {mode!r} needs"


class EmptyPrompt(Finding):
    """A prompt without any text says nothing about its expert."""

    id = "empty-prompt"
    level = ERROR
    message = "prompt {index} of {expert} is empty"


class IdenticalPrompts(Finding):
    """All experts have the same prompts, so the router could not tell them apart: every token would go anywhere."""

    id = "identical-prompts"
    level = ERROR
    message = "all experts have the same prompts, so the router could not tell them apart"


class SamePromptsTwice(Finding):
    """Two experts have exactly the same prompts; the router treats them alike."""

    id = "same-prompts-twice"
    level = WARNING
    message = "experts {first} and {second} have the same prompts, so the router cannot tell them apart"


class DiscriminantHint(Finding):
    """mergekit's gate modes compare a token with the mean of the prompts' hidden states; with short prompts most tokens then
    go to the same expert. `gate_mode: discriminant` fits the router to tell the experts' texts apart, on what the router
    receives in the merged model. docs/gates.md has the figures, and says where sharper routing does not mean a lower loss. A
    ported recipe keeps its mode until its author changes it."""

    id = "discriminant-hint"
    level = NOTICE
    message = "gate_mode {mode!r} is mergekit's; gate_mode: discriminant tells the experts' texts apart better (docs/gates.md)"


class OnlyForDiscriminant(Finding):
    """The key says how `gate_mode: discriminant` is calibrated; mergekit's modes have no such thing."""

    id = "only-for-discriminant"
    level = WARNING
    message = "{key} has no effect with gate_mode {mode!r}; it belongs to gate_mode: discriminant"


class BadPromptsFile(Finding):
    """`prompts_file` names a file beside the recipe: `.jsonl` (a text, or an object with `text`, on each line), `.json` (a
    list of such), or plain text with a blank line between prompts."""

    id = "bad-prompts-file"
    level = ERROR
    message = "prompts_file {file}: {problem}"


class ExpertsWriteTheirOwn(Finding):
    """With `router.expand: experts` each expert writes text from its own short prompts, for which all of it is needed: its
    attention and embeddings too, which the merge itself does not read. The download counts them."""

    id = "experts-write-their-own"
    level = NOTICE
    message = "router.expand: experts downloads every expert whole"


class PromptsCut(Finding):
    """A text longer than the base's context (or than 1024 tokens) is cut into pieces, each read on its own."""

    id = "prompts-cut"
    level = NOTICE
    message = "a prompt of expert {number} is longer than the calibration reads at once; it was cut into pieces"


class PromptsThinned(Finding):
    """Of an expert with very much text only an even part is used: more changes the router hardly at all, and takes time."""

    id = "prompts-thinned"
    level = NOTICE
    message = "expert {number} has more text than the calibration uses; an even part of it was taken"


class NothingToHoldOut(Finding):
    """The router's regularisation and scale are chosen on prompts left out of the fit, which needs more than one token of
    every expert. Without that, fixed values are used and nothing is known of how well it routes. Write more prompts."""

    id = "nothing-to-hold-out"
    level = WARNING
    message = "an expert has only one token of text: the router's quality could not be measured"


class IdleExpert(Finding):
    """On held-out prompts hardly any token chooses this expert, not even its own: it would take memory for nothing. Its
    prompts are perhaps too much like another's, or too few."""

    id = "idle-expert"
    level = WARNING
    message = "expert {number} ({model}) would be idle: it is the best for {percent} % of held-out tokens"


class ExpertsAlike(Finding):
    """On held-out prompts the tokens of these two experts go to one or the other almost by chance in the layers named. In the
    first layers, which see little more than single words, this is common; in most layers it means that their prompts should
    differ more, or that one of the experts is enough."""

    id = "experts-alike"
    level = WARNING
    message = "experts {first} and {second} cannot be told apart in layers {layers} (of {count})"


class ExpertsPerTokenAdvice(Finding):
    """How many experts each token should be sent to, so that about nine in ten held-out tokens reach their own expert. More
    make the model slower; fewer lose tokens to a wrong expert."""

    id = "experts-per-token-advice"
    level = NOTICE
    message = (
        "with experts_per_token {per_token}, {percent} % of held-out tokens reach their own expert; "
        "{enough} would do for {enough_percent} %"
    )


class AllExpertsSame(Finding):
    """All experts are the same model: the result takes more memory and gives the same output as the dense model. That is
    what sparse upcycling wants, where the model is trained afterwards; otherwise it is a mistake."""

    id = "all-experts-same"
    level = WARNING
    message = "all {experts} experts are {model}: without training, the result answers as the dense model does"


class UnusedPrompts(Finding):
    """The gates are random in this mode: the prompts are not read."""

    id = "unused-prompts"
    level = NOTICE
    message = "gate_mode {mode!r} makes random gates; the prompts are not used"


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


# ------------------------------------------------------------------------------------------------------------- the sources


class CustomCode(Finding):
    """The model's config names Python code of its own (`auto_map`). moerge never runs code from a model repository, so such
    models cannot be sources. Look for a version of the model in the ordinary format."""

    id = "custom-code"
    level = ERROR
    message = "{model} needs code of its own (auto_map in its config.json), which is never run"


class PickleOnly(Finding):
    """The repository has shards of a PyTorch pickle checkpoint (`pytorch_model-00001-of-0000N.bin`) but no
    `pytorch_model.bin.index.json` that lists them, so it cannot be told whether they are all there. Add the index, or use a
    copy of the model that is whole. Whole pickle checkpoints are sources like any other: they are read without being
    unpickled."""

    id = "pickle-only"
    level = ERROR
    message = "{model} has pickle shards (pytorch_model*.bin) without their pytorch_model.bin.index.json"


class AdapterUnusable(Finding):
    """A LoRA adapter changes a matrix W to W + (alpha / r) B A, and that is what a merge can apply. DoRA, adapters with biases or
    whole modules in the MLPs, and adapters that were initialised from their base's own weights (PiSSA, OLoRA, CorDA, LoftQ)
    compute something else. Merge such an adapter into its base with PEFT, and use the result as the source."""

    id = "adapter-unusable"
    level = ERROR
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


class TooManySharedExperts(Finding):
    """A shared expert runs for every token beside the routed ones. Mixtral, Qwen3-MoE and most others have none, Qwen2-MoE
    and DeepSeek-MoE one. Take it out, or name another `architecture`."""

    id = "too-many-shared-experts"
    level = ERROR
    message = "shared_experts has {count}; a {family} model has {limit}"


class SharedPromptsMissing(Finding):
    """In this family the shared expert has a gate of its own that says how much of it a token gets. This gate mode makes it
    from prompts, so the shared expert needs `positive_prompts`. With `gate_mode: random` none are needed."""

    id = "shared-prompts-missing"
    level = ERROR
    message = "the shared expert of a {family} model has a gate, so gate_mode {mode!r} needs positive_prompts for it"


class SharedPromptsUnused(Finding):
    """In this family the shared expert has no gate: every token gets all of it, and prompts cannot change that. Take the
    prompts out, or use an `architecture` whose shared expert has a gate (qwen2_moe)."""

    id = "shared-prompts-not-taken"
    level = ERROR
    message = "the shared expert of a {family} model has no gate, so it can have no prompts"


class SharedAtFullStrength(Finding):
    """A shared expert's output is added to that of the routed experts, each of which already does the whole work of an MLP.
    The sum is too much of it: mergekit's documentation recommends a `residual_scale` of about 0.1 for the shared expert."""

    id = "shared-at-full-strength"
    level = WARNING
    message = "the shared expert has no residual_scale, so it adds a whole MLP's output to the experts'; 0.1 is usual"


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
    message = "{model} lacks tensor {tensor!r}"


class WrongTensorShape(Finding):
    """A tensor has another shape than the config says."""

    id = "wrong-tensor-shape"
    level = ERROR
    message = "tensor {tensor!r} of {model} has shape {shape}; its config means {expected}"


class TensorWithoutPlace(Finding):
    """The base has a tensor that the result's architecture has no place for (a bias, for example). Dropping it silently
    would give a model that computes something else, so the merge is refused."""

    id = "tensor-without-place"
    level = ERROR
    message = "tensor {tensor!r} of {model} has no place in a {family} model; a merge would lose it"


class UnsupportedDtype(Finding):
    """The weights are stored in a type that is not a plain floating-point number (quantised, FP8). Use the original."""

    id = "unsupported-dtype"
    level = ERROR
    message = "tensor {tensor!r} of {model} is stored as {dtype}; a merge reads F32, F16 and BF16"


class TokenizerMissing(Finding):
    """The base model has no tokenizer file, so the result would have none either."""

    id = "tokenizer-missing"
    level = WARNING
    message = "{model} has no tokenizer (tokenizer.json or tokenizer.model); the result will have none, and no GGUF"


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


if __name__ == "__main__":
    print(documentation(), end="")
