"""A report as the templates see it: every figure already in words, every text already safe, nothing left to decide.

What is plain `str` here a template escapes; what is `Markdown` it puts in as it is.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cards import words
from cards.hub import HUB, file_url, gguf_repo, hub_id, model_url, source_of
from cards.markdown import Markdown, code, code_link, description, escape, fence, link, one_line
from cards.metadata import license_url
from evals.results import ExpertUsed, FileMade, LayerRouting, QuantMade, Report

# Above this condition number of a layer's gate matrix some experts' vectors are nearly a mixture of the others': the ratio
# at which mergekit calls a router degenerate.
MAX_CONDITION = 5.0
# What a table shows where there is nothing to say.
NOTHING = Markdown("-")
# A recipe longer than this stands folded.
RECIPE_LINES = 80


@dataclass(frozen=True)
class PromptList:
    """The prompts of one kind of one expert, as blocks of code."""

    title: Markdown
    blocks: tuple[Markdown, ...]


@dataclass(frozen=True)
class Sample:
    """What a GGUF file generated, and from what."""

    file: Markdown
    prompt: Markdown
    text: Markdown


@dataclass(frozen=True)
class Routing:
    """How well the experts can be told apart: in words, and as the rows of a table."""

    text: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class View:
    """Both cards' content. An empty tuple or None leaves its section out."""

    title: str
    name: str
    repo: str | None
    gguf_repo: str | None
    repo_link: Markdown | None
    gguf_link: Markdown | None
    base: Markdown
    summary: Markdown
    description: Markdown | None
    expert_columns: tuple[str, ...]
    experts: tuple[tuple[Markdown, ...], ...]
    prompts: tuple[PromptList, ...]
    parameters: tuple[tuple[str, str | Markdown], ...]
    commands: dict[str, Markdown]
    quants: tuple[tuple[Markdown, ...], ...]
    quant_columns: tuple[str, ...]
    quants_measured: Markdown | None
    failed_quants: Markdown | None
    quant_type: str | None
    samples: tuple[Sample, ...]
    quant_checksums: Markdown | None
    gate_mode: Markdown
    gates: Markdown | None
    routing: Routing | None
    limitations: tuple[Markdown, ...]
    recipe: Markdown
    recipe_folded: bool
    sources: tuple[tuple[Markdown, ...], ...]
    identities: Markdown | None
    version: str
    time: str | None
    checksums: Markdown | None


def view_of(report: Report) -> View:
    """What the cards of `report` say."""
    quant = preferred_quant(report)
    columns, experts = _experts(report)
    return View(
        title=one_line(report.title or "") or report.name,
        name=report.name,
        repo=report.repo,
        gguf_repo=gguf_repo(report.repo) if report.repo else None,
        repo_link=link(report.repo, f"{HUB}/{report.repo}") if report.repo else None,
        gguf_link=link(gguf_repo(report.repo), f"{HUB}/{gguf_repo(report.repo)}") if report.repo else None,
        base=_model(report, report.base),
        summary=_summary(report),
        description=description(report.description or "") or None,
        expert_columns=columns,
        experts=experts,
        prompts=tuple(_prompts(report)),
        parameters=_parameters(report),
        commands=_commands(report, quant),
        quants=tuple(_quant(report, made) for made in report.quants),
        quant_columns=_quant_columns(report),
        quants_measured=_quants_measured(report),
        failed_quants=_failed_quants(report),
        quant_type=quant.type if quant else None,
        samples=tuple(_sample(made) for made in report.quants if made.proof == "ran" and made.sample.strip()),
        quant_checksums=_checksums(report.gguf_files),
        gate_mode=code(report.gate_mode),
        gates=_gates(report),
        routing=_routing(report),
        limitations=_limitations(report),
        recipe=fence(report.recipe_text, "yaml"),
        recipe_folded=report.recipe_text.count("\n") > RECIPE_LINES,
        sources=tuple(_source(report)),
        identities=_identities(report),
        version=report.moerge_version,
        time=_time(report),
        checksums=_checksums(report.files),
    )


def preferred_quant(report: Report) -> QuantMade | None:
    """The file that the example commands take."""
    by_type = {made.type: made for made in reversed(report.quants)}
    chosen = next((by_type[name] for name in words.PREFERRED if name in by_type), None)
    return chosen or next(iter(report.quants), None)


# ------------------------------------------------------------------------------------------------ the model and its experts


