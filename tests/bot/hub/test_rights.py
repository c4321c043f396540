"""Each token may do what its rights say, and what it may not see does not exist for it."""

from __future__ import annotations

import base64
import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from huggingface_hub import HfApi, constants
from huggingface_hub._oidc import exchange_oidc_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from bot.hub import access, oidc
from bot.hub.server import Server, running

Client = Callable[..., HfApi]


def status(action: Callable[..., Any], *args: Any, **options: Any) -> int:
    """The status with which the Hub refuses an action."""
    with pytest.raises(HfHubHTTPError) as refused:
        action(*args, **options)
    return refused.value.response.status_code


def test_a_token_nobody_was_given_is_refused(hub: Server, repo: str):
    stranger = HfApi(endpoint=hub.endpoint, token="hf_stranger")
    assert status(stranger.model_info, repo) == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        stranger.whoami()


def test_whoami_names_the_tokens_user(hub: Server, client: Client):
    assert client("bob", "write").whoami()["name"] == "bob"
    assert [each["name"] for each in client("bob", "write", scope=["acme", "bob"]).whoami()["orgs"]] == ["acme"]
    assert status(HfApi(endpoint=hub.endpoint, token=False).list_repo_refs, "acme/nowhere") == 404


def test_anyone_reads_what_is_public_and_nobody_writes_without_the_right(hub: Server, client: Client, repo: str):
    for reader, refusal in (
        (HfApi(endpoint=hub.endpoint, token=False), 401),
        (client("bob", "write"), 403),
        (client("bob", "read", scope=["acme"]), 403),
        (client("bob", "write", scope=[f"datasets/{repo}"]), 403),
    ):
        assert reader.list_repo_files(repo) == [".gitattributes"]
        assert status(reader.upload_file, repo_id=repo, path_in_repo="a", path_or_fileobj=b"1") == refusal
        assert status(reader.create_tag, repo, tag="v1") == refusal
        assert status(reader.create_branch, repo, branch="b") == refusal
        assert status(reader.delete_repo, repo) == refusal
        assert status(reader.update_repo_settings, repo, private=True) == refusal
        assert status(reader.move_repo, repo, "bob/stolen") == refusal


def test_a_write_token_writes_in_its_namespaces_and_repositories_alone(
    hub: Server, client: Client, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch
):
    bob = client("bob", "write", scope=["bob", repo])
    assert bob.create_repo("mine").repo_id == "bob/mine"
    bob.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"1")
    assert api.list_repo_commits(repo)[0].authors == ["bob"]
    assert status(bob.create_repo, "acme/new") == 403
    assert status(bob.delete_repo, repo) == 403
    # The client then looks whether the repository is there already, and reads its address by HF_ENDPOINT.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    assert bob.create_repo(repo, exist_ok=True).repo_id == repo
    bob.delete_repo("bob/mine")
    assert not bob.repo_exists("bob/mine")


def test_a_private_repository_exists_only_for_those_who_may_read_it(
    hub: Server, client: Client, api: HfApi, repo: str, tmp_path: Path
):
    api.upload_file(repo_id=repo, path_in_repo="a.bin", path_or_fileobj=b"secret")
    api.update_repo_settings(repo, private=True)
    for outsider in (HfApi(endpoint=hub.endpoint, token=False), client("bob", "write"), client("eve", "read")):
        for action, options in (
            (outsider.model_info, {}),
            (outsider.hf_hub_download, {"filename": "a.bin", "cache_dir": tmp_path / "none"}),
            (outsider.upload_file, {"path_in_repo": "a", "path_or_fileobj": b"1"}),
            (outsider.list_repo_refs, {}),
            (outsider.auth_check, {}),
            (outsider.delete_repo, {}),
        ):
            with pytest.raises(RepositoryNotFoundError):
                action(repo_id=repo, **options)
        assert repo not in [each.id for each in outsider.list_models(author="acme")]
    reader = client("eve", "read", scope=[repo])
    assert reader.model_info(repo).private
    assert Path(reader.hf_hub_download(repo, "a.bin", cache_dir=tmp_path)).read_bytes() == b"secret"
    assert api.create_repo(f"{repo}-p", private=True) and api.model_info(f"{repo}-p").private


