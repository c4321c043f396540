"""Where a model comes from: sources at their revisions, licences and what follows from them, how to build it again."""

from __future__ import annotations

import math
import shlex

from cards import words
from cards.hub import hub_id, model_url
from cards.markdown import Markdown, code, escape, fence, link, one_line
from cards.metadata import license_url
from evals.results import Report


def sources(report: Report) -> list[tuple[Markdown, ...]]:
    rows: list[tuple[Markdown, ...]] = []
    for source in report.sources:
        pinned = code(source.commit[:12]) if source.commit else Markdown(f"files {code(source.fingerprint[:12])}")
        url = model_url(source.name, source.commit)
        model = link(source.name, url) if url else code(source.name)
        tensors = Markdown(words.thousands(source.tensors)), Markdown(words.thousands(source.unused_tensors))
        rows.append((model, pinned, *tensors))
    return rows


def identities(report: Report) -> Markdown | None:
    named = ((report.recipe_identity, "recipe"), (report.gates_key, "router"))
    lines = [f"{one_line(identity)}  {label}" for identity, label in named if identity]
    return fence("\n".join(lines), "text") if lines else None


def copied(report: Report) -> str | None:
    """How much of the weights is a source's own, byte for byte. Never rounded up: 100 % is all of it."""
    if not report.tensor_bytes:
        return None
    percent = math.floor(10_000 * report.copied_bytes / report.tensor_bytes) / 100
    if report.copied_bytes == report.tensor_bytes:
        return "All bytes of the weights are a source's own."
    if not report.copied_bytes:
        return "No byte of the weights is a source's own: all were converted or calculated."
    return f"{percent:g} % of the bytes of the weights are a source's own; the others, those of the routers among them, were converted or calculated."


def time_taken(report: Report) -> str | None:
    parts = [f"{one_line(step)} {words.duration(seconds)}" for step, seconds in report.seconds.items()]
    return words.listed(parts) if parts else None


def license_name(report: Report) -> Markdown | None:
    """The licence by its name, linked where it can be read; None where there is none."""
    name = one_line(report.license_name or "") or one_line(report.license or "")
    url = license_url(report)
    return None if not name else link(name, url) if url else escape(name)


def license_reasons(report: Report) -> tuple[Markdown, ...]:
    """Why the model has its licence, and what its sources say that differs."""
    name = license_name(report)
    stated = {source.name: one_line(source.license or "") for source in report.sources}
    silent = [source for source, licence in stated.items() if not licence]
    others = {
        source: licence for source, licence in stated.items() if licence and licence != one_line(report.license or "")
    }
    said: list[str] = []
    if name is None and len(set(stated.values()) - {""}) > 1:
        said.append("No licence is stated for this model: its sources have different ones, and none follows from them.")
    elif name is None:
        said.append("No licence is stated for this model.")
    elif report.license_stated or report.license_name:
        said.append(f"{name}, as its recipe states.")
    elif others or silent:
        said.append(f"{name}, which follows from the licences of its sources.")
    else:
        said.append(f"{name}, which every one of its sources has.")
    if others and name is not None:
        listed = words.listed([f"{_source(source)} ({escape(licence)})" for source, licence in others.items()])
        said.append(f"These sources state something else, and their terms apply to what was taken from them: {listed}.")
    elif others:
        listed = words.listed([f"{_source(source)} ({escape(licence)})" for source, licence in others.items()])
        said.append(f"The sources state: {listed}.")
    if any("-nc" in licence.lower() for licence in stated.values()):
        said.append("Some of these licences forbid commercial use.")
    if silent:
        said.append(
            f"No licence could be read for {words.listed([str(_source(source)) for source in silent])}; look there."
        )
    return tuple(map(Markdown, said))


def _source(name: str) -> Markdown:
    return escape(name) if hub_id(name) else code(name)


def rebuild(report: Report) -> Markdown:
    """What to type to build it again, from the very same revisions, and to check it."""
    if report.repo is None:
        return fence("moerge build recipe.yaml --out out", "bash")
    fetch = shlex.join(["hf", "download", report.repo, "recipe.yaml", "moerge.lock.json", "--local-dir", "."])
    build = "moerge build recipe.yaml --lock moerge.lock.json --out out"
    return fence(f"{fetch}\n{build}\n{shlex.join(['moerge', 'verify', report.repo])}", "bash")


def recipe_files(report: Report) -> Markdown | None:
    """What has to lie beside the recipe when it is built again."""
    if not report.recipe_files:
        return None
    return Markdown(
        f"Beside it must lie the files that it names: {words.listed([str(code(name)) for name in report.recipe_files])}."
    )
