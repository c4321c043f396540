"""What is published can be read: at any revision, whole or in ranges, as files or as facts about them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from bot.hub.downloads import NotSatisfiable, parse_range
from bot.hub.faults import Fault
from bot.hub.server import Server

from .conftest import contents, failing


def safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A safetensors file: name → dtype, shape, bytes."""
    header, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(position)


def test_old_revisions_stay_as_they_were(api: HfApi, repo: str, model: Path, tmp_path: Path):
    first = api.upload_folder(repo_id=repo, folder_path=model)
    before = contents(model)
    api.create_tag(repo, tag="v1.0", tag_message="the first")
    api.create_branch(repo, branch="keep/this", revision=first.oid)
    (model / "config.json").write_text("{}")
    (model / "large.gguf").write_bytes(os.urandom(1_100_000))
    (model / "small.gguf").unlink()
    api.upload_folder(repo_id=repo, folder_path=model, delete_patterns="*")
    for revision in (first.oid, "v1.0", "keep/this", "refs/heads/keep/this"):
        old = api.snapshot_download(repo, revision=revision, local_dir=tmp_path / revision.replace("/", "-"))
        assert contents(Path(old)) == before
    assert contents(Path(api.snapshot_download(repo, local_dir=tmp_path / "new"))) == contents(model)


def test_downloads_prove_right(api: HfApi, repo: str, model: Path, tmp_path: Path):
    api.upload_folder(repo_id=repo, folder_path=model)
    api.snapshot_download(repo, cache_dir=tmp_path / "cache")
    found = api.verify_repo_checksums(repo, cache_dir=tmp_path / "cache")
    assert (found.checked_count, found.mismatches, found.missing_paths) == (8, [], [])
    api.snapshot_download(repo, local_dir=tmp_path / "copy")
    (tmp_path / "copy" / "large.gguf").write_bytes(b"damaged")
    found = api.verify_repo_checksums(repo, local_dir=tmp_path / "copy")
    assert [each["path"] for each in found.mismatches] == ["large.gguf"]


