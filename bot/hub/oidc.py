"""Trusted publishers: a CI job's identity token is exchanged for a short-lived token of one repository (RFC 8693).

A publisher says which GitHub repository may write to which repository here. An identity token is accepted when its
claims fit: issuer, audience, times, repository, and the workflow, branch and environment where the publisher names
them. Its *signature* is checked only where a JWKS (the issuer's public keys) was given; without one anybody who can
reach the server can forge the claims, so that is for dry runs and tests on one's own machine.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.hub import errors, names
from bot.hub.access import Registry, Token
from bot.hub.names import RepoName

GITHUB = "https://token.actions.githubusercontent.com"
_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - the name of a type
_LIFETIME_SECONDS = 3600
_LEEWAY_SECONDS = 60
# DER prefix of DigestInfo for SHA-256 (RFC 8017, section 9.2, note 1).
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


@dataclass(frozen=True)
class Publisher:
    """One trust: jobs of `repository` (a GitHub ``owner/name``) may write to `repo`; None leaves a claim open."""

    repo: RepoName
    repository: str
    workflow: str | None = None
    ref: str | None = None
    environment: str | None = None

    def accepts(self, claims: Mapping[str, Any]) -> bool:
        """Whether the claims of an identity token are this publisher's."""
        path = str(claims.get("workflow_ref", "")).partition("@")[0]
        return (
            str(claims.get("repository", "")).lower() == self.repository.lower()
            and (self.workflow is None or path.rpartition("/")[2] == self.workflow)
            and (self.ref is None or claims.get("ref") == self.ref)
            and (self.environment is None or claims.get("environment") == self.environment)
        )


def parse(text: str) -> Publisher:
    """A publisher from ``OWNER/NAME=GITHUB_OWNER/REPO[@WORKFLOW.yml]``. Raises ValueError with a sentence."""
    target, equals, source = text.partition("=")
    repository, _, workflow = source.partition("@")
    if not equals or repository.count("/") != 1:
        raise ValueError("a publisher is written OWNER/NAME=GITHUB_OWNER/REPO or …@WORKFLOW.yml")
    try:
        return Publisher(resource(target), repository, workflow or None)
    except errors.HubError as error:
        raise ValueError(error.message) from error


def resource(value: object) -> RepoName:
    """The repository that an exchange is for: ``owner/name``, ``datasets/owner/name``. Raises HubError(400)."""
    if isinstance(value, str) and value.startswith(("datasets/", "spaces/")):
        prefix, _, rest = value.partition("/")
        return names.repo_id(prefix.removesuffix("s"), rest)
    return names.repo_id("model", value)


class Exchange:
    """The exchange of identity tokens, for some publishers. `jwks` is a file with the issuer's public keys."""

    def __init__(
        self, registry: Registry, publishers: Iterable[Publisher], jwks: Path | None = None, issuer: str = GITHUB
    ) -> None:
        self.registry = registry
        self.publishers = tuple(publishers)
        self.keys: list[dict[str, Any]] | None = None if jwks is None else json.loads(jwks.read_bytes())["keys"]
        self.issuer = issuer

    def exchange(self, form: Mapping[str, Any], audiences: set[str]) -> dict[str, Any]:
        """The answer of ``POST /oauth/token``. Raises HubError(400) with the fields OAuth asks for."""
        if form.get("grant_type") != _GRANT or form.get("subject_token_type") != _ID_TOKEN:
            raise _refusal("unsupported_grant_type", f"Only {_GRANT} with an id_token is supported.")
        try:
            repo = resource(form.get("resource"))
        except errors.HubError as error:
            raise _refusal("invalid_target", error.message) from None
        claims = self.claims(form.get("subject_token"), audiences)
        if not any(each.repo == repo and each.accepts(claims) for each in self.publishers):
            text = f"{claims.get('repository')} ({claims.get('workflow_ref')}) is not a trusted publisher of {repo.id}."
            raise _refusal("invalid_grant", text)
        token = Token(repo.owner, "write", (repo.url_path,))
        return {
            "access_token": self.registry.mint(token, _LIFETIME_SECONDS),
            "token_type": "bearer",
            "expires_in": _LIFETIME_SECONDS,
            "scope": f"write-repos:{repo.url_path}",
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        }

    def claims(self, token: object, audiences: set[str]) -> dict[str, Any]:
        """The claims of an identity token (a JWT) that holds now, for this server. Raises HubError(400)."""
        try:
            head, body, signature = str(token).encode("ascii").split(b".")
            header, claims, signed = json.loads(_decode(head)), json.loads(_decode(body)), _decode(signature)
            algorithm, times = header["alg"], (float(claims["iat"]), float(claims["exp"]))
            before = float(claims.get("nbf", times[0]))
        except (ValueError, KeyError, TypeError, UnicodeError, binascii.Error):
            raise _refusal("invalid_request", "subject_token is not a JSON Web Token.") from None
        if algorithm != "RS256":
            raise _refusal("invalid_grant", "subject_token is not signed with RS256.")
        if self.keys is not None:
            key = next((each for each in self.keys if each.get("kid") == header.get("kid")), None)
            if key is None or not verify_rs256(key, head + b"." + body, signed):
                raise _refusal("invalid_grant", "The signature of subject_token is not the issuer's.")
        given = claims.get("aud")
        now = time.time()
        if claims.get("iss") != self.issuer:
            raise _refusal("invalid_grant", f"subject_token is not issued by {self.issuer}.")
        if not audiences & {str(each).rstrip("/") for each in (given if isinstance(given, list) else [given])}:
            raise _refusal("invalid_grant", f"subject_token is for {given}, not for this Hub.")
        if not (max(times[0], before) - _LEEWAY_SECONDS <= now < times[1] + _LEEWAY_SECONDS):
            raise _refusal("invalid_grant", "subject_token has expired, or is not valid yet.")
        return dict(claims)


def verify_rs256(key: Mapping[str, Any], message: bytes, signature: bytes) -> bool:
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2.2): the padded digest is made and compared as a whole.

    `key` is a JWK with ``n`` and ``e``; only public numbers are used, so plain integers do.
    """
    try:
        modulus, exponent = (int.from_bytes(_decode(str(key[part]).encode())) for part in ("n", "e"))
    except (KeyError, ValueError, binascii.Error):
        return False
    length = (modulus.bit_length() + 7) // 8
    digest = _SHA256_INFO + hashlib.sha256(message).digest()
    value = int.from_bytes(signature)
    if key.get("kty") != "RSA" or modulus.bit_length() < 2048 or len(signature) != length or value >= modulus:
        return False
    padded = b"\0\1" + b"\xff" * (length - len(digest) - 3) + b"\0" + digest
    return hmac.compare_digest(pow(value, exponent, modulus).to_bytes(length), padded)


def _decode(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def _refusal(error: str, description: str) -> errors.HubError:
    return errors.HubError(400, description, body={"error": error, "error_description": description})
