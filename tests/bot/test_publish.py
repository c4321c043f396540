"""Publishing through the unmodified client to the embedded Hub: one commit a repository, nothing twice, nothing foreign lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, ModelCard

from bot.cli import main
from bot.hub.faults import Fault
from bot.hub.server import Server, running
from bot.pipeline import build_and_publish
from bot.publish import publish
from bot.publish.patience import patiently
from evals.results import read_report
from merge.errors import DestinationError, UsageError
from merge.recipe import load_recipe
from merge.sources import Sources
from tests.dense import recipe_text, save_dense

REPO = "me/Tiny-2x1M"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build; tests copy it."""
    folder = tmp_path_factory.mktemp("build")
    models = [save_dense(folder / f"m{n}", seed=n, hidden_size=256, intermediate_size=512) for n in range(2)]
    release = {"repo": REPO, "quants": ["Q8_0"], "license": "apache-2.0", "version": "v1"}
    (folder / "recipe.yaml").write_text(recipe_text(models[0], list(models), experts_per_token=1, release=release))
    assert main(["build", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def api(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    # The client's cache would carry files from one server to the next.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bot.publish.patience.PAUSE", 0.01)
    return HfApi(endpoint=hub.endpoint, token=hub.token())


def test_a_release_is_one_commit_in_each_repository_and_a_tag(out: Path, hub: Server, api: HfApi) -> None:
    publication = publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert publication.changed
    assert (publication.repo, publication.gguf_repo, publication.tag) == (REPO, f"{REPO}-GGUF", "v1")
    for repo in (REPO, f"{REPO}-GGUF"):
        assert len(api.list_repo_commits(repo)) == 2  # the Hub's own first commit, and ours
        [tag] = api.list_repo_refs(repo).tags
        assert (tag.name, tag.target_commit) == ("v1", api.model_info(repo).sha)
    files = set(api.list_repo_files(REPO))
    assert {
        "config.json",
        "model.safetensors",
        "README.md",
        "recipe.yaml",
        "moerge.lock.json",
        "tokenizer.json",
    } <= files
    assert {"README.md", "Tiny-2x1M-Q8_0.gguf"} <= set(api.list_repo_files(f"{REPO}-GGUF"))
    local = Path(api.hf_hub_download(REPO, "model.safetensors"))
    assert local.read_bytes() == (out / "model/model.safetensors").read_bytes()
    card = ModelCard(Path(api.hf_hub_download(REPO, "README.md")).read_text())
    assert card.data.license == "apache-2.0"


def test_the_gguf_repository_is_committed_before_the_model(out: Path, hub: Server, api: HfApi) -> None:
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    commits = [exchange.path for exchange in hub.log.all(containing="/commit/")]
    assert [f"{REPO}-GGUF/" in path for path in commits] == [True, False]


def test_a_second_publication_does_nothing_and_says_so(
    out: Path, hub: Server, api: HfApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    before = {repo: api.model_info(repo).sha for repo in (REPO, f"{REPO}-GGUF")}
    assert not publish(out, token=hub.token(), endpoint=hub.endpoint).changed
    assert {repo: api.model_info(repo).sha for repo in before} == before


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(out: Path, hub: Server, api: HfApi) -> None:
    publication = publish(out, token=hub.token(), endpoint=hub.endpoint, dry_run=True)
    assert publication.changed
    text = "\n".join(change.to_text() for change in publication.repositories)
    assert "+ model.safetensors" in text
    assert not api.repo_exists(REPO)
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    (out / "model/README.md").write_text("changed\n")
    again = publish(out, token=hub.token(), endpoint=hub.endpoint, dry_run=True)
    assert [change.changed for change in again.repositories] == [(), ("README.md", "moerge.lock.json")]


def test_files_we_did_not_write_stay_and_ours_that_are_gone_are_removed(out: Path, hub: Server, api: HfApi) -> None:
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="imatrix.dat", repo_id=f"{REPO}-GGUF")
    report = read_report(out / "report.json")
    old = report.quants[0].file.name
    value = json.loads((out / "report.json").read_text())
    value["quants"][0]["file"]["name"] = "Tiny-2x1M-new.gguf"
    (out / "report.json").write_text(json.dumps(value))
    (out / "gguf" / old).rename(out / "gguf/Tiny-2x1M-new.gguf")
    publication = publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert publication.repositories[0].removed == (old,)
    assert set(api.list_repo_files(f"{REPO}-GGUF")) >= {"imatrix.dat", "Tiny-2x1M-new.gguf"}
    assert old not in api.list_repo_files(f"{REPO}-GGUF")
    assert "notes.txt" in api.list_repo_files(REPO)


def test_what_cannot_be_published_is_one_sentence(
    out: Path, hub: Server, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = hub.token("someone", "read")
    stranger = hub.token("someone", "write", ["someone"])
    for token, sentence in (
        ("hf_wrong", "does not know the token"),
        (reader, "no right to write"),
        (stranger, "no right to write"),
    ):
        with pytest.raises(DestinationError, match=sentence):
            publish(out, token=token, endpoint=hub.endpoint)
    assert not api.repo_exists(REPO)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client's own attempts
    with pytest.raises(DestinationError, match="cannot be reached"):
        publish(out, token=hub.token(), endpoint="http://127.0.0.1:9")


def test_a_hub_that_falters_and_then_is_gone_is_given_up_with_one_sentence(hub: Server, api: HfApi) -> None:
    tried: list[str] = []

    def ask() -> None:
        tried.append(hub.endpoint if len(tried) < 2 else "http://127.0.0.1:9")
        httpx2.get(tried[-1]).raise_for_status()

    hub.faults = lambda number, request: Fault(status=503)
    with pytest.raises(DestinationError, match="cannot be reached"):
        patiently(REPO, hub.endpoint, ask)
    assert len(tried) == 3


def test_a_name_that_holds_somebody_s_model_is_not_overwritten(out: Path, hub: Server, api: HfApi) -> None:
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="model.safetensors", repo_id=REPO)
    before = api.model_info(REPO).sha
    with pytest.raises(DestinationError, match="holds another model, which moerge did not publish") as error:
        publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert error.value.exit_code == 4
    assert api.model_info(REPO).sha == before
    assert not api.repo_exists(f"{REPO}-GGUF")  # nothing was begun


def test_a_repository_made_beforehand_with_a_readme_is_used(out: Path, hub: Server, api: HfApi) -> None:
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert publish(out, token=hub.token(), endpoint=hub.endpoint).changed


def test_a_publication_that_broke_between_the_repositories_is_finished_by_the_next(
    out: Path, hub: Server, api: HfApi
) -> None:
    hub.faults = lambda number, request: Fault(status=500) if f"{REPO}/commit" in str(request.url) else None
    with pytest.raises(DestinationError, match="status 500"):
        publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert "Tiny-2x1M-Q8_0.gguf" in api.list_repo_files(f"{REPO}-GGUF")
    assert "model.safetensors" not in api.list_repo_files(REPO)
    hub.faults = None
    publication = publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert [change.is_empty for change in publication.repositories] == [True, False]


def test_a_build_that_is_not_whole_is_not_published(out: Path, tmp_path: Path, hub: Server) -> None:
    with pytest.raises(UsageError, match="moerge build"):
        publish(tmp_path / "nowhere", endpoint=hub.endpoint)
    (out / "model/config.json").unlink()
    with pytest.raises(UsageError, match="it is not there"):
        publish(out, token=hub.token(), endpoint=hub.endpoint)


def test_a_file_that_changed_since_the_build_is_not_published(out: Path, hub: Server, api: HfApi) -> None:
    weights = out / "model/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UsageError, match="not the file that was built"):
        publish(out, token=hub.token(), endpoint=hub.endpoint)
    assert not api.repo_exists(REPO) or "model.safetensors" not in api.list_repo_files(REPO)


def test_a_commit_that_came_in_between_loses_nothing(out: Path, hub: Server, api: HfApi) -> None:
    publish(out, token=hub.token(), endpoint=hub.endpoint)
    (out / "model/README.md").write_text("new\n")
    real, pushed = HfApi.create_commit, []

    def meanwhile(self: HfApi, *args: object, **options: object) -> object:
        if not pushed:
            pushed.append(True)
            api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=REPO)
        return real(self, *args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_commit", meanwhile)
        assert publish(out, token=hub.token(), endpoint=hub.endpoint).changed
    assert "theirs.txt" in api.list_repo_files(REPO)
    assert Path(api.hf_hub_download(REPO, "README.md")).read_text() == "new\n"
    theirs, ours = api.list_repo_commits(REPO)[1], api.list_repo_commits(REPO)[0]
    assert theirs.title.startswith("Upload theirs.txt") and ours.title.startswith("Release")
    assert {ref.target_commit for ref in api.list_repo_refs(REPO).tags} == {ours.commit_id}


def test_a_publication_that_was_cut_off_after_its_last_commit_is_finished_by_the_next_build(
    built: Path, out: Path, tmp_path: Path, hub: Server, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token())
    text = (built.parent / "recipe.yaml").read_text().replace("release:\n", "release:\n  private_first: true\n")
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = ["build", str(tmp_path / "recipe.yaml"), "--publish", "--out"]
    hub.faults = lambda number, request: Fault(status=403) if f"{REPO}/tag/" in str(request.url) else None
    assert main([*arguments, str(out)]) == 4
    heads = [api.model_info(repo).sha for repo in (REPO, f"{REPO}-GGUF")]
    assert api.model_info(REPO).private and not api.list_repo_refs(REPO).tags
    hub.faults = None
    assert main([*arguments, str(tmp_path / "two")]) == 3
    assert not (tmp_path / "two/model").exists()  # nothing is built again
    for repo, head in zip((REPO, f"{REPO}-GGUF"), heads, strict=True):
        assert [(ref.name, ref.target_commit) for ref in api.list_repo_refs(repo).tags] == [("v1", head)]
        assert (api.model_info(repo).sha, api.model_info(repo).private) == (head, False)
    # Once it is whole, looking again writes nothing; a file that arrived damaged is no whole release.
    hub.log.clear()
    assert main([*arguments, str(tmp_path / "two")]) == 3
    assert {each.method for each in hub.log.all()} <= {"GET", "HEAD"}
    api.upload_file(path_or_fileobj=b"damaged" * 2**20, path_in_repo="model.safetensors", repo_id=REPO)
    assert main([*arguments, str(out)]) == 0
    [weights] = api.get_paths_info(REPO, ["model.safetensors"])
    assert weights.size == (out / "model/model.safetensors").stat().st_size  # type: ignore[union-attr]


def test_a_release_without_any_gguf_file_that_could_be_made_names_no_repository_for_them(
    built: Path, out: Path, hub: Server, api: HfApi
) -> None:
    value = json.loads((out / "report.json").read_text())
    value["failed_quants"] = [{"type": quant["type"], "reason": "no proof"} for quant in value["quants"]]
    value["quants"] = []
    (out / "report.json").write_text(json.dumps(value))
    options = {"token": hub.token(), "endpoint": hub.endpoint}
    publish(out, **options)
    loaded = load_recipe(built.parent / "recipe.yaml")
    _, publication = build_and_publish(loaded, Sources(built.parent), out, **options)
    assert (publication.changed, publication.gguf_repo) == (False, None)
    assert [change.repo for change in publication.repositories] == [REPO]