def test_a_gated_repository_shows_its_facts_and_keeps_its_files(
    hub: Server, client: Client, api: HfApi, repo: str, tmp_path: Path
):
    api.upload_file(repo_id=repo, path_in_repo="a.bin", path_or_fileobj=b"gated")
    api.update_repo_settings(repo, gated="manual")
    for outsider, code in ((HfApi(endpoint=hub.endpoint, token=False), 401), (client("bob", "write"), 403)):
        assert outsider.model_info(repo).gated == "manual"
        assert "a.bin" in outsider.list_repo_files(repo)
        with pytest.raises(GatedRepoError) as refused:
            outsider.hf_hub_download(repo, "a.bin", cache_dir=tmp_path / "none")
        with pytest.raises(GatedRepoError) as refused:
            outsider.auth_check(repo)
        assert refused.value.response.status_code == code
    allowed = client("bob", "read", scope=["bob", repo])
    assert Path(allowed.hf_hub_download(repo, "a.bin", cache_dir=tmp_path)).read_bytes() == b"gated"
    allowed.auth_check(repo)
    assert status(allowed.auth_check, repo, write=True) == 403


def test_a_name_that_is_taken_is_refused_with_409_unless_that_is_fine(api: HfApi, repo: str):
    assert status(api.create_repo, repo) == 409
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    other = api.create_repo(f"{repo}-b").repo_id
    assert status(api.move_repo, other, repo) == 409
    api.move_repo(other, f"{repo}-c")
    assert api.repo_exists(f"{repo}-c")
    assert not api.repo_exists(other)


def test_a_deleted_repository_leaves_nothing_behind(api: HfApi, repo: str, hub: Server):
    old = api.upload_file(repo_id=repo, path_in_repo="a.bin", path_or_fileobj=b"1").oid
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    api.delete_repo(repo, missing_ok=True)
    api.create_repo(repo)
    assert not api.revision_exists(repo, old)
    assert list((hub.root / "incoming").iterdir()) == []


