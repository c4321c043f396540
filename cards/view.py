"""A report as the templates see it: every figure already in words, every text already safe, nothing left to decide.

What is plain `str` here a template escapes; what is `Markdown` it puts in as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cards import provenance, routing, words
from cards.architecture import ARCHITECTURE_FIGURE, described
from cards.evaluation import Table, comparison, evaluation_tables
from cards.figures import ROUTING_FIGURE
from cards.files import (
    NOTHING,
    checksums,
    commands,
    failed_quants,
    memory_note,
    preferred_quant,
    proof_note,
    quant,
    quant_columns,
    quants_measured,
)
from cards.hub import HUB, gguf_repo, hub_id, model_url, source_of
from cards.markdown import Markdown, code, description, escape, fence, link, one_line
from evals.results import ExpertUsed, QuantMade, Report
from evals.scores import ModelSample

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
class Written:
    """What the model wrote after a prompt."""

    prompt: Markdown
    greedy: Markdown
    sampled: Markdown


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
    memory_note: Markdown | None
    proof_note: Markdown | None
    proofs: tuple[Sample, ...]
    samples: tuple[Written, ...]
    sampling: str | None
    evaluation: tuple[Table, ...]
    comparison: Table | None
    image: Markdown | None
    architecture_figure: Markdown | None
    routing_figure: Markdown | None
    held_out: str | None
    quant_checksums: Markdown | None
    gate_mode: Markdown
    gates: Markdown | None
    routing: routing.Routing | None
    limitations: tuple[Markdown, ...]
    licence: tuple[Markdown, ...]
    rebuild: Markdown
    recipe_files: Markdown | None
    recipe: Markdown
    recipe_folded: bool
    sources: tuple[tuple[Markdown, ...], ...]
    identities: Markdown | None
    version: str
    copied: str | None
    time: str | None
    checksums: Markdown | None


def view_of(report: Report) -> View:
    """What the cards of `report` say."""
    preferred = preferred_quant(report)
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
        commands=commands(report, preferred),
        quants=tuple(quant(report, made) for made in report.quants),
        quant_columns=quant_columns(report),
        quants_measured=quants_measured(report),
        failed_quants=failed_quants(report),
        quant_type=preferred.type if preferred else None,
        memory_note=memory_note(report),
        proof_note=proof_note(report),
        proofs=tuple(_proof(made) for made in report.quants if made.proof == "ran" and made.sample.strip()),
        quant_checksums=checksums(report.gguf_files),
        gate_mode=code(report.gate_mode),
        samples=tuple(map(_written, report.samples)),
        sampling=_sampling(report),
        evaluation=evaluation_tables(report),
        comparison=comparison(report),
        image=_image(report.card.image, report.title or report.name),
        architecture_figure=_image(ARCHITECTURE_FIGURE, described(report)) if report.shape else None,
        routing_figure=_image(
            ROUTING_FIGURE, "Which expert held-out text goes to, and how much each is used in each layer"
        )
        if report.routers
        else None,
        held_out=routing.held_out(report),
        gates=routing.gates(report),
        routing=routing.routing(report),
        limitations=routing.limitations(report, licensed=provenance.license_name(report) is not None),
        licence=provenance.license_reasons(report),
        rebuild=provenance.rebuild(report),
        recipe_files=provenance.recipe_files(report),
        recipe=fence(report.recipe_text, "yaml"),
        recipe_folded=report.recipe_text.count("\n") > RECIPE_LINES,
        sources=tuple(provenance.sources(report)),
        identities=provenance.identities(report),
        version=report.moerge_version,
        copied=provenance.copied(report),
        time=provenance.time_taken(report),
        checksums=checksums(report.files),
    )


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
    parts.append(f"is stored in {escape(report.dtype)}")
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
                "Changes": routing.changes(expert),
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
        ("Data type", report.dtype),
    ]
    shards = [file for file in report.files if file.name.endswith(".safetensors")]
    if shards:
        whole = words.size(sum(file.bytes for file in shards))
        rows.append(("Weights", f"{whole} in {words.counted(len(shards), 'file')}"))
    rows.append(("Router", code(report.gate_mode)))
    if (report.version or "").strip():
        rows.append(("Version", report.version or ""))
    licence = provenance.license_name(report)
    return (*rows, ("Licence", licence)) if licence else tuple(rows)


# ------------------------------------------------------------------------------------------------ what was written, and images


def _proof(made: QuantMade) -> Sample:
    return Sample(code(made.file.name), fence(made.prompt, "text"), fence(made.sample.strip("\r\n"), "text"))


def _written(sample: ModelSample) -> Written:
    texts = (sample.greedy.strip("\r\n") or "(nothing)", sample.sampled.strip("\r\n") or "(nothing)")
    return Written(fence(sample.prompt, "text"), *(fence(text, "text") for text in texts))


def _sampling(report: Report) -> str | None:
    """How the samples were drawn."""
    if not report.samples:
        return None
    first = report.samples[0]
    return f"seed {first.seed}, temperature {first.temperature:g}, top-p {first.top_p:g}"


def _image(file: str | None, text: str) -> Markdown | None:
    """A picture that lies beside the card."""
    return Markdown(f"![{escape(text)}]({file})") if file else None
