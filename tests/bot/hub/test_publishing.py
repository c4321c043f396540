"""What the client sends arrives whole, or not at all."""

from __future__ import annotations

import base64
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

from bot.hub.server import Server

from .conftest import contents


def test_what_upload_folder_sends_is_what_snapshot_download_gets(api: HfApi, repo: str, model: Path, tmp_path: Path):
    api.upload_folder(repo_id=repo, folder_path=model)
    copy = api.snapshot_download(repo, local_dir=tmp_path / "copy")
    assert contents(Path(copy)) == contents(model)


def test_a_large_file_is_sent_in_parts_and_a_smaller_one_in_one_piece(hub: Server, api: HfApi, repo: str, model: Path):
    hub.log.clear()
    api.upload_folder(repo_id=repo, folder_path=model)
    sent = sorted(each.received for each in hub.log.all("PUT", f"{repo}.git/info/lfs/storage"))
    assert sent == [34_567, 50_000, 300_000, 300_000, 300_000, 300_000]


def test_what_the_hub_has_is_not_sent_again(hub: Server, api: HfApi, repo: str, model: Path):
    first = api.upload_folder(repo_id=repo, folder_path=model)
    hub.log.clear()
    again = api.upload_folder(repo_id=repo, folder_path=model)
    assert again.oid == first.oid
    api.upload_file(repo_id=repo, path_in_repo="other.gguf", path_or_fileobj=model / "large.gguf")
    assert hub.log.all("PUT") == []


def test_one_commit_adds_copies_and_deletes(api: HfApi, repo: str, model: Path, tmp_path: Path):
    api.upload_folder(repo_id=repo, folder_path=model)
    commit = api.create_commit(
        repo,
        [
            CommitOperationAdd("new.txt", b"regular"),
            CommitOperationAdd("new.bin", b"large by its name"),
            CommitOperationCopy("large.gguf", "copies/large.gguf"),
            CommitOperationCopy("config.json", "copies/config.json"),
            CommitOperationDelete("small.gguf"),
            CommitOperationDelete("sub/"),
        ],
        commit_message="Several things",
        commit_description="For a reason.\n\nAnd another.",
    )
    expected = contents(model)
    expected = {path: data for path, data in expected.items() if path != "small.gguf" and not path.startswith("sub/")}
    expected |= {"new.txt": b"regular", "new.bin": b"large by its name"}
    expected |= {f"copies/{name}": expected[name] for name in ("large.gguf", "config.json")}
    assert contents(Path(api.snapshot_download(repo, local_dir=tmp_path / "copy"))) == expected
    newest = api.list_repo_commits(repo)[0]
    assert (newest.commit_id, newest.title, newest.message) == (
        commit.oid,
        "Several things",
        "For a reason.\n\nAnd another.",
    )
    large = {each.rfilename for each in api.model_info(repo, files_metadata=True).siblings if each.lfs}
    assert large == {"large.gguf", "new.bin", "copies/large.gguf"}


def test_a_commit_on_a_moved_parent_is_refused_with_412_and_changes_nothing(api: HfApi, repo: str):
    parent = api.model_info(repo).sha
    first = api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"1", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as refused:
        api.upload_file(repo_id=repo, path_in_repo="b", path_or_fileobj=b"2", parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert api.model_info(repo).sha == first.oid


def test_a_pull_request_leaves_the_branch_alone(api: HfApi, repo: str):
    before = api.model_info(repo).sha
    first = api.upload_file(repo_id=repo, path_in_repo="a.bin", path_or_fileobj=b"1", create_pr=True)
    second = api.upload_file(repo_id=repo, path_in_repo="b", path_or_fileobj=b"2", create_pr=True)
    assert (first.pr_num, second.pr_num) == (1, 2)
    more = api.upload_file(repo_id=repo, path_in_repo="c", path_or_fileobj=b"3", revision=first.pr_revision)
    assert api.model_info(repo).sha == before
    assert set(api.list_repo_files(repo, revision="refs/pr/1")) == {".gitattributes", "a.bin", "c"}
    pulls = {
        each.ref: each.target_commit for each in api.list_repo_refs(repo, include_pull_requests=True).pull_requests
    }
    assert pulls == {"refs/pr/1": more.oid, "refs/pr/2": second.oid}


def test_deleting_what_is_not_there_names_the_file(api: HfApi, repo: str):
    with pytest.raises(EntryNotFoundError, match=r"A file with this name doesn't exist: nowhere\.txt"):
        api.delete_file("nowhere.txt", repo)
    with pytest.raises(EntryNotFoundError, match="A folder with this name"):
        api.delete_folder("nowhere", repo)


def test_a_path_cannot_be_a_file_and_a_folder(api: HfApi, repo: str):
    api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"1")
    with pytest.raises(BadRequestError, match="a file and a folder"):
        api.upload_file(repo_id=repo, path_in_repo="a/b", path_or_fileobj=b"2")


def test_a_commit_to_a_branch_that_is_not_there_is_refused(api: HfApi, repo: str):
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"1", revision="nowhere")


def test_files_that_gitignore_names_are_left_out(api: HfApi, repo: str, model: Path):
    (model / ".gitignore").write_text("*.gguf\n!small.gguf\nsub/\n")
    api.upload_folder(repo_id=repo, folder_path=model)
    assert {"small.gguf", "config.json"} <= set(files := api.list_repo_files(repo))
    assert not any(each == "large.gguf" or each.startswith("sub/") for each in files)


def test_a_card_the_hub_would_refuse_is_refused(api: HfApi, repo: str):
    bad = b"---\nlicense: made-up\nbase_model: 'not a model'\n---\n"
    with pytest.raises(ValueError, match="license") as refused:
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=bad)
    assert "base_model" in str(refused.value)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"no metadata")
    assert any("empty or missing yaml metadata" in str(each.message) for each in seen)


