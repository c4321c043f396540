"""What there is to say about prompts and the router that is made from them."""

from __future__ import annotations

from merge.findings.base import ERROR, NOTICE, WARNING, Finding


class PromptsMissing(Finding):
    """This gate mode makes the router from prompts: every expert needs `positive_prompts` (or a `prompts_file`, or `prompts`
    of a dataset) that show what should be routed to it. With `gate_mode: random` no prompts are needed."""

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
    """An expert's `prompts_file` names a file beside the recipe: `.jsonl` (a text, or an object with `text`, on each line),
    `.json` (a list of such), `.csv` (a column `text`), or plain text with a blank line between prompts. The one under `router`
    has prompts of several experts: `.json`, an object with a list of texts under each expert's role or number (from 1), or
    `.jsonl`, objects with `expert` and `text`."""

    id = "bad-prompts-file"
    level = ERROR
    message = "prompts_file {file}: {problem}"


class BadPromptsDataset(Finding):
    """`prompts: {dataset, file, field, limit}` takes an expert's prompts from a dataset on the Hub: the first `limit` texts of
    a `.jsonl`, `.json`, `.csv` or `.txt` file, of the key or column `field`. At most 4 MiB of the file are read."""

    id = "bad-prompts-dataset"
    level = ERROR
    message = "prompts of dataset {dataset}: {problem}"


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


class NoBos(Finding):
    """The base's tokenizer has no BOS. Then a text's first token takes its place: all later ones attend to it, and its activation
    says little of the text. The calibration leaves it out, as it does with a BOS."""

    id = "no-bos"
    level = NOTICE
    message = "the base's tokenizer has no BOS: the first token of each prompt was left out of the calibration"


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


class ExpertLosesItsSkill(Finding):
    """On the text that an expert is for, its MLPs with the base's attention around them do worse than the base itself: in this
    merge it costs memory and makes things worse. A full fine-tune whose attention moved far from the base's loses most; where
    the expert as it is does worse too, its prompts are not what it is good at. Choose an expert that stayed near the base, or
    other prompts."""

    id = "expert-loses-its-skill"
    level = WARNING
    message = (
        "expert {number} ({model}) is worse than the base on its own prompts in this merge: {shared} nats per token against "
        "{base}{own}"
    )


class ExpertsPerTokenAdvice(Finding):
    """How many experts each token should be sent to, so that about nine in ten held-out tokens reach their own expert. More
    make the model slower; fewer lose tokens to a wrong expert."""

    id = "experts-per-token-advice"
    level = NOTICE
    message = (
        "with experts_per_token {per_token}, {percent} % of held-out tokens reach their own expert; "
        "{enough} would do for {enough_percent} %"
    )


class UnusedPrompts(Finding):
    """The gates are random in this mode: the prompts are not read."""

    id = "unused-prompts"
    level = NOTICE
    message = "gate_mode {mode!r} makes random gates; the prompts are not used"


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


class GateModeImpossible(Finding):
    """This gate mode runs the model that it makes a router for: `discriminant` the merged one, mergekit's modes the base.
    transformers has no class for such a model, and the code in the family's own repository is never run."""

    id = "gate-mode-impossible"
    level = ERROR
    message = "gate_mode {mode!r} runs {model}, and transformers has no {family} models; use {others}"
