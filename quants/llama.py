"""The child process of quants.proof: loads one GGUF file in llama.cpp, continues prompts, prints one line of JSON.

A program of its own because native code that meets a bad file may end the process it runs in. Reads its task as JSON from
standard input; llama.cpp's own messages go to standard error.
"""

import json
import os
import sys
import time
from typing import Any

import xllamacpp


def main() -> None:
    task = json.load(sys.stdin)
    # llama.cpp may print to standard output: keep the real one for the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = task["path"]
    params.n_ctx = task["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    # Weights stay in the layout of the file: llama.cpp's repacking for some processors has crashed on quantised experts.
    params.no_extra_bufts = True
    params.warmup = False
    params.fit_params = False
    # Above nine, the answer holds the ids of all tokens: those with probabilities lack the ones that end inside a character.
    params.verbosity = 10
    started = time.monotonic()
    server = xllamacpp.Server(params)
    loaded = time.monotonic()
    responses = [continued(server, prompt, task) for prompt in task["prompts"]]
    json.dump({"responses": responses, "load": loaded - started, "generate": time.monotonic() - loaded}, answer)
    answer.close()
    # Taking the server down joins its threads and frees the model; the process is over anyway.
    os._exit(0)


def continued(server: xllamacpp.Server, prompt: str | list[int], task: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's answer. A strongly quantised model may say bytes that are no text, which llama.cpp cannot put into its
    answer: then what it says before them counts."""
    tokens = task["tokens"]
    while True:
        try:
            answer: dict[str, Any] = server.handle_completions(
                {
                    "prompt": prompt,
                    "max_tokens": tokens,
                    "temperature": 0,
                    "logprobs": task["probabilities"],
                    "return_tokens": True,
                    "ignore_eos": task["past_the_end"],
                    # Probabilities are told as they are before this, and of a token that is no whole character not at all.
                    "logit_bias": [[token, 1000.0] for token in task["forced"]],
                }
            )
        except RuntimeError as error:
            if "UTF-8" not in str(error) or tokens == 1:
                raise
            tokens //= 2
        else:
            return answer


if __name__ == "__main__":
    main()