def _summary(report: Report) -> Markdown:
    count, per_token = len(report.experts), report.experts_per_token
    models = len({report.base, *(expert.source for expert in report.experts)})
    kind = "model" if any(expert.number is not None for expert in report.experts) else "dense model"
    made = f"from one {kind}" if models == 1 else f"from {models} {kind}s"
    which = "which all" if count == per_token else f"{per_token} of which"
    experts = "one expert" if count == 1 else f"{count} experts"
    text = (
        f"**{escape(report.name)}** is a mixture-of-experts language model of the {escape(report.family_title)} family. "
        f"It was merged {made} and has {experts} in every layer"
    )
    text += "." if count == 1 else f", {which} {'works' if per_token == 1 else 'work'} on each token."
    parts = []
    if "total" in report.parameters:
        total = f"has {words.billions(report.parameters['total'])} parameters"
        active = report.parameters.get("active")
        if active:
            share = "all" if active == report.parameters["total"] else words.billions(active)
            total += f", {share} of them active for a token"
        parts.append(total)
    parts.append(f"is stored in {escape(words.DTYPES.get(report.dtype, report.dtype))}")
    parts.append(f"has a context of {words.thousands(report.context_length)} tokens")
    return Markdown(f"{text} The model {', '.join(parts[:-1])}, and {parts[-1]}.")


def _model(report: Report, name: str) -> Markdown:
    """A source by its name, linked to the very commit it was taken from; a folder as code."""
    source = source_of(report, name)
    url = model_url(name, source.commit if source else None)
    return link(hub_id(name) or name, url) if url else code(name)


def _experts(report: Report) -> tuple[tuple[str, ...], tuple[tuple[Markdown, ...], ...]]:
    """The table of experts: columns that would be empty in every row are left out."""
    rows = []
    for number, expert in enumerate(report.experts, 1):
        source = source_of(report, expert.source)
        rows.append(
            {
                "Expert": Markdown(str(number)),
                "Role": Markdown("kept from the base") if expert.kept else escape(expert.role or ""),
                "Model": _expert_model(report, expert),
                "Licence": escape((source.license if source else None) or ""),
                "Changes": _changes(expert),
                "Prompts": Markdown(_prompt_count(expert)),
            }
        )
    columns = tuple(name for name in rows[0] if any(row[name] for row in rows)) if rows else ()
    unknown = {"Licence": Markdown("not stated")}
    return columns, tuple(tuple(row[name] or unknown.get(name, NOTHING) for name in columns) for row in rows)


def _expert_model(report: Report, expert: ExpertUsed) -> Markdown:
    """The source of an expert, and which of its experts it is where the source is a mixture itself."""
    model = _model(report, expert.source)
    return model if expert.number is None else Markdown(f"{model}, its expert {expert.number}")


def _changes(expert: ExpertUsed) -> Markdown:
    parts = []
    if expert.noise_scale:
        parts.append(f"noise of standard deviation {expert.noise_scale:g}")
    if expert.residual_scale is not None and expert.residual_scale != 1:
        parts.append(f"output times {expert.residual_scale:g}")
    return Markdown(", ".join(parts))


def _prompt_count(expert: ExpertUsed) -> str:
    positive, negative = len(expert.positive_prompts), len(expert.negative_prompts)
    return " and ".join([f"{positive} for it"] * bool(positive) + [f"{negative} against it"] * bool(negative))


def _prompts(report: Report) -> list[PromptList]:
    found = []
    for number, expert in enumerate(report.experts, 1):
        who = f"**Expert {number}**" + (f" ({escape(expert.role)})" if expert.role else "")
        for prompts, where in ((expert.positive_prompts, "for"), (expert.negative_prompts, "against")):
            if prompts:
                found.append(PromptList(Markdown(f"{who}, prompts {where} it:"), _prompt_blocks(prompts)))
    return found


def _prompt_blocks(prompts: Sequence[str]) -> tuple[Markdown, ...]:
    """One block with a prompt on each line, or a block for each where one has several lines."""
    if any("\n" in prompt.strip() or "\r" in prompt.strip() for prompt in prompts):
        return tuple(fence(prompt, "text") for prompt in prompts)
    return (fence("\n".join(prompt.strip() for prompt in prompts), "text"),)