def test_an_interrupted_download_goes_on_where_it_was(
    hub: Server, api: HfApi, repo: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    api.upload_file(repo_id=repo, path_in_repo="large.gguf", path_or_fileobj=model / "large.gguf")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # a chunk is written when it is whole
    faults = iter([Fault(drop=450_000)])
    hub.log.clear()

    def fails(number: int, request: Request) -> Fault | None:
        return next(faults, None) if request.method == "GET" and "/resolve/" in request.url.path else None

    with failing(hub, fails):
        path = hf_hub_download(repo, "large.gguf", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert Path(path).read_bytes() == (model / "large.gguf").read_bytes()
    first, second = hub.log.all("GET", f"{repo}/resolve/")
    assert (first.range, first.sent) == (None, 450_000)
    assert (second.range, second.status, second.sent) == ("bytes=400000-", 206, 1_234_567 - 400_000)


def test_headers_are_read_without_the_weights(hub: Server, api: HfApi, repo: str, tmp_path: Path):
    shards = {
        "model-00001-of-00002.safetensors": safetensors({"a": ("BF16", [512, 1024], 1 << 20)}),
        "model-00002-of-00002.safetensors": safetensors({"b": ("BF16", [3, 5], 30), "c": ("F32", [7], 28)}),
    }
    first, second = shards
    weight_map = {"a": first, "b": second, "c": second}
    index = {"metadata": {"total_size": (1 << 20) + 58}, "weight_map": weight_map}
    for name, data in {**shards, "model.safetensors.index.json": json.dumps(index).encode()}.items():
        (tmp_path / name).write_bytes(data)
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    hub.log.clear()
    found = api.get_safetensors_metadata(repo)
    assert found.weight_map == weight_map
    assert found.parameter_count == {"BF16": 512 * 1024 + 15, "F32": 7}
    assert sum(each.sent for each in hub.log.all()) < 110_000
    whole = api.get_sharded_safetensors_metadata(repo)
    assert whole.weight_map == weight_map
    stated = api.model_info(repo).safetensors
    assert (stated.parameters, stated.total) == ({"BF16": 512 * 1024 + 15, "F32": 7}, 512 * 1024 + 22)


def test_model_info_of_named_properties_tells_nothing_else(api: HfApi, repo: str, model: Path):
    api.upload_folder(repo_id=repo, folder_path=model)
    whole, some = api.model_info(repo), api.model_info(repo, expand=["sha", "cardData"])
    assert (some.sha, some.card_data.to_dict()) == (whole.sha, whole.card_data.to_dict())
    assert whole.siblings and some.siblings is None and some.safetensors is None
    with pytest.raises(BadRequestError, match="Cannot expand 'taste'"):
        api.model_info(repo, expand=["taste", "sha"])


def test_model_info_tells_card_sizes_and_hashes(api: HfApi, repo: str, model: Path):
    commit = api.upload_folder(repo_id=repo, folder_path=model)
    info = api.model_info(repo, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == (repo, "acme", commit.oid, False, False)
    assert info.card_data.base_model == ["acme/a", "acme/b"]
    assert {"moe", "license:mit", "base_model:acme/a", "gguf"} <= set(info.tags)
    assert info.config["model_type"] == "mixtral"
    sizes = {each.rfilename: each.size for each in info.siblings}
    assert {path: len(data) for path, data in contents(model).items()} == {
        path: size for path, size in sizes.items() if path != ".gitattributes"
    }
    assert next(each for each in info.siblings if each.rfilename == "small.gguf").lfs.size == 50_000
    assert info.last_modified is not None
    assert api.model_info(repo, revision=commit.oid).sha == commit.oid
    assert repo in [each.id for each in api.list_models(author="acme", search=repo.split("/")[1])]


def test_long_lists_come_in_pages(api: HfApi, repo: str, tmp_path: Path):
    for number in range(1100):
        path = tmp_path / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert len(api.list_repo_files(repo)) == 1101
    assert len(list(api.list_repo_tree(repo, "3"))) == 157
    expanded = list(api.list_repo_tree(repo, "3", expand=True))
    assert len(expanded) == 157
    assert {each.last_commit.title for each in expanded} == {"Upload folder using huggingface_hub"}
    assert [each.path for each in api.get_paths_info(repo, ["3", "3/3.txt", "nowhere"])] == ["3", "3/3.txt"]


def test_the_history_comes_in_pages_newest_first(hub: Server, api: HfApi, repo: str):
    body = "\n".join(
        json.dumps(each)
        for each in (
            {"key": "header", "value": {"summary": "<b> & more"}},
            {"key": "file", "value": {"path": "a", "content": "1"}},
        )
    )
    with httpx2.Client(headers={"Authorization": f"Bearer {hub.token()}"}) as http:
        for _ in range(120):
            assert http.post(f"{hub.endpoint}/api/models/{repo}/commit/main", content=body).status_code == 200
    commits = api.list_repo_commits(repo, formatted=True)
    assert len(commits) == 121
    assert len({each.commit_id for each in commits}) == 121
    assert commits[-1].title == "initial commit"
    assert (commits[0].title, commits[0].formatted_title) == ("b & more", "b &amp; more")
    dates = [each.created_at for each in commits]
    assert dates == sorted(dates, reverse=True)


def test_branches_and_tags_are_made_listed_and_deleted(api: HfApi, repo: str):
    first = api.model_info(repo).sha
    second = api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"1").oid
    api.create_branch(repo, branch="old", revision=first)
    api.create_tag(repo, tag="v1", revision="old")
    for again in (lambda: api.create_branch(repo, branch="old"), lambda: api.create_tag(repo, tag="v1")):
        with pytest.raises(HfHubHTTPError) as refused:
            again()
        assert refused.value.response.status_code == 409
    api.create_branch(repo, branch="old", exist_ok=True)
    api.create_tag(repo, tag="v1", exist_ok=True)
    refs = api.list_repo_refs(repo)
    assert {each.name: each.target_commit for each in refs.branches} == {"main": second, "old": first}
    assert {each.name: each.target_commit for each in refs.tags} == {"v1": first}
    api.delete_branch(repo, branch="old")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")
    api.create_branch(repo, branch="old/deeper")
    with pytest.raises(HfHubHTTPError):
        api.create_branch(repo, branch="old")


def test_what_is_not_there_is_named_by_its_kind(api: HfApi, repo: str, tmp_path: Path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/nowhere")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("nowhere")
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("acme/nowhere", "a", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo, ".gitattributes", revision="nowhere", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "nowhere.txt", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    assert api.file_exists(repo, ".gitattributes")
    assert not api.file_exists(repo, "nowhere.txt")
    assert not api.repo_exists("acme/nowhere")


def test_datasets_have_a_world_of_their_own(api: HfApi, repo: str, tmp_path: Path):
    api.create_repo(repo, repo_type="dataset")
    api.upload_file(repo_id=repo, repo_type="dataset", path_in_repo="a.parquet", path_or_fileobj=b"data")
    path = api.hf_hub_download(repo, "a.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"data"
    assert api.dataset_info(repo).sha != api.model_info(repo).sha
    assert not api.file_exists(repo, "a.parquet")


@pytest.mark.parametrize("name", ["small.gguf", "config.json"])
def test_a_range_is_that_part_of_the_file(hub: Server, api: HfApi, repo: str, model: Path, name: str):
    api.upload_folder(repo_id=repo, folder_path=model)
    data, url = (model / name).read_bytes(), f"{hub.endpoint}/{repo}/resolve/main/{name}"
    last = len(data) - 1
    for header, part in {
        "bytes=0-0": data[:1],
        "bytes=10-19": data[10:20],
        "bytes=5-": data[5:],
        "bytes=-7": data[-7:],
        f"bytes={last}-{last + 1000}": data[last:],
        "bytes=-999999999": data,
    }.items():
        answer = httpx2.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["Content-Range"].endswith(f"/{len(data)}")
    for header in (f"bytes={len(data)}-", "bytes=-0"):
        answer = httpx2.get(url, headers={"Range": header})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    for header in ("bytes=9-3", "lines=1-2", "bytes=0-1,4-5", "bytes=-", "bytes=a-b"):
        assert httpx2.get(url, headers={"Range": header}).content == data
    head = httpx2.head(url)
    assert (head.headers["Content-Length"], head.headers["Accept-Ranges"], head.content) == (
        str(len(data)),
        "bytes",
        b"",
    )
    assert head.headers["X-Repo-Commit"] == api.model_info(repo).sha
    assert httpx2.get(url, headers={"If-None-Match": head.headers["ETag"]}).status_code == 304
    stale = httpx2.get(url, headers={"Range": "bytes=0-1", "If-Range": '"another"'})
    assert (stale.status_code, stale.content) == (200, data)


@given(st.binary(max_size=40), st.integers(0, 50), st.integers(0, 50))
def test_every_range_is_python_slicing(data: bytes, first: int, last: int):
    def taken(header: str) -> bytes | None:
        try:
            part = parse_range(header, len(data))
        except NotSatisfiable:
            return None
        return data if part is None else data[part.start : part.stop]

    if first <= last:
        assert taken(f"bytes={first}-{last}") == (data[first : last + 1] or None)
    assert taken(f"bytes={first}-") == (data[first:] or None)
    assert taken(f"bytes=-{last}") == ((data[-last:] if last else b"") or None)
