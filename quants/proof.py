"""The proof of a GGUF file: llama.cpp loads it, or a twin of its first layers, and generates from it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import DestinationError, ProofError
from merge.memory import available_memory
from quants.layout import Layout
from quants.split import twin_layers
from quants.structure import check, write_twin

PROMPT = "The capital of France is"
TOKENS = 16
# Seconds until a proof is given up: loading 50 GB from a slow disk takes a while.
TIMEOUT = 1800.0
# What llama.cpp takes beside the weights: the context, the buffers of its computation, the program.
WORKING_MEMORY = 1 << 30
# How llama.cpp marks the lines of its log that are errors: seconds, E, what.
_ERROR = re.compile(r"^[\d.]+ E (.+)")


@dataclass(frozen=True, slots=True)
class Generation:
    """What llama.cpp generated: text, token ids, the natural log of their probabilities, and seconds taken.

    A probability is None where a token ends inside a character of several bytes: llama.cpp does not tell it then.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    prompt_tokens: int
    load_seconds: float
    generate_seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """How a file was proven: `ran`, by generating with it, or `structural`, by its blocks and by generating with a twin
    of its first layers. `generation` is what llama.cpp said."""

    kind: str
    generation: Generation


def prove(
    paths: Sequence[Path],
    layout: Layout,
    types: Mapping[str, str],
    metadata: Mapping[str, Any],
    *,
    first_layers: int = 0,
    threads: int | None = None,
) -> Proof:
    """Loads the file (the first of its parts) and generates; where the machine cannot hold it, checks its blocks and does
    so with a twin. `first_layers` are those without experts at the model's beginning. Raises ProofError."""
    if sum(path.stat().st_size for path in paths) + WORKING_MEMORY <= available_memory():
        return Proof("ran", generate(paths[0], threads=threads))
    check(paths, layout, types)
    twin = paths[0].with_name(f".{paths[0].name}.twin")
    try:
        write_twin(paths, twin, layout.architecture, metadata, twin_layers(layout, first_layers))
        return Proof("structural", generate(twin, threads=threads))
    except OSError as error:
        raise DestinationError(f"{twin}: cannot be written ({error.strerror or error})") from None
    finally:
        twin.unlink(missing_ok=True)


def generate(
    path: Path,
    prompt: str | Sequence[int] = PROMPT,
    tokens: int = TOKENS,
    *,
    timeout: float = TIMEOUT,
    threads: int | None = None,
    past_the_end: bool = True,
) -> Generation:
    """Continues `prompt` (text, or token ids) greedily by `tokens` tokens with the model in `path`, on the processor.

    `past_the_end` goes on where the model would end its text. Raises ProofError where the file does not load, the process
    dies or takes longer than `timeout` seconds, or the model's numbers are not finite.
    """
    answer = _ask(path, [prompt], tokens, 1, timeout, threads, past_the_end)
    return _generation(path, answer)


def next_tokens(
    path: Path,
    prompts: Sequence[Sequence[int]],
    vocabulary: int,
    *,
    timeout: float = TIMEOUT,
    threads: int | None = None,
) -> list[dict[int, float]]:
    """What llama.cpp thinks comes after each prompt: the natural log of the probability of each token of the vocabulary, by id.

    The last prompt must end in a token that is a whole character or more. Raises ProofError as `generate` does.
    """
    answer = _ask(path, prompts, 1, vocabulary, timeout, threads, True, prompts[-1][-1:])
    try:
        told = [response["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for response in answer["responses"]]
    except (KeyError, IndexError, TypeError):
        raise ProofError(f"{path.name}: llama.cpp loaded it but told no probabilities") from None
    return [{entry["id"]: entry["logprob"] for entry in entries} for entries in told]


def _ask(
    path: Path,
    prompts: Sequence[str | Sequence[int]],
    tokens: int,
    probabilities: int,
    timeout: float,
    threads: int | None,
    past_the_end: bool,
    forced: Sequence[int] = (),
) -> dict[str, Any]:
    """Has llama.cpp continue each of `prompts` by `tokens`, in a process of its own."""
    task = {
        "path": str(path),
        "prompts": [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts],
        "tokens": tokens,
        "probabilities": probabilities,
        # A token is at least one byte of text.
        "context": max(len(prompt.encode() if isinstance(prompt, str) else prompt) for prompt in prompts) + tokens + 64,
        "threads": threads or len(os.sched_getaffinity(0)),
        "past_the_end": past_the_end,
        "forced": forced,
    }
    # -P: the folder of the program must not be searched for modules, its neighbours have common names.
    command = [sys.executable, "-P", str(Path(__file__).with_name("llama.py"))]
    try:
        finished = subprocess.run(
            command,
            input=json.dumps(task),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProofError(
            f"{path.name}: llama.cpp did not generate {tokens} tokens within {timeout:.0f} seconds"
        ) from None
    if finished.returncode != 0:
        raise ProofError(f"{path.name}: llama.cpp does not run it ({_why(finished, path)})")
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def _generation(path: Path, answer: dict[str, Any]) -> Generation:
    response = answer["responses"][0]
    try:
        choice = response["choices"][0]
        tokens = tuple(map(int, response["__verbose"]["tokens"]))
        told = [(entry["id"], entry["logprob"]) for entry in (choice["logprobs"] or {"content": []})["content"]]
        text, prompt_tokens = choice["text"], int(response["usage"]["prompt_tokens"])
    except (KeyError, IndexError, TypeError):
        said = json.dumps(response)[:300]
        raise ProofError(f"{path.name}: llama.cpp loaded it but did not generate ({said})") from None
    if not tokens:
        raise ProofError(f"{path.name}: llama.cpp loaded it but generated nothing")
    if any(logprob is None or not math.isfinite(logprob) for _, logprob in told):  # JSON has no NaN: it comes as null
        raise ProofError(f"{path.name}: the probabilities it generates with are not finite, so its weights are damaged")
    logprobs: list[float | None] = []
    for token in tokens:
        logprobs.append(told.pop(0)[1] if told and told[0][0] == token else None)
    return Generation(text, tokens, tuple(logprobs), prompt_tokens, answer["load"], answer["generate"])


def _why(finished: subprocess.CompletedProcess[str], path: Path) -> str:
    """The first thing that llama.cpp reports as an error, or how the process ended. A card may say it: without folders."""
    if finished.returncode < 0:
        return f"the process was ended by {signal.Signals(-finished.returncode).name}"
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := _ERROR.search(line))]
    return (errors or lines[-1:] or ["no message"])[0].replace(f"{path.parent}/", "")[:300]