def test_concurrent_commits_all_land_one_after_the_other(api: HfApi, repo: str):
    def commit(number: int) -> str:
        data = os.urandom(1000) + bytes([number])
        return api.upload_file(repo_id=repo, path_in_repo=f"{number}.bin", path_or_fileobj=data).oid

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(commit, range(16)))
    history = [each.commit_id for each in api.list_repo_commits(repo)]
    assert len(history) == 17
    assert set(made) == set(history[:-1])
    assert len(api.list_repo_files(repo)) == 17


class TestDirectRequests:
    """What the client would never send."""

    @pytest.fixture
    def http(self, hub: Server):
        headers = {"Authorization": f"Bearer {hub.token()}"}
        with httpx2.Client(base_url=hub.endpoint, headers=headers) as http:
            yield http

    def batch(self, http: httpx2.Client, repo: str, data: bytes) -> dict:
        import hashlib

        item = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [item]}
        return http.post(f"/{repo}.git/info/lfs/objects/batch", json=body).json()["objects"][0] | {"item": item}

    def commit(self, http: httpx2.Client, repo: str, *lines: object, header: bool = True) -> httpx2.Response:
        first = [{"key": "header", "value": {"summary": "x"}}] if header else []
        return http.post(
            f"/api/models/{repo}/commit/main", content="\n".join(json.dumps(each) for each in [*first, *lines])
        )

    def test_a_body_that_is_not_what_was_announced_is_refused_and_not_kept(self, http: httpx2.Client, repo: str):
        data = os.urandom(5000)
        answer = self.batch(http, repo, data)
        upload = answer["actions"]["upload"]["href"]
        for wrong in (data[:-1], data + b"x", b"y" + data[1:], b""):
            assert http.put(upload, content=wrong).status_code == 400
            verified = http.post(answer["actions"]["verify"]["href"], json=answer["item"])
            assert verified.status_code == 404
        line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": answer["oid"], "size": 5000}}
        refused = self.commit(http, repo, line)
        assert refused.status_code == 400
        assert "does not exist" in refused.json()["error"]
        assert http.put(upload, content=data).status_code == 200
        assert self.commit(http, repo, line).status_code == 200

    def test_parts_that_are_not_together_what_was_announced_are_refused(self, http: httpx2.Client, repo: str):
        data = os.urandom(1_500_000)
        answer = self.batch(http, repo, data)
        upload = answer["actions"]["upload"]
        parts = [upload["header"][key] for key in sorted(upload["header"]) if key.isdigit()]
        assert len(parts) == 5
        for number, address in enumerate(parts):
            part = data[number * 300_000 : (number + 1) * 300_000]
            assert http.put(address, content=part if number else bytes(300_000)).status_code == 200
        assert http.post(upload["href"], json={}).status_code == 400
        assert http.post(answer["actions"]["verify"]["href"], json=answer["item"]).status_code == 404

    def test_an_upload_address_of_another_hub_or_object_is_refused(self, http: httpx2.Client, repo: str):
        address = self.batch(http, repo, b"something")["actions"]["upload"]["href"]
        assert http.put(address.replace("signature=", "signature=0"), content=b"something").status_code == 403
        assert http.put(address.replace("size=9", "size=10"), content=b"something!").status_code == 403
        assert http.put(address.partition("?")[0], content=b"something").status_code == 403

    def test_another_repositorys_large_file_cannot_be_had_by_its_hash(self, http: httpx2.Client, repo: str, api: HfApi):
        api.upload_file(repo_id=repo, path_in_repo="secret.bin", path_or_fileobj=b"a secret")
        oid = api.model_info(repo, files_metadata=True).siblings[-1].lfs.sha256
        other = api.create_repo(f"{repo}-other").repo_id
        line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid}}
        assert self.commit(http, other, line).status_code == 400

    def test_a_regular_file_over_the_limit_is_refused_with_413(self, http: httpx2.Client, repo: str):
        for size in (100_001, 3_000_000):
            content = base64.b64encode(bytes(size)).decode()
            line = {"key": "file", "value": {"path": "a.txt", "content": content, "encoding": "base64"}}
            assert self.commit(http, repo, line).status_code == 413

    def test_a_commit_is_refused_as_a_whole(self, http: httpx2.Client, repo: str, api: HfApi):
        before = api.model_info(repo).sha
        good = {"key": "file", "value": {"path": "good.txt", "content": "text"}}
        for bad in (
            {"key": "file", "value": {"path": "bad.txt", "content": "%%%", "encoding": "base64"}},
            {"key": "file", "value": {"path": "bad.txt"}},
            {"key": "file", "value": "text"},
            {"key": "unknown", "value": {"path": "bad.txt"}},
            {"key": "header", "value": {"summary": "a second one"}},
            {"key": "deletedFile", "value": {"path": "nowhere"}},
            {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64}},
            ["not", "an", "object"],
        ):
            assert self.commit(http, repo, good, bad).status_code in {400, 404}
        assert self.commit(http, repo, good, header=False).status_code == 400
        assert http.post(f"/api/models/{repo}/commit/main", content=b"\xff{").status_code == 400
        assert http.post(f"/api/models/{repo}/commit/main", content=b"").status_code == 400
        assert api.model_info(repo).sha == before

    def test_a_regular_file_that_is_a_pointer_to_nothing_is_refused(self, http: httpx2.Client, repo: str):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
        refused = self.commit(http, repo, {"key": "file", "value": {"path": "a.bin", "content": pointer}})
        assert refused.status_code == 400
