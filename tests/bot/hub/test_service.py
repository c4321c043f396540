"""Around the repositories: collections, pages, what is refused by design, faults on purpose, the command line."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from starlette.requests import Request

from bot.cli import hub as cli
from bot.hub.faults import Fault
from bot.hub.server import Server
from merge.errors import DestinationError, UsageError

from .conftest import failing


def test_a_collection_is_made_filled_and_deleted(hub: Server, api: HfApi, repo: str, client):
    made = api.create_collection(f"Of {repo} & more", namespace="acme", description="Some models")
    assert re.fullmatch(r"acme/of-acme-model-\d+-more-[0-9a-f]{24}", made.slug)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_collection(made.title, namespace="acme")
    assert refused.value.response.status_code == 409
    assert api.create_collection(made.title, namespace="acme", exists_ok=True).slug == made.slug
    private = api.create_repo(f"{repo}-private", private=True).repo_id
    api.add_collection_item(made.slug, repo, "model", note="the first <b>")
    api.add_collection_item(made.slug, private, "model")
    api.add_collection_item(made.slug, repo, "model", exists_ok=True)
    for wrong, code in ((("acme/nowhere", "model"), 404), ((repo, "model"), 409)):
        with pytest.raises(HfHubHTTPError) as refused:
            api.add_collection_item(made.slug, *wrong)
        assert refused.value.response.status_code == code
    found = api.get_collection(made.slug)
    assert [(each.item_id, each.note, each.position) for each in found.items] == [
        (repo, "the first <b>", 0),
        (private, None, 1),
    ]
    api.update_collection_item(made.slug, found.items[1].item_object_id, position=0, note="now first")
    assert [each.item_id for each in api.get_collection(made.slug).items] == [private, repo]
    stranger = client("bob", "write")
    assert [each.item_id for each in stranger.get_collection(made.slug).items] == [repo]
    assert made.slug in [each.slug for each in stranger.list_collections(owner="acme")]
    for action in (
        lambda: stranger.delete_collection(made.slug),
        lambda: stranger.add_collection_item(made.slug, repo, "model"),
        lambda: stranger.create_collection("x", namespace="acme"),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            action()
        assert refused.value.response.status_code == 403
    assert api.update_collection_metadata(made.slug, title="Other", private=True).title == "Other"
    with pytest.raises(HfHubHTTPError) as refused:
        stranger.get_collection(made.slug)
    assert refused.value.response.status_code == 404
    api.delete_collection_item(made.slug, found.items[0].item_object_id)
    assert [each.item_id for each in api.get_collection(made.slug).items] == [private]
    api.delete_collection(made.slug)
    api.delete_collection(made.slug, missing_ok=True)


def test_the_links_of_a_card_lead_to_pages(hub: Server, api: HfApi, repo: str, model: Path):
    script = "<script>alert(1)</script>"
    (model / "README.md").write_text(f"---\nlicense: mit\n---\n{script}")
    commit = api.upload_folder(repo_id=repo, folder_path=model, create_pr=True)
    api.upload_folder(repo_id=repo, folder_path=model, commit_message=script, commit_description=script)
    collection = api.create_collection(f"For {repo}", namespace="acme", description=script)
    slug = api.add_collection_item(collection.slug, repo, "model").slug
    for path in (
        f"/{repo}",
        f"/{repo}/tree/main",
        f"/{repo}/tree/main/sub/deep",
        f"/{repo}/tree/refs%2Fpr%2F1",
        f"/{repo}/blob/main/README.md",
        f"/{repo}/blob/main/small.gguf",
        f"/{repo}/commit/{api.model_info(repo).sha}",
        commit.pr_url.removeprefix(hub.endpoint),
        f"/collections/{slug}",
        "/",
    ):
        page = httpx2.get(hub.endpoint + path, follow_redirects=True)
        assert page.status_code == 200, path
        assert script not in page.text
        for link in re.findall(r'href="(.*?)"', page.text)[:20]:
            assert httpx2.get(hub.endpoint + link).status_code == 200
    assert httpx2.get(f"{hub.endpoint}/{repo}/tree/nowhere").status_code == 404
    assert httpx2.get(f"{hub.endpoint}/acme/nowhere").status_code == 404


def test_jobs_are_refused_and_unknown_addresses_not_found(hub: Server, api: HfApi):
    with pytest.raises(HfHubHTTPError, match="runs no jobs unless"):
        api.run_job(image="python", command=["true"], namespace="acme")
    assert httpx2.get(f"{hub.endpoint}/api/agent-harnesses").status_code == 404


def test_a_busy_hub_is_asked_again_after_the_time_it_names(hub: Server, api: HfApi, repo: str):
    faults = iter([Fault(status=429, retry_after=0)])
    start = time.monotonic()
    with failing(hub, lambda number, request: next(faults, None)):
        assert len(list(api.list_repo_tree(repo))) == 1
    assert 0.9 < time.monotonic() - start < 5


def test_a_dropped_connection_is_tried_again_by_the_client(hub: Server, api: HfApi, repo: str):
    faults = iter([Fault(drop=0)])
    hub.log.clear()
    with failing(hub, lambda number, request: next(faults, None)):
        assert len(list(api.list_repo_tree(repo))) == 1
    assert [(each.status, each.sent > 0) for each in hub.log.all("GET", f"{repo}/tree")] == [(0, False), (200, True)]


def test_who_is_told_of_requests_is_told_with_their_status_when_they_have_ended(hub: Server, api: HfApi, repo: str):
    told, ended = [], threading.Event()
    hub.log.told = lambda exchange: (told.append((exchange.method, exchange.path, exchange.status)), ended.set())
    api.model_info(repo)
    assert ended.wait(30)
    assert told == [("GET", f"/api/models/{repo}", 200)]


def test_faults_are_chosen_by_request_and_can_stall(hub: Server, api: HfApi, repo: str):
    def stall(number: int, request: Request) -> Fault | None:
        return Fault(stall=0.2, status=503) if request.url.path.endswith("/refs") else None

    start = time.monotonic()
    with failing(hub, stall):
        assert api.model_info(repo).id == repo
        with pytest.raises(HfHubHTTPError) as refused:
            api.list_repo_refs(repo)
    assert refused.value.response.status_code == 503
    assert time.monotonic() - start >= 0.2
    assert api.list_repo_refs(repo).branches


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_how_to_use_it_and_stops_cleanly(tmp_path: Path, ending: signal.Signals):
    code = (
        "import argparse, sys; from bot.cli import hub; parser = argparse.ArgumentParser(); hub.configure(parser);"
        "heavy = {'starlette', 'uvicorn', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "sys.exit(hub.run(parser.parse_args()))"
    )
    options = ["--port", "0", "--root", str(tmp_path), "--token", "bob:write=acme:hf_bob", "--publisher", "acme/m=o/r"]
    process = subprocess.Popen([sys.executable, "-c", code, *options], stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    exports = dict(re.findall(r"(\w+)=(\S+)", next(line for line in lines if "export" in line)))
    assert exports["HF_HUB_DISABLE_XET"] == "1"
    assert any("signatures are not" in line for line in lines)
    assert HfApi(endpoint=exports["HF_ENDPOINT"], token=exports["HF_TOKEN"]).whoami()["name"] == "admin"
    HfApi(endpoint=exports["HF_ENDPOINT"], token="hf_bob").create_repo("acme/model")
    process.send_signal(ending)
    assert process.wait(10) == 0
    process.stdout.close()


def test_the_command_says_what_is_wrong_with_its_options(tmp_path: Path, hub: Server):
    parser = argparse.ArgumentParser()
    cli.configure(parser)

    def run(*options: str) -> int:
        return cli.run(parser.parse_args(["--root", str(tmp_path / "hub"), *options]))

    with pytest.raises(UsageError, match="NAME:RIGHTS"):
        run("--token", "bob")
    with pytest.raises(UsageError, match="GITHUB_OWNER"):
        run("--publisher", "acme/model")
    with pytest.raises(DestinationError, match="Cannot serve"):
        run("--port", str(hub.port))
    with pytest.raises(DestinationError, match="Cannot serve"):
        run("--port", "0", "--jwks", str(tmp_path / "nowhere.json"))
    (tmp_path / "jwks.json").write_text("[]")
    with pytest.raises(UsageError, match="not a JWKS"):
        run("--port", "0", "--jwks", str(tmp_path / "jwks.json"))
    (tmp_path / "hub" / "tokens.json").write_text('{"tokens": [{"name": "bob"}]}')
    with pytest.raises(DestinationError, match=r"tokens\.json is not a list of tokens"):
        run("--port", "0")
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="cannot be used"):
        cli.run(parser.parse_args(["--port", "0", "--root", os.fspath(tmp_path / "file")]))