def _parameters(report: Report) -> tuple[tuple[str, str | Markdown], ...]:
    counts = report.parameters
    rows: list[tuple[str, str | Markdown]] = [("Family", report.family_title)]
    for key, label in (
        ("total", "Parameters"),
        ("active", "Active for a token"),
        ("shared", "Shared by all experts"),
        ("per_expert", "In each expert"),
    ):
        if key in counts:
            rows.append((label, f"{words.billions(counts[key])} ({words.thousands(counts[key])})"))
    rows += [
        ("Experts", words.thousands(len(report.experts))),
        ("Experts for a token", words.thousands(report.experts_per_token)),
        ("Context", f"{words.thousands(report.context_length)} tokens"),
        ("Data type", words.DTYPES.get(report.dtype, report.dtype)),
    ]
    shards = [file for file in report.files if file.name.endswith(".safetensors")]
    if shards:
        whole = words.size(sum(file.bytes for file in shards))
        rows.append(("Weights", f"{whole} in {words.counted(len(shards), 'file')}"))
    rows.append(("Router", code(report.gate_mode)))
    if (report.version or "").strip():
        rows.append(("Version", report.version or ""))
    licence = _license(report)
    return (*rows, ("Licence", licence)) if licence else tuple(rows)


def _license(report: Report) -> Markdown | None:
    name = one_line(report.license_name or "") or one_line(report.license or "")
    url = license_url(report)
    return None if not name else link(name, url) if url else escape(name)


# -------------------------------------------------------------------------------------------------- commands, files, proofs


def _commands(report: Report, quant: QuantMade | None) -> dict[str, Markdown]:
    """What to type, by program; a program that would find nothing under these names is left out."""
    place = report.repo or "."
    commands = {
        "transformers": fence(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto", device_map="auto")\n'
            'prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)\n'
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))",
            "python",
        ),
        "vllm": fence(f"vllm serve {place}", "bash"),
    }
    if quant is None:
        return commands
    file = shlex.quote(f"./{quant.file.name}")
    if report.repo is None:
        return commands | {"llama_file": fence(f'llama-cli -m {file} -p "The capital of France is"', "bash")}
    there = shlex.quote(f"{gguf_repo(report.repo)}:{quant.type}")
    download = ["hf", "download", gguf_repo(report.repo), quant.file.name, "--local-dir", "."]
    return commands | {
        "llama": fence(f"llama-cli -hf {there}", "bash"),
        "llama_server": fence(f"llama-server -hf {there}", "bash"),
        "ollama": fence(f"ollama run hf.co/{there}", "bash"),
        "download": fence(f"{shlex.join(download)}\nllama-cli -m {file}", "bash"),
    }


def _quant(report: Report, made: QuantMade) -> tuple[Markdown, ...]:
    url = file_url(gguf_repo(report.repo), made.file.name) if report.repo else None
    link = code_link(made.file.name, url)
    measured = (
        (
            NOTHING if made.kl is None else escape(words.number(made.kl, 4)),
            NOTHING if made.top1 is None else escape(words.number(100 * made.top1, 1) + " %"),
        )
        if report.quants_measured
        else ()
    )
    return (
        Markdown(f"{link} and {len(made.further_files)} more") if made.further_files else link,
        code(made.type),
        escape(words.size(made.bytes)),
        escape(words.number(made.bits_per_weight, 2)),
        *measured,
        words.PROOFS.get(made.proof) or escape(made.proof) or Markdown("not run"),
        words.WHEN.get(made.type, NOTHING),
    )


def _quant_columns(report: Report) -> tuple[str, ...]:
    measured = ("KL", "Top-1") if report.quants_measured else ()
    return ("File", "Type", "Size", "Bits per weight", *measured, "Proof", "When to choose it")


def _quants_measured(report: Report) -> Markdown | None:
    """What the columns of the measured figures mean, and of what they are not."""
    if (measured := report.quants_measured) is None:
        return None
    perplexities = ", ".join(
        f"{made.type} {words.number(made.perplexity, 2)}" for made in report.quants if made.perplexity is not None
    )
    return escape(
        "KL is the mean divergence of the quant's predictions from the unquantised model's, in nats per token (0 is the "
        "same), Top-1 how often both find the same token most likely. Weights only: llama.cpp also rounds activations. "
        f"Measured on {measured.tokens} tokens of one fixed text, on which the unquantised model's perplexity is "
        f"{words.number(measured.perplexity, 2)} (quants: {perplexities})."
    )


def _failed_quants(report: Report) -> Markdown | None:
    """What was asked for and is not here."""
    if not report.failed_quants:
        return None
    said = "; ".join(f"{failed.type} ({failed.reason})" for failed in report.failed_quants)
    return escape(f"Not part of this release, since the file could not be proven to run: {said}.")


def _sample(made: QuantMade) -> Sample:
    return Sample(code(made.file.name), fence(made.prompt, "text"), fence(made.sample.strip("\r\n"), "text"))


def _checksums(files: Sequence[FileMade]) -> Markdown | None:
    """Lines as `sha256sum --check` takes them."""
    lines = [f"{file.sha256}  {one_line(file.name)}" for file in files]
    return fence("\n".join(lines), "text") if lines else None


# --------------------------------------------------------------------------------------------------------------- the router


