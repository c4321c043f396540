"""Whatever goes wrong on the way to the Hub, no release is half, and the next run makes it whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import publish_faults as faults
from bot.hub.faults import Fault
from bot.publish import publish


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Stage]:
    with faults.hurried():
        yield faults.Stage(tmp_path_factory.mktemp("faults"))


def test_a_release_survives_every_kind_of_fault(stage: faults.Stage) -> None:
    counts = faults.run_kinds(stage, every=17)
    assert [name for name, count in counts.items() if count.lost or not count.tried] == []


def test_a_commit_whose_answer_was_lost_is_not_made_twice(stage: faults.Stage) -> None:
    at = [number for number, (_, path) in enumerate(stage.requests, 1) if "/commit/" in path]
    for kind in faults.KINDS:
        if kind.fault is not None and (kind.fault.lost or kind.fault.late):
            assert [faults.run_fault(stage, kind, number) for number in at] == [(None, False)] * len(at)


def test_a_release_killed_at_random_moments_is_made_whole_by_the_next_run(stage: faults.Stage) -> None:
    count = faults.run_kills(stage, 4)
    assert (count.tried, count.lost) == (4, 0)


def test_what_an_interrupted_publication_uploaded_is_not_sent_again(stage: faults.Stage) -> None:
    def no_commit(number: int, request: Any) -> Fault | None:
        return Fault(status=403) if "/commit/" in request.url.path else None

    with stage.copied(no_commit) as server:
        options = {"token": server.token(), "endpoint": server.endpoint}
        assert faults.attempt(lambda: publish(stage.second, **options)) is not None
        sent = sum(each.received for each in server.log.all("PUT", "/storage/"))
        large = [path for path in stage.second.rglob("*") if path.suffix in (".gguf", ".safetensors")]
        assert sent == sum(path.stat().st_size for path in large)
        server.log.clear()
        server.faults = None
        publish(stage.second, **options)
        assert server.log.all("PUT", "/storage/") == []
        assert stage.problem(server, finished=True) is None


def test_a_second_publication_writes_nothing(stage: faults.Stage) -> None:
    with stage.copied() as server:
        options = {"token": server.token(), "endpoint": server.endpoint}
        publish(stage.second, **options)
        server.log.clear()
        assert not publish(stage.second, **options).changed
        assert {each.method for each in server.log.all()} <= {"GET", "HEAD"}


def test_a_bit_that_flips_in_the_commit_itself_is_found_and_mended(stage: faults.Stage) -> None:
    left = [1]

    def flip(number: int, request: Any) -> Fault | None:
        if "-GGUF/commit/" in request.url.path and left[0]:
            left[0] = 0
            return Fault(damage="request")
        return None

    with stage.copied(flip) as server:
        error = faults.attempt(lambda: publish(stage.second, token=server.token(), endpoint=server.endpoint))
        tree = faults.files(server, f"{faults.REPO}-GGUF", "main")
        assert error is not None or tree == stage.new[f"{faults.REPO}-GGUF"]


def test_sections_that_people_keep_in_the_card_survive_a_release(stage: faults.Stage) -> None:
    from huggingface_hub import HfApi

    with stage.copied() as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        section = "<!-- moerge:keep thanks -->\nThanks to *everybody*.\n<!-- /moerge:keep -->"
        card = Path(api.hf_hub_download(faults.REPO, "README.md")).read_text()
        edited = f"{card}\nDropped.\n\n{section}\n"
        api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=faults.REPO)
        options = {"token": server.token(), "endpoint": server.endpoint}
        publish(stage.second, **options)
        text = Path(api.hf_hub_download(faults.REPO, "README.md")).read_text()
        assert text.startswith("---\nbase_model:") and "Fault-2x1M" in text
        assert section in text and "Dropped." not in text
        # What somebody writes into the card of a release that is there is theirs: the same release writes nothing.
        api.upload_file(
            path_or_fileobj=b"---\nlicense: mit\n---\nmine\n", path_in_repo="README.md", repo_id=faults.REPO
        )
        assert not publish(stage.second, **options).changed
