"""What a release does beside its commits, each part of it asked for in the recipe; and publishing without a stored token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from benchmarks.publish_faults import REPO, make_build
from bot.cli import main
from bot.hub import oidc
from bot.hub.faults import Fault
from bot.hub.server import Server, running
from bot.publish import publish
from bot.releases import released_here, tag_on_hub
from evals.results import ReleaseWanted, read_report
from merge.errors import DestinationError
from tests.dense import recipe_text, save_dense

REPOS = (REPO, f"{REPO}-GGUF")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bot.publish.patience.PAUSE", 0.01)
    with running(
        tmp_path / "hub", publishers=[oidc.parse(f"{repo}=you/recipes@build.yml") for repo in REPOS]
    ) as server:
        yield server


@pytest.fixture
def api(hub: Server) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token())


def build(folder: Path, version: int = 1, **wanted: Any) -> Path:
    out = make_build(folder, version)
    report = read_report(out / "report.json")
    (out / "report.json").write_bytes(replace(report, release=ReleaseWanted(**wanted)).to_json())
    return out


def test_a_release_is_private_until_all_of_it_is_there(hub: Server, api: HfApi, tmp_path: Path) -> None:
    out = build(tmp_path / "out", private_first=True)
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert [api.model_info(repo).private for repo in REPOS] == [False, False]
    paths = [each.path for each in hub.log.all() if each.method == "PUT" and each.path.endswith("/settings")]
    commits = [each.number for each in hub.log.all("POST", "/commit/")]
    revealed = [each.number for each in hub.log.all("PUT", "/settings")]
    assert len(paths) == 2 and min(revealed) > max(commits)


def test_gating_a_collection_and_the_previous_model_s_card(hub: Server, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("me/Old-2x1M")
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n# Old\n", path_in_repo="README.md", repo_id="me/Old-2x1M")
    out = build(tmp_path / "out", gated="manual", collection="My mixtures", replaces="me/Old-2x1M")
    for _ in range(2):  # a second run adds nothing
        publish(out, token=hub.token(), endpoint=hub.endpoint)
        assert [api.model_info(repo).gated for repo in REPOS] == ["manual", "manual"]
        [collection] = api.list_collections(owner="me")
        assert [item.item_id for item in api.get_collection(collection.slug).items] == list(REPOS)
        assert len(api.list_repo_commits("me/Old-2x1M")) == 3
    card = Path(api.hf_hub_download("me/Old-2x1M", "README.md")).read_text()
    assert f"new_version: {REPO}" in card and card.endswith("# Old\n")


def test_a_pull_request_in_place_of_a_commit_is_opened_once(hub: Server, api: HfApi, tmp_path: Path) -> None:
    publish(build(tmp_path / "one"), token=hub.token(), endpoint=hub.endpoint)
    heads = [api.model_info(repo).sha for repo in REPOS]
    out = build(tmp_path / "two", 2, create_pr=True)
    for _ in range(2):
        publication = publish(out, token=hub.token(), endpoint=hub.endpoint)
        assert [api.model_info(repo).sha for repo in REPOS] == heads
        # The version's tag does not go to the release that is there so far.
        tag_on_hub(released_here(read_report(out / "report.json"), publication), "2.1", hub.token(), hub.endpoint)
        assert [[ref.name for ref in api.list_repo_refs(repo).tags] for repo in REPOS] == [["v1"], ["v1"]]
        for repo in REPOS:
            [pull] = api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
            assert "moerge.lock.json" in {
                file.rfilename for file in api.model_info(repo, revision=pull.ref).siblings or []
            }


def test_a_stranger_s_pull_request_or_an_old_tag_keeps_no_release_from_the_hub(
    hub: Server, api: HfApi, tmp_path: Path
) -> None:
    publish(build(tmp_path / "one"), token=hub.token(), endpoint=hub.endpoint)

    def other_model() -> list[CommitOperationAdd | CommitOperationDelete]:
        names = ("config.json", "Fault-2x1M-Q8_0.gguf")
        return [
            CommitOperationDelete(path_in_repo="moerge.lock.json"),
            *(CommitOperationAdd(name, b"{}") for name in names),
        ]

    put: dict[str, Any] = {"path_or_fileobj": b"{}", "path_in_repo": "moerge.lock.json", "create_pr": True}
    for repo in REPOS:
        api.upload_file(repo_id=repo, **put)
        api.create_commit(repo, other_model(), commit_message="Another model", create_pr=True)
        # A tag of this version, on a model from before moerge.
        api.create_branch(repo, branch="old")
        old = api.create_commit(repo, other_model(), commit_message="Another model", revision="old").oid
        api.create_tag(repo, tag="v2", revision=old)
    publish(build(tmp_path / "pull", 2, create_pr=True), token=hub.token(), endpoint=hub.endpoint)
    for repo in REPOS:
        assert len(api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []) == 3
    publish(build(tmp_path / "two", 2), token=hub.token(), endpoint=hub.endpoint)
    for repo in REPOS:
        assert {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}["v2"] == api.model_info(repo).sha


class GitHub:
    """What a job asks for its identity: answers with a token for the audience that is asked for."""

    def __init__(self, repository: str = "you/recipes") -> None:
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                audience = handler.path.partition("audience=")[2]
                from urllib.parse import unquote

                self.asked.append(handler.headers["Authorization"])
                now = int(time.time())
                claims = {
                    "iss": oidc.GITHUB, "aud": unquote(audience), "iat": now, "exp": now + 300, "repository": repository,
                    "workflow_ref": f"{repository}/.github/workflows/build.yml@refs/heads/main",
                }  # fmt: skip
                token = jwt.encode(claims, KEY, algorithm="RS256")
                body = json.dumps({"value": token}).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *args: object) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token?x=1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


KEY = _key()


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    server = GitHub()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", server.url)
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "runner-secret")
    yield server
    server.server.shutdown()


def test_a_trusted_publisher_needs_no_stored_token_and_exchanges_once_for_each_repository(
    hub: Server, api: HfApi, tmp_path: Path, github: GitHub
) -> None:
    for repo in REPOS:
        api.create_repo(repo)
    publication = publish(build(tmp_path / "out"), endpoint=hub.endpoint)
    assert publication.changed and "model.safetensors" in api.list_repo_files(REPO)
    assert len(hub.log.all("POST", "/oauth/token")) == 2
    assert github.asked == ["Bearer runner-secret"] * 2
    # So is the tag of a version that was pushed; a failure that passes is waited out.
    left = [Fault(status=503)]
    hub.faults = lambda number, request: left.pop() if left and "/tag/" in request.url.path else None
    release = released_here(read_report(tmp_path / "out/report.json"), publication)
    for _ in range(2):
        tag_on_hub(release, "2.1", None, hub.endpoint)
        for repo in REPOS:
            tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
            assert tags["2.1"] == api.model_info(repo).sha and not left


@pytest.mark.parametrize("room", [(), ("--max-disk", "20MB")], ids=["whole", "ranges"])
def test_gated_sources_are_read_with_a_token_that_may_only_read_and_the_release_needs_none(
    room: tuple[str, ...],
    hub: Server,
    api: HfApi,
    tmp_path: Path,
    github: GitHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [save_dense(tmp_path / f"m{number}", seed=number) for number in range(2)]
    for number, model in enumerate(models):
        api.create_repo(f"src/m{number}")
        api.upload_folder(repo_id=f"src/m{number}", folder_path=model)
        api.update_repo_settings(f"src/m{number}", gated="manual")
    for repo in REPOS:
        api.create_repo(repo)
    recipe = tmp_path / "recipe.yaml"
    release = {"repo": REPO, "quants": [], "license": "mit"}
    recipe.write_text(recipe_text("src/m0", ["src/m0", "src/m1"], gate_mode="random", release=release))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = ["build", str(recipe), "--out", str(tmp_path / "out"), "--publish", *room]
    assert main(command) == 4
    assert "the model is gated" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", reader := hub.token("reader", "read", ["src"]))
    assert main(command) == 0
    assert len(hub.log.all("POST", "/oauth/token")) == 1  # for the one repository that was written to
    with pytest.raises(HfHubHTTPError):  # and not with the token that reads
        HfApi(endpoint=hub.endpoint, token=reader).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO)
    assert "model.safetensors" in api.list_repo_files(REPO)


def test_what_a_keyless_job_may_not_do_is_said(
    hub: Server, api: HfApi, tmp_path: Path, github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build(tmp_path / "out")
    with pytest.raises(DestinationError, match=r"cannot make one; make it on the Hub.*Trusted Publishers"):
        publish(out, endpoint=hub.endpoint)
    stranger = GitHub("someone/else")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", stranger.url)
    with pytest.raises(DestinationError, match=r"does not take this job's identity.*HF_TOKEN"):
        publish(out, endpoint=hub.endpoint)
    # With a token of its own beside it the job goes on with that.
    assert publish(out, token=hub.token(), endpoint=hub.endpoint).changed
    stranger.server.shutdown()
