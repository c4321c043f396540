"""Every link of a card leads somewhere: each is asked of the embedded Hub that holds the release and its sources."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from huggingface_hub import HfApi, ModelCard

from bot.cli import main
from bot.hub.server import Server, running
from cards.hub import HUB
from tests.cards.page import body, page
from tests.dense import recipe_text, save_dense

# Pages of programs that the cards name; they are not the Hub's.
PROGRAMS = {
    "https://huggingface.co/docs/transformers",
    "https://docs.vllm.ai",
    "https://github.com/ggml-org/llama.cpp",
    "https://ollama.com",
    "https://lmstudio.ai",
    "https://github.com/EleutherAI/lm-evaluation-harness",
}


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def links(hub: Server, repo: str) -> set[str]:
    """Where the links and images of the card in `repo` lead, on the embedded Hub."""
    card = ModelCard(Path(HfApi(endpoint=hub.endpoint).hf_hub_download(repo, "README.md")).read_text(encoding="utf-8"))
    seen = page(body(card.content)).links
    assert seen
    # The Hub shows a file that lies beside the card from the repository's main branch.
    whole = {link if urlsplit(link).scheme else urljoin(f"{HUB}/{repo}/resolve/main/", link) for link in seen}
    return {link.replace(HUB, hub.endpoint) for link in whole - PROGRAMS}


def test_every_link_of_both_cards_leads_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with running(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        api = HfApi(endpoint=hub.endpoint, token=hub.token())
        for n in range(2):
            folder = save_dense(tmp_path / f"m{n}", seed=n, hidden_size=256, intermediate_size=512)
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
            api.create_repo(f"me/dense-{n}")
            api.upload_folder(repo_id=f"me/dense-{n}", folder_path=folder)
        (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        text = recipe_text(
            "me/dense-0",
            ["me/dense-0", "me/dense-1"],
            experts_per_token=1,
            release={"repo": "me/Linked-2x1M", "quants": ["Q8_0"]},
            card={"image": "image.png"},
        )
        (tmp_path / "recipe.yaml").write_text(text)
        out = str(tmp_path / "out")
        assert main(["build", str(tmp_path / "recipe.yaml"), "--out", out, "--device", "cpu"]) == 0
        assert main(["publish", out]) == 0
        found = links(hub, "me/Linked-2x1M")
        assert any("/me/dense-1/tree/" in link for link in found)
        assert f"{hub.endpoint}/me/Linked-2x1M/resolve/main/architecture.svg" in found
        assert f"{hub.endpoint}/me/Linked-2x1M/resolve/main/image.png" in found
        assert f"{hub.endpoint}/me/Linked-2x1M-GGUF/blob/main/Linked-2x1M-Q8_0.gguf" in found
        for link in found | links(hub, "me/Linked-2x1M-GGUF"):
            assert status(link) == 200, link
        assert status(f"{hub.endpoint}/me/Linked-2x1M/resolve/main/nothing.svg") == 404
