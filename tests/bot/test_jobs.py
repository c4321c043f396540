"""Builds in Hugging Face Jobs: the unmodified client, against the embedded Hub, whose Jobs are processes of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from PIL import Image

from bot.hub.faults import Fault
from bot.hub.server import Server, running
from tests.bot.workflow import ROOT, Recipes, commands, hub_recipe, push, run_step, tiny_models

TINY = {"release": {"repo": "admin/Tiny", "license": "apache-2.0", "quants": ["Q8_0"], "version": "1.0"}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("jobs")
    with running(folder / "hub", jobs=True) as server:
        tiny_models(folder, server)
        yield server


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path / "workspace", models=False)


def tiny(runner: str = "hf-jobs:cpu-basic:10m", **keys: object) -> str:
    given = {"experts_per_token": 1, "build": {"runner": runner}, **TINY, **keys}
    return hub_recipe("lab/m0", "lab/m1", **given)


def given(hub: Server) -> dict[str, str]:
    return {
        "command": "build",
        "token": hub.token(),
        "hub_endpoint": hub.endpoint,
        "job_image": "ghcr.io/x/moerge-build",
    }


def jobs(hub: Server) -> list[dict[str, object]]:
    return [job.to_json() for job in hub.hub.jobs.all("admin")]


def test_a_recipe_is_built_and_published_by_a_job_and_its_log_is_shown_and_obeyed_by_nobody(
    recipes: Recipes, hub: Server
) -> None:
    before = recipes.commit()
    build = {"runner": "hf-jobs:cpu-basic:10m", "max_disk": "100MB"}
    (recipes.folder / "recipes").mkdir()
    Image.new("RGB", (200, 100)).save(recipes.folder / "recipes/picture.png")
    after = recipes.commit(**{"recipes/tiny.yaml": tiny(build=build, card={"image": "picture.png"})})
    # That the Hub does not answer for a moment, when it is asked how the Job ended, loses no Job.
    looked: list[str] = []

    def hiccup(number: int, request: Any) -> Fault | None:
        if request.method == "GET" and re.fullmatch("/api/jobs/admin/[^/]*", request.url.path):
            looked.append(request.url.path)
            return Fault(status=503) if len(looked) == 2 else None  # the first ends the log
        return None

    hub.faults = hiccup
    step = run_step(recipes.folder, "push", push(before, after), after, **given(hub))
    assert step.code == 0 and len(looked) == 3, step.log
    hub.faults = None
    [job] = jobs(hub)
    assert "of disk" in step.log and "image.png" in HfApi(endpoint=hub.endpoint).list_repo_files("admin/Tiny")
    assert (job["flavor"], job["timeoutSeconds"], job["secrets"]) == ("cpu-basic", 600, ["HF_TOKEN"])
    assert job["dockerImage"] == "ghcr.io/x/moerge-build" and job["status"]["stage"] == "COMPLETED"  # type: ignore[index]
    assert hub.token() not in json.dumps(job)
    assert "admin/Tiny: committed" in step.log  # said by moerge in the Job
    assert not [line for line in commands(step.log) if "committed" in line]
    assert hub.token() not in step.log.split("\n", 1)[1] + step.summary
    [release] = json.loads(step.outputs["published"])
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    assert (release["repo"], release["gguf_repo"], release["changed"]) == ("admin/Tiny", "admin/Tiny-GGUF", True)
    assert release["commit"] == api.model_info("admin/Tiny").sha
    assert (recipes.folder / "moerge-out/recipes/tiny/hf-job").read_text() == f"admin/{job['id']}\n"
    # What is on the Hub already is not built again on a machine that costs money.
    again = run_step(recipes.folder, "push", push(before, after), after, **given(hub))
    assert again.code == 0 and "nothing was built" in again.log and "published already" in again.summary


def test_a_job_may_leave_a_pull_request_on_the_hub(recipes: Recipes, hub: Server) -> None:
    before = recipes.commit()
    release = {"repo": "admin/Pulled", "license": "apache-2.0", "quants": [], "create_pr": True}
    after = recipes.commit(**{"recipes/tiny.yaml": tiny(release=release)})
    step = run_step(recipes.folder, "push", push(before, after), after, **given(hub))
    assert step.code == 0, step.log
    [release] = json.loads(step.outputs["published"])
    assert (release["commit"], release["gguf_repo"], release["changed"]) == (None, None, True)
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    assert len(api.list_repo_refs("admin/Pulled", include_pull_requests=True).pull_requests or []) == 1


def test_the_exit_code_in_the_job_is_the_step_s(recipes: Recipes, hub: Server) -> None:
    before = recipes.commit()
    experts = [{"source_model": "lab/m0", "positive_prompts": [text]} for text in ("a cat", "a model")]
    build = {"runner": "hf-jobs:cpu-basic", "device": "cuda"}
    on_gpu = tiny(build=build, experts=experts, gate_mode="hidden", release={"repo": "admin/No"})
    after = recipes.commit(**{"recipes/gpu.yaml": on_gpu})
    step = run_step(recipes.folder, "push", push(before, after), after, **given(hub))
    assert step.code == 2, step.log
    [error] = [line for line in step.annotations if line.startswith("::error")]
    assert "moerge ended with 2 in the Job" in error and "/jobs/admin/" in error


def test_what_is_wrong_before_a_job_starts_costs_no_machine(recipes: Recipes, hub: Server) -> None:
    count = len(jobs(hub))
    before = recipes.commit()
    after = recipes.commit(
        **{"recipes/a.yaml": hub_recipe("lab/m0", "lab/nothing", build={"runner": "hf-jobs"}, **TINY)}
    )
    assert run_step(recipes.folder, "push", push(before, after), after, **given(hub)).code == 4
    after = recipes.commit(**{"recipes/a.yaml": tiny()})
    for missing, said in (("job_image", "job_image"), ("token", "needs a token")):
        step = run_step(recipes.folder, "push", push(before, after), after, **given(hub) | {missing: ""})
        assert step.code == 2 and any(said in line for line in step.annotations)
    stranger = given(hub) | {"token": hub.token("stranger", "write"), "job_namespace": "lab"}
    step = run_step(recipes.folder, "push", push(before, after), after, **stranger)
    assert step.code == 4 and any("may not start Jobs" in line for line in step.annotations)
    assert len(jobs(hub)) == count


def test_a_job_that_takes_too_long_is_ended_and_it_is_said_how_to_give_it_more_time(
    hub: Server, tmp_path: Path
) -> None:
    from bot.jobs import JobOptions, build_in_job
    from bot.runners import Runner
    from merge.errors import JobError
    from merge.recipe import load_recipe

    path = tmp_path / "slow.yaml"
    path.write_text(tiny())
    options = JobOptions("image", None, hub.token(), hub.endpoint)
    with pytest.raises(JobError, match=r"give it more time with build\.runner: hf-jobs:cpu-basic:TIME") as raised:
        build_in_job(load_recipe(path), Runner(("ubuntu-latest",), "cpu-basic", 1), options, tmp_path / "out")
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_step_cancels_its_job(sent: signal.Signals, recipes: Recipes, hub: Server, tmp_path: Path) -> None:
    head = recipes.commit(**{"recipes/tiny.yaml": tiny(release={"repo": f"admin/Never{sent}", "quants": ["Q4_K_M"]})})
    count = len(jobs(hub))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = kept | {
        "GITHUB_EVENT_NAME": "workflow_dispatch", "GITHUB_SHA": head, "GITHUB_WORKSPACE": str(recipes.folder),
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"),
        **{f"INPUT_{name.upper()}": value for name, value in given(hub).items()},
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "bot", "action"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        deadline = time.monotonic() + 60
        while len(jobs(hub)) == count and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(sent)
        out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, out
    assert jobs(hub)[0]["status"]["stage"] == "CANCELED", out  # type: ignore[index]
    assert "cancelling" in out
    assert not HfApi(endpoint=hub.endpoint, token=hub.token()).repo_exists(f"admin/Never{sent}")
