"""Everything in a request is hostile: nothing outside a repository is reached, and every refusal is an answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx2
import pytest
from huggingface_hub import HfApi
from hypothesis import example, given
from hypothesis import strategies as st

from bot.hub import attributes, card, names
from bot.hub.errors import HubError
from bot.hub.server import Server

PATHS = [
    "../a",
    "a/../b",
    "a/..",
    "./a",
    "/a",
    "a//b",
    "a/",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "a\\b",
    ".git/config",
    "a/.GIT/x",
    "a" * 256,
    "a/" * 2100 + "a",
    "\ud800",
    None,
    5,
    ["a"],
]
REFS = [
    "../a",
    "a..b",
    "a b",
    "a~1",
    "a^",
    "a:b",
    "a.lock",
    ".a",
    "a/.b",
    "-a",
    "a//b",
    "@",
    "a@{1}",
    "0" * 40,
    "a\0",
    "é" * 200,
]


@pytest.fixture
def http(hub: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=hub.endpoint, headers={"Authorization": f"Bearer {hub.token()}"}) as http:
        yield http


def encoded(text: str) -> str:
    """Percent-encoding with the dots too, which clients otherwise resolve themselves."""
    return quote(text, safe="").replace(".", "%2E")


def raw(hub: Server, request: bytes) -> bytes:
    """The answer to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", hub.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:20])
