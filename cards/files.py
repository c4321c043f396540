"""The files of a release as the card tells them: GGUF files and what they need, and the commands that run them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cards import words
from cards.hub import file_url, gguf_repo
from cards.markdown import Markdown, code, code_link, escape, fence, one_line
from evals.results import FileMade, QuantMade, Report

# What a table shows where there is nothing to say.
NOTHING = Markdown("-")
# Tokens of context that the memory needed is told for.
CONTEXT = 4096


def preferred_quant(report: Report) -> QuantMade | None:
    """The file that the example commands take."""
    by_type = {made.type: made for made in reversed(report.quants)}
    chosen = next((by_type[name] for name in words.PREFERRED if name in by_type), None)
    return chosen or next(iter(report.quants), None)


def commands(report: Report, quant: QuantMade | None) -> dict[str, Markdown]:
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


def quant(report: Report, made: QuantMade) -> tuple[Markdown, ...]:
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
    memory = memory_bytes(report, made)
    return (
        Markdown(f"{link} and {len(made.further_files)} more") if made.further_files else link,
        code(made.type),
        escape(words.size(made.bytes)),
        escape(words.number(made.bits_per_weight, 2)),
        *([] if memory is None else [escape(words.size(memory))]),
        *measured,
        words.PROOFS.get(made.proof) or escape(made.proof) or Markdown("not run"),
        words.WHEN.get(made.type, NOTHING),
    )


def memory_bytes(report: Report, made: QuantMade) -> int | None:
    """What llama.cpp needs to hold: the file, and keys and values (F16) of CONTEXT tokens. None where the shape is unknown."""
    shape = report.shape
    if not {"layers", "kv_heads", "head_dim"} <= shape.keys():
        return None
    context = min(CONTEXT, report.context_length)
    return made.bytes + 2 * 2 * context * shape["layers"] * shape["kv_heads"] * shape["head_dim"]


def memory_note(report: Report) -> Markdown | None:
    """What the column of memory counts."""
    if not report.quants or memory_bytes(report, report.quants[0]) is None:
        return None
    context = min(CONTEXT, report.context_length)
    return Markdown(
        f"Memory is computed: the file and {context:,} tokens of context in F16. A longer context takes more, and so does "
        "llama.cpp for its own work."
    )


def proof_note(report: Report) -> Markdown | None:
    """What the proofs of the table mean."""
    kinds = dict.fromkeys(made.proof for made in report.quants)
    said = [words.PROVEN[kind] for kind in kinds if kind in words.PROVEN]
    return Markdown(" ".join(["Proof:", *said])) if said else None


def quant_columns(report: Report) -> tuple[str, ...]:
    measured = ("KL", "Top-1") if report.quants_measured else ()
    memory = ("Memory",) if report.quants and memory_bytes(report, report.quants[0]) is not None else ()
    return ("File", "Type", "Size", "Bits per weight", *memory, *measured, "Proof", "When to choose it")


def quants_measured(report: Report) -> Markdown | None:
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
        f"{words.number(measured.perplexity, 2)}{f' (quants: {perplexities})' if perplexities else ''}."
    )


def failed_quants(report: Report) -> Markdown | None:
    """What was asked for and is not here."""
    if not report.failed_quants:
        return None
    said = "; ".join(f"{failed.type} ({failed.reason})" for failed in report.failed_quants)
    return escape(f"Not part of this release, since the file could not be proven to run: {said}.")


def checksums(files: Sequence[FileMade]) -> Markdown | None:
    """Lines as `sha256sum --check` takes them."""
    lines = [f"{file.sha256}  {one_line(file.name)}" for file in files]
    return fence("\n".join(lines), "text") if lines else None