def test_the_first_start_makes_an_admin_token_that_only_its_user_reads(tmp_path: Path):
    with running(tmp_path) as first:
        token = first.token()
        assert stat.S_IMODE((tmp_path / "tokens.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
        minted = first.token("bob", "write")
        first.hub.registry.add(access.parse("carol:read=acme,bob/gated:hf_carol"))
    with running(tmp_path, tokens=[access.parse("dave:write:hf_dave")]) as second:
        assert second.token() == token
        for each, name in ((token, "admin"), (minted, "bob"), ("hf_carol", "carol"), ("hf_dave", "dave")):
            assert HfApi(endpoint=second.endpoint, token=each).whoami()["name"] == name
    assert "dave" not in (tmp_path / "tokens.json").read_text()


@pytest.mark.parametrize(
    "text",
    ["", "bob", "bob:write", "bob:owner:hf_x1", "b/b:write:hf_x1", "bob:write=a/b/c/d:hf_x1", "bob:read:a b c d"],
)
def test_a_token_that_cannot_be_meant_is_refused(text: str):
    with pytest.raises(ValueError, match=r"\w"):
        access.parse(text)


def test_a_signed_token_cannot_be_changed(hub: Server):
    token = hub.token("bob", "read")
    body, _, signature = token.removeprefix("hf_jwt_").partition(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    forged = base64.urlsafe_b64encode(json.dumps({**claims, "rights": "admin"}).encode()).decode().rstrip("=")
    for wrong in (f"hf_jwt_{forged}.{signature}", f"hf_jwt_{body}.{signature[:-1]}0x", "hf_jwt_", f"hf_jwt_{body}"):
        assert status(HfApi(endpoint=hub.endpoint, token=wrong).model_info, "acme/any") == 401


class TestTrustedPublishers:
    KEY = rsa.generate_private_key(65537, 2048)

    def jwt(self, key: rsa.RSAPrivateKey = KEY, alg: str = "RS256", **changes: Any) -> str:
        now = time.time()
        claims = {
            "iss": oidc.GITHUB,
            "aud": self.hub.endpoint,
            "iat": now,
            "nbf": now - 5,
            "exp": now + 300,
            "repository": "octo/recipes",
            "ref": "refs/heads/main",
            "workflow_ref": "octo/recipes/.github/workflows/release.yml@refs/heads/main",
        }
        header = {"alg": alg, "typ": "JWT", "kid": "one"}
        parts = [self.encode(json.dumps(each).encode()) for each in (header, {**claims, **changes})]
        signature = key.sign(".".join(parts).encode(), padding.PKCS1v15(), hashes.SHA256())
        return ".".join([*parts, self.encode(signature)])

    @staticmethod
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    @pytest.fixture(autouse=True)
    def served(self, tmp_path: Path):
        numbers = self.KEY.public_key().public_numbers()
        key = {part: self.encode(value.to_bytes(256)) for part, value in (("n", numbers.n), ("e", numbers.e))}
        jwks = tmp_path / "jwks.json"
        jwks.write_text(json.dumps({"keys": [{"kty": "RSA", "kid": "one", **key}]}))
        publishers = [oidc.parse("acme/model=Octo/Recipes@release.yml")]
        with running(tmp_path / "hub", publishers=publishers, jwks=jwks) as self.hub:
            admin = HfApi(endpoint=self.hub.endpoint, token=self.hub.token())
            for name in ("acme/model", "acme/other"):
                admin.create_repo(name)
            yield

    def exchange(self, token: str, resource: str = "acme/model") -> dict[str, Any]:
        return exchange_oidc_token(subject_token=token, resource=resource, endpoint=self.hub.endpoint)

    def test_a_trusted_job_gets_a_token_for_its_repository_and_no_more(self):
        answer = self.exchange(self.jwt())
        assert (answer["token_type"], answer["expires_in"]) == ("bearer", 3600)
        job = HfApi(endpoint=self.hub.endpoint, token=answer["access_token"])
        commit = job.upload_file(repo_id="acme/model", path_in_repo="a.bin", path_or_fileobj=b"1")
        job.create_tag("acme/model", tag="v1")
        assert job.model_info("acme/model").sha == commit.oid
        assert status(job.upload_file, repo_id="acme/other", path_in_repo="a", path_or_fileobj=b"1") == 403
        assert status(job.create_repo, "acme/new") == 403
        assert status(job.create_collection, "Mine", namespace="acme") == 403
        assert status(job.delete_repo, "acme/model") == 403

    @pytest.mark.parametrize(
        "changes",
        [
            {"repository": "octo/fork"},
            {"workflow_ref": "octo/recipes/.github/workflows/other.yml@refs/heads/main"},
            {"iss": "https://elsewhere.example"},
            {"aud": "https://elsewhere.example"},
            {"exp": time.time() - 1000},
            {"iat": time.time() + 1000},
            {"exp": "soon"},
            {"alg": "none"},
            {"alg": "HS256"},
            {"key": rsa.generate_private_key(65537, 2048)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_job_whose_claims_or_signature_do_not_fit_gets_none(self, changes: dict[str, Any]):
        assert status(self.exchange, self.jwt(**changes)) == 400

    def test_no_token_for_another_repository_or_from_nonsense(self):
        for token, resource in ((self.jwt(), "acme/other"), (self.jwt(), "datasets/acme/model"), (self.jwt(), "..")):
            assert status(self.exchange, token, resource) == 400
        for nonsense in ("", "a.b", "a.b.c", "é.é.é", self.jwt() + "x", self.jwt().rpartition(".")[0] + "."):
            assert status(self.exchange, nonsense) == 400

    def test_without_public_keys_the_claims_alone_decide(self, tmp_path: Path):
        with running(tmp_path / "other", publishers=[oidc.parse("acme/model=octo/recipes")]) as self.hub:
            forger = rsa.generate_private_key(65537, 2048)
            assert self.exchange(self.jwt(forger))["access_token"]
            for changes in ({"repository": "octo/fork"}, {"exp": time.time() - 1000}, {"aud": "x"}, {"iss": "x"}):
                assert status(self.exchange, self.jwt(forger, **changes)) == 400