def test_a_path_that_leads_elsewhere_is_refused_wherever_it_stands(http: httpx2.Client, repo: str, path: object):
    def commit(*lines: object) -> int:
        body = "\n".join(json.dumps(each) for each in [{"key": "header", "value": {"summary": "x"}}, *lines])
        return http.post(f"/api/models/{repo}/commit/main", content=body).status_code

    assert commit({"key": "file", "value": {"path": path, "content": "x"}}) == 400
    assert commit({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": "0" * 64}}) == 400
    assert commit({"key": "deletedFile", "value": {"path": path}}) == 400
    assert commit({"key": "copyFile", "value": {"path": path, "srcPath": ".gitattributes"}}) == 400
    assert commit({"key": "copyFile", "value": {"path": "a", "srcPath": path}}) == 400
    files = [{"path": path, "size": 1, "sample": "eA=="}]
    assert http.post(f"/api/models/{repo}/preupload/main", content=json.dumps({"files": files})).status_code == 400
    if isinstance(path, str) and path not in {"", "\ud800"} and len(path) < 1000:
        for view in ("resolve", "blob"):
            assert http.get(f"/{repo}/{view}/main/{encoded(path)}").status_code == 400


def test_strange_but_harmless_paths_are_kept_as_they_are(api: HfApi, repo: str, http: httpx2.Client):
    paths = [
        "%2e%2e/a",
        "a b/ c",
        "...",
        "a..b",
        "ü/日本",
        "'\"<&>;",
        "-rf",
        "~",
        "$(x)",
        "CON",
        "a?b#c",
        "e\u0301",
        "*",
    ]
    lines = [{"key": "header", "value": {"summary": "x"}}]
    lines += [{"key": "file", "value": {"path": path, "content": path}} for path in paths]
    body = "\n".join(json.dumps(each) for each in lines)
    assert http.post(f"/api/models/{repo}/commit/main", content=body).status_code == 200
    assert set(api.list_repo_files(repo)) == {".gitattributes", *paths}
    for path in paths:
        answer = http.get(f"/{repo}/resolve/main/{quote(path)}")
        assert (answer.status_code, answer.text) == (200, path)
    page = http.get(f"/{repo}").text
    assert "<&>" not in page and "&lt;&amp;&gt;" in page


@pytest.mark.parametrize("ref", REFS, ids=lambda ref: repr(ref)[:20])
def test_a_reference_that_git_would_refuse_is_refused(http: httpx2.Client, repo: str, ref: str):
    assert http.post(f"/api/models/{repo}/branch/{quote(ref, safe='')}", json={}).status_code == 400
    assert http.post(f"/api/models/{repo}/tag/main", json={"tag": ref}).status_code == 400
    assert http.get(f"/api/models/{repo}/revision/{quote(ref, safe='')}").status_code in {400, 404}


@pytest.mark.parametrize("name", ["..", "a..b", ".a", "a.git", "a/b", "a b", "a\0", "é", "a" * 97, "a--b", "", None, 5])
def test_a_repository_cannot_have_a_name_that_is_a_path(http: httpx2.Client, name: object):
    assert http.post("/api/repos/create", json={"name": name, "organization": "acme"}).status_code == 400
    if isinstance(name, str) and name:
        assert http.post("/api/repos/create", json={"name": "a", "organization": name}).status_code == 400
        assert http.get(f"/api/models/acme/{encoded(name)}").status_code in {400, 404}


def test_addresses_that_climb_reach_nothing(hub: Server):
    token = hub.token().encode()
    for path in (
        b"/acme/%2e%2e/resolve/main/tokens.json",
        b"/../../tokens.json",
        b"/datasets/../../resolve/main/secret",
        b"/acme/m/resolve/main/%2e%2e%2f%2e%2e%2ftokens.json",
        b"/%ff%fe/x/resolve/main/a",
        b"/acme/m/resolve/%ff/a",
        b"//acme//m",
    ):
        request = (
            b"GET "
            + path
            + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer "
            + token
            + b"\r\n\r\n"
        )
        answer = raw(hub, request)
        assert answer.split(b" ")[1] in {b"400", b"404"}
        assert b'"tokens"' not in answer


def test_bodies_that_are_not_what_they_should_be_are_answered_with_400(http: httpx2.Client, repo: str):
    deep = b"[" * 100_000
    for body in (b"", b"{", b"[]", b"1", b"\xff", deep, b'{"a":' + deep):
        assert http.post(f"/{repo}.git/info/lfs/objects/batch", content=body).status_code == 400
    for objects in (
        5,
        [5],
        [{}],
        [{"oid": "x", "size": 1}],
        [{"oid": "0" * 64, "size": -1}],
        [{"oid": "0" * 64, "size": True}],
    ):
        body = {"operation": "upload", "objects": objects}
        assert http.post(f"/{repo}.git/info/lfs/objects/batch", json=body).status_code == 400
    for size in (1 << 41, 1e300):
        body = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": size}]}
        assert http.post(f"/{repo}.git/info/lfs/objects/batch", json=body).status_code == 400
    assert http.post("/api/repos/create", content=b"x" * (9 << 20)).status_code == 413
    assert http.get(f"/api/models/{repo}/tree/main?cursor=-1").status_code == 400
    assert http.get(f"/api/models/{repo}/tree/main?limit=x").status_code == 400
    assert http.post(f"/api/models/{repo}/paths-info/main", json={"paths": "x"}).status_code == 400


def test_a_card_is_hostile_too(api: HfApi, repo: str, http: httpx2.Client):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    for metadata in (bomb, "a: [" * 5000, "!!python/object/apply:os.system [x]", "a: 2020-99-99", "? [a]\n: b", "[1]"):
        text = f"---\n{metadata}\n---\n"
        assert http.post("/api/validate-yaml", json={"content": text}).status_code == 400
        line = {"key": "file", "value": {"path": "README.md", "content": text}}
        body = f"{json.dumps({'key': 'header', 'value': {'summary': 'x'}})}\n{json.dumps(line)}"
        assert http.post(f"/api/models/{repo}/commit/main", content=body).status_code == 200
        assert api.model_info(repo).card_data is None
    for file in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        line = {"key": "file", "value": {"path": file, "content": "[" * 50_000}}
        body = f"{json.dumps({'key': 'header', 'value': {'summary': 'x'}})}\n{json.dumps(line)}"
        assert http.post(f"/api/models/{repo}/commit/main", content=body).status_code == 200
        assert api.model_info(repo).safetensors is None


@given(st.text(max_size=300))
@example("---\n---\n")
@example("---\n&a [*a]\n---\n")
def test_any_text_is_a_card_or_a_refusal(text: str):
    for content in (text, f"---\n{text}\n---\n"):
        wrong, doubtful = card.problems(content)
        json.dumps([wrong, doubtful])


@given(st.text(max_size=50))
def test_any_text_is_a_safe_path_or_a_refusal(text: str):
    try:
        path = names.path(text)
    except HubError as error:
        assert error.status == 400
    else:
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/"))


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("license", "mit", True),
        ("license", "llama3.1", True),
        ("license", "MIT", False),
        ("license", 5, False),
        ("tags", "moe", True),
        ("tags", [1], False),
        ("base_model", ["a/b", "c/d"], True),
        ("base_model", "a b", False),
        ("base_model_relation", "merge", True),
        ("base_model_relation", "cousin", False),
        ("language", ["en", "de", "zh-Hant"], True),
        ("language", False, False),
        ("language", "English, French", False),
        ("pipeline_tag", ["a"], False),
        ("model-index", [], False),
        ("model-index", [{"name": "m", "results": []}], True),
        ("model-index", [{"results": [{}]}], False),
        (
            "model-index",
            [
                {
                    "name": "m",
                    "results": [
                        {
                            "task": {"type": "t"},
                            "dataset": {"type": "d", "name": "D"},
                            "metrics": [{"type": "acc", "value": 0}],
                        }
                    ],
                }
            ],
            True,
        ),
    ],
)
def test_a_cards_fields_are_checked(key: str, value: object, fits: bool):
    wrong, _ = card.problems(f"---\n{json.dumps({key: value})}\n---\n")
    assert (not wrong) is fits


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*.bin", ["a.bin", "x/y/a.bin"], ["a.bin.txt", "bin"]),
        ("/a", ["a", "a/b"], ["x/a"]),
        ("a/", ["a/b", "x/a/b"], ["a"]),
        ("a/**/c", ["a/c", "a/b/c", "a/b/b/c"], ["a/b", "c"]),
        ("*tfevents*", ["x/tfevents.1"], ["events"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
    ],
)
def test_patterns_mean_what_they_mean_to_git(pattern: str, matching: list[str], other: list[str]):
    assert all(attributes.is_ignored(each, pattern) for each in matching)
    assert not any(attributes.is_ignored(each, pattern) for each in other)