def _gates(report: Report) -> Markdown | None:
    vector = words.GATE_VECTORS.get(report.gate_mode)
    return (
        Markdown(f"In each layer the router has one vector for each expert. Here it is {vector}.") if vector else None
    )


def _routing(report: Report) -> Routing | None:
    layers = report.routing
    if not layers:
        return None
    hard = [layer for layer in layers if layer.condition is None or layer.condition > MAX_CONDITION]
    worst = max(hard or layers, key=lambda layer: math.inf if layer.condition is None else layer.condition)
    limit = f"(condition number above {MAX_CONDITION:g})"
    if hard:
        said = (
            f"In {_which(hard, len(layers))}, some experts are hard to tell apart: their vectors are nearly a mixture of "
            f"the others' {limit}, so which of them a token goes to says little."
        )
    else:
        said = (
            f"In none of the {words.counted(len(layers), 'layer')} are the experts' vectors nearly a mixture of one "
            f"another {limit}."
        )
    if worst.pair is not None:
        first, second = (_named(report, index) for index in worst.pair)
        cosine = words.number(worst.cosine, 2)
        said += (
            f" They are least distinct in layer {worst.layer}, where {first} and {second} are the closest, with a cosine "
            f"of {cosine}."
        )
    if report.gate_mode in words.RANDOM_MODES:
        said += " As the vectors are random, the router knows nothing of what the experts are good at."
    rows = tuple(
        (
            str(layer.layer),
            words.number(layer.condition, 2),
            words.number(layer.cosine, 3),
            f"{layer.pair[0] + 1} and {layer.pair[1] + 1}" if layer.pair else NOTHING,
        )
        for layer in layers
    )
    return Routing(said, rows)


def _which(hard: Sequence[LayerRouting], count: int) -> str:
    """`every layer`, `layer 7 of 32`, `5 of 32 layers (0 to 3 and 31)`."""
    if len(hard) == count:
        return "every layer"
    if len(hard) == 1:
        return f"layer {hard[0].layer} of {count}"
    return f"{len(hard)} of {count} layers ({words.spans([layer.layer for layer in hard])})"


def _named(report: Report, index: int) -> str:
    role = report.experts[index].role if index < len(report.experts) else None
    return f"expert {index + 1} ({one_line(role)})" if role else f"expert {index + 1}"


# ------------------------------------------------------------------------------------------------ limits and where it is from


def _limitations(report: Report) -> tuple[Markdown, ...]:
    said = [
        "The router was not trained together with the experts: it was set at random, so which expert a token goes to is "
        "chance."
        if report.gate_mode in words.RANDOM_MODES
        else "The router was not trained together with the experts: it was set from prompts, and a token may go "
        "to an expert that suits it badly."
    ]
    if _all_are_the_base(report):
        said.append(
            "All experts are the base model's own MLP, so without further training it answers as the base does."
        )
    else:
        said.append(
            "Each expert was trained inside its own dense model. Here it works with the attention of the base model, "
            "which may cost it some of its skill."
        )
    said.append("No benchmark has been run on it for this card.")
    said.append("It inherits the limits and biases of the models it was made from; their cards describe them.")
    if _license(report) is None:
        said.append("No licence is stated for it; those of the models it was made from have to be looked up there.")
    warnings = [finding.message for finding in report.findings if finding.level == "warning"]
    warned = [Markdown(f"A warning given at the build: {escape(text)}") for text in warnings]
    return (*map(Markdown, said), *warned)


def _all_are_the_base(report: Report) -> bool:
    return all(
        expert.source == report.base and expert.number is None and not _changes(expert) for expert in report.experts
    )


def _source(report: Report) -> list[tuple[Markdown, ...]]:
    rows: list[tuple[Markdown, ...]] = []
    for source in report.sources:
        pinned = code(source.commit[:12]) if source.commit else Markdown(f"files {code(source.fingerprint[:12])}")
        url = model_url(source.name, source.commit)
        model = link(source.name, url) if url else code(source.name)
        tensors = Markdown(words.thousands(source.tensors)), Markdown(words.thousands(source.unused_tensors))
        rows.append((model, pinned, *tensors))
    return rows


def _identities(report: Report) -> Markdown | None:
    named = ((report.recipe_identity, "recipe"), (report.gates_key, "router"))
    lines = [f"{one_line(identity)}  {label}" for identity, label in named if identity]
    return fence("\n".join(lines), "text") if lines else None


def _time(report: Report) -> str | None:
    parts = [f"{one_line(step)} {words.duration(seconds)}" for step, seconds in report.seconds.items()]
    return words.listed(parts) if parts else None
