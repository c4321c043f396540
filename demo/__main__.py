"""`make demo`: one recipe's whole way on real input, without an account.

The four source models go to an embedded Hub on this machine; the recipe is previewed, built and published there; then the
release is compared with its recipe, downloaded into an empty cache and generates, the checkpoint in transformers and each GGUF
file in llama.cpp.
Everything lies in build/demo; what is done is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = ROOT / "build" / "demo"
RECIPE = "recipes/demo-4x135M.yaml"
NAMESPACE = "moerge-demo"
PROMPT = "The capital of France is"
TOKENS = 8


def main() -> int:
    started = time.monotonic()
    # Read by huggingface_hub when it is imported; in this process and in the commands it starts.
    os.environ |= {
        "HF_HOME": str(HERE / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    from bot.hub.server import running
    from demo.models import make_models

    heading("The source models, from a package, and three experts of it")
    models = make_models(HERE / "models" / NAMESPACE)
    with running(HERE / "hub") as hub:
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token()}
        heading(f"The embedded Hub on {hub.endpoint}")
        upload(models, hub.endpoint, hub.token())
        heading("moerge preview: seconds, no weights")
        moerge("preview", RECIPE)
        heading("moerge build: gates, checkpoint, GGUF, cards")
        moerge("build", RECIPE, "--out", str(HERE / "out"))
        heading("moerge publish: one commit a repository, then the tag")
        if moerge("publish", str(HERE / "out"), allowed=(0, 3)) == 3:
            print("(the release is on the Hub already: nothing was uploaded)")
        heading("moerge verify: every tensor of the release against its sources")
        moerge("verify", repository())
        heading("The release, downloaded into an empty cache")
        rows = release(hub.endpoint)
    heading("What was made, and what it says")
    print(table(rows))
    print(f"\nDone in {time.monotonic() - started:.0f} s. The build is in {HERE / 'out'}; again: make demo")
    print(f"The Hub with all of it: .venv/bin/moerge hub --root {HERE / 'hub'}")
    return 0


def upload(models: dict[str, Path], endpoint: str, token: str) -> None:
    """The source models as repositories of the embedded Hub. A file that is there already is not uploaded again."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    for name, folder in models.items():
        repo = f"{NAMESPACE}/{name}"
        if not api.repo_exists(repo):
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="The demo's source model")
        print(f"{repo} at {api.model_info(repo).sha}")


def moerge(*arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    """Run the command as a user would, and show it."""
    print(f"$ moerge {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "bot", *arguments], cwd=ROOT, check=False).returncode
    if code not in allowed:
        sys.exit(code)
    return code


def repository() -> str:
    """Where the demo's release is."""
    from evals.results import read_report

    repo = read_report(HERE / "out" / "report.json").repo
    assert repo is not None
    return repo


def release(endpoint: str) -> list[tuple[str, int, float, str]]:
    """Download what was published and generate from it: (file, bytes, seconds, first words)."""
    from huggingface_hub import HfApi

    from bot.publish import gguf_repository
    from quants.proof import generate

    repo, cache = repository(), HERE / "empty-cache"
    shutil.rmtree(cache, ignore_errors=True)
    api = HfApi(endpoint=endpoint)
    model = Path(api.snapshot_download(repo, cache_dir=cache))
    ggufs = Path(api.snapshot_download(gguf_repository(repo), cache_dir=cache))
    started = time.monotonic()
    words, ids = transformers_generates(model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    rows = [("model.safetensors (transformers)", size, time.monotonic() - started, words)]
    for path in sorted(ggufs.glob("*.gguf"), key=lambda path: -path.stat().st_size):
        started = time.monotonic()
        made = generate(path, PROMPT, TOKENS)
        rows.append((f"{path.name} (llama.cpp)", path.stat().st_size, time.monotonic() - started, made.text))
        if path.stem.endswith("BF16"):
            same = list(made.tokens) == ids
            print(f"transformers and the BF16 GGUF give {'the same' if same else 'different'} first {TOKENS} tokens")
    shutil.rmtree(cache)
    return rows


def transformers_generates(folder: Path) -> tuple[str, list[int]]:
    """The first greedy tokens of the checkpoint, as text and ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # llama.cpp keeps activations in float32 over BF16 weights; in bfloat16 transformers would round them layer by layer.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    ids = output[0, inputs.input_ids.shape[1] :].tolist()
    return tokenizer.decode(ids), ids


def table(rows: list[tuple[str, int, float, str]]) -> str:
    """Rows as aligned columns."""
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'file':<{width}}  {'size':>7}  seconds  “{PROMPT} …”"]
    lines += [
        f"{name:<{width}}  {size / 1e6:>4,.0f} MB  {seconds:>7.1f}  {json.dumps(words, ensure_ascii=False)}"
        for name, size, seconds, words in rows
    ]
    return "\n".join(lines)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
