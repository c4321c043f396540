"""How long the preview of a large pull request takes: 50 recipes of 5 sources each, on a Hub 50 ms away, without a checkout.

    python -m benchmarks.preview_many

The whole job of a pull request from a fork, as the container runs it, against a local GitHub and an embedded Hub, each a
process of its own; every answer of the Hub waits 50 ms, in the last row GitHub's too. All 250 sources are different models of two shards with an index and the 291 tensors of a 7B
model. Cold: an empty cache of headers. Warm: with the cache that the cold run left, within five minutes,
when the Hub is not asked which commits the sources' branches mean, and later, when it is. Writes its section of
benchmarks/RESULTS.md. No peer previews a merge; the limits are the waits themselves: three a source one after the other where all
sources are asked at once, and one where they are known.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gates_vs_mergekit import ROOT, machine, put_section, today

RECIPES, SOURCES, DELAY, RUNS = 50, 5, 0.05, 3
NAME = "me/recipes"
LATER, FAR = "warm, after five minutes", "the same, and GitHub as far away"


def tiny_llama(folder: Path) -> None:
    """A model of 32 layers in two shards with an index: the number of tensors of a 7B model, and few bytes."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, vocabulary = 32, 64, 32, 128
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{start}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{start}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    names = list(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    folder.mkdir(parents=True)
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
    places = {name: file for file, mine in parts.items() for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocabulary,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def serve_hub(root: Path, pipe: Connection) -> None:
    from bot.hub.faults import Fault
    from bot.hub.server import running

    with running(root) as hub:
        pipe.send((hub.endpoint, hub.token()))
        while (word := pipe.recv()) != "stop":
            hub.faults = (lambda number, request: Fault(stall=DELAY)) if word == "slow" else None
            pipe.send(len(hub.log.all()))
            hub.log.clear()


def serve_github(root: Path, pipe: Connection) -> None:
    from demo.github.outer import Fault
    from demo.github.server import running
    from tests.bot.workflow import Recipes, git, hub_recipe

    with running(root) as server:
        server.repository(NAME)
        main = Recipes(root / "main", models=False)
        main.git("remote", "add", "origin", str(server.repository(NAME).git.path))
        main.commit(**{"README.md": "Recipes"})
        main.git("push", "--quiet", "origin", "main")
        from github import Auth, Github

        person = Github(auth=Auth.Token(server.token("stranger")), base_url=server.url, seconds_between_writes=0)
        git(root, "clone", "--quiet", person.get_repo(NAME).create_fork().clone_url, "fork")
        fork = Recipes(root / "fork", models=False)
        fork.git("switch", "--quiet", "-c", "feature")
        fork.commit(
            **{
                f"recipes/{number:02}.yaml": hub_recipe(*(f"lab/m{number * SOURCES + n}" for n in range(SOURCES)))
                for number in range(RECIPES)
            }
        )
        fork.git("push", "--quiet", "origin", "feature")
        pull = person.get_repo(NAME).create_pull(base="main", head="stranger:feature", title="Many", body="").number
        token = server.workflow_token(NAME, {"contents": "read", "pull_requests": "write", "checks": "write"})
        pipe.send((server.url, token, server.pull_request_event(NAME, pull)))
        while (word := pipe.recv()) != "stop":
            server.faults = (lambda number, request: Fault(stall=DELAY)) if word == "slow" else None
            pipe.send(len(server.log.all()))
            server.log.clear()
            server.repository(NAME).issues[pull].comments.clear()


def main() -> None:
    work = Path(tempfile.mkdtemp(prefix="preview-many-"))
    try:
        measure(work)
    finally:
        shutil.rmtree(work)


def measure(work: Path) -> None:
    load = os.getloadavg()[0]
    tiny_llama(work / "model")
    (hub_pipe, hub_end), (github_pipe, github_end) = Pipe(), Pipe()
    servers = [
        Process(target=serve_hub, args=(work / "hub", hub_end), daemon=True),
        Process(target=serve_github, args=(work / "github", github_end), daemon=True),
    ]
    for server in servers:
        server.start()
    endpoint, hub_token = hub_pipe.recv()
    url, token, event = github_pipe.recv()
    upload(endpoint, hub_token, work / "model")
    (work / "event.json").write_text(json.dumps(event))
    ask(hub_pipe, "slow")
    taken: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": [], LATER: [], FAR: []}
    asked: dict[str, tuple[int, int]] = {}
    for _ in range(RUNS):
        shutil.rmtree(work / "runner", ignore_errors=True)
        for kind in taken:
            ask(github_pipe, "slow" if kind == FAR else "quick")
            if kind in (LATER, FAR):
                for file in (work / "runner/workspace/headers").rglob("*.json"):
                    os.utime(file, (0, 0))
            taken[kind].append(job(work, url, token, endpoint))
            asked[kind] = ask(hub_pipe, "slow"), ask(github_pipe, "quick")
    for pipe in (hub_pipe, github_pipe):
        pipe.send("stop")
    heading = "## Preview of a large pull request"
    lines = [
        heading, "",
        (f"`python -m benchmarks.preview_many`, {today()}, {machine()}; {RECIPES} recipes of {SOURCES} sources, all {RECIPES * SOURCES} "
        f"different, {DELAY * 1000:.0f} ms before every answer of the Hub; {RUNS} runs in turn, the whole job as a process,"),
        f"servers on the same cores; load by other work at the start {load:.1f}.", "",
        "| | median, s | slowest, s | of the processor, s | requests to the Hub | to GitHub |", "|---|---|---|---|---|---|",
        *(_row(kind, times, asked[kind]) for kind, times in taken.items()),
    ]  # fmt: skip
    print("\n".join(lines))
    put_section(heading, lines)


def _row(kind: str, times: list[tuple[float, float]], asked: tuple[int, int]) -> str:
    walls, processor = ([time[part] for time in times] for part in (0, 1))
    middle = f"{statistics.median(walls):.2f} | {max(walls):.2f} | {statistics.median(processor):.2f}"
    return f"| {kind} | {middle} | {asked[0]} | {asked[1]} |"


def ask(pipe: Connection, word: str) -> int:
    """Tell a server something; the number of requests since the last time."""
    pipe.send(word)
    count: int = pipe.recv()
    return count


def upload(endpoint: str, token: str, model: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_XET = True
    api = HfApi(endpoint=endpoint, token=token)

    def one(number: int) -> None:
        api.create_repo(f"lab/m{number}")
        api.upload_folder(repo_id=f"lab/m{number}", folder_path=model)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(RECIPES * SOURCES)))


def job(work: Path, url: str, token: str, endpoint: str) -> tuple[float, float]:
    """One job of the pull request, in an empty workspace; its seconds, and those of the processor."""
    workspace = work / "runner/workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    for name in ("output", "summary"):
        (work / "runner" / name).write_text("")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(work), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1",
        "GITHUB_EVENT_NAME": "pull_request_target", "GITHUB_EVENT_PATH": str(work / "event.json"), "GITHUB_REPOSITORY": NAME,
        "GITHUB_WORKSPACE": str(workspace), "GITHUB_OUTPUT": str(work / "runner/output"), "GITHUB_API_URL": url,
        "GITHUB_STEP_SUMMARY": str(work / "runner/summary"), "HF_HOME": str(work / "runner/hf"), "HF_HUB_DISABLE_XET": "1",
        "INPUT_GITHUB_TOKEN": token, "INPUT_HUB_ENDPOINT": endpoint, "INPUT_CACHE": "headers",
    }  # fmt: skip
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "bot", "action"], cwd=workspace, env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    previews = json.loads((workspace / "moerge-out/previews.json").read_text()) if done.returncode == 0 else []
    if len(previews) != RECIPES or not all(preview["parameters"] for preview in previews):
        sys.exit(f"the job failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
    return seconds, processor


if __name__ == "__main__":
    main()
