"""Trusted publishers: a CI job's identity token is exchanged for a short-lived token of one repository (RFC 8693).

A publisher says which GitHub repository may write to which repository here. An identity token is accepted when its
claims fit: issuer, audience, times, repository, and the workflow, branch and environment where the publisher names
them. Its *signature* is checked only where a JWKS (the issuer's public keys) was given; without one anybody who can
reach the server can forge the claims, so that is for dry runs and tests on one's own machine.
"""

from __future__ import annotations

import json
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
_ALGORITHM = "RS256"


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
    """The exchange of identity tokens, for some publishers. `jwks` is a file with the issuer's public keys.

    Raises OSError or ValueError where that file cannot be read.
    """

    def __init__(
        self, registry: Registry, publishers: Iterable[Publisher], jwks: Path | None = None, issuer: str = GITHUB
    ) -> None:
        self.registry = registry
        self.publishers = tuple(publishers)
        self.keys = None if jwks is None else _keys(jwks)
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
        import jwt  # with cryptography behind it: loaded when it is used

        try:
            head = jwt.get_unverified_header(str(token))
            key = jwt.PyJWK(self._key(head.get("kid"))) if self.keys is not None else None
            if head["alg"] != _ALGORITHM:
                raise jwt.InvalidAlgorithmError(f"it is not signed with {_ALGORITHM}")
            return dict(
                jwt.decode(
                    str(token),
                    key or "",
                    algorithms=[_ALGORITHM],
                    audience=audiences,
                    issuer=self.issuer,
                    leeway=_LEEWAY_SECONDS,
                    options={
                        "require": ["aud", "exp", "iat", "iss"],
                        "verify_signature": key is not None,
                        "verify_aud": True,  # these go with the signature unless they are asked for
                        "verify_exp": True,
                        "verify_iat": True,
                        "verify_iss": True,
                        "verify_nbf": True,
                    },
                )
            )
        except (jwt.PyJWTError, ValueError, LookupError) as error:
            raise _refusal("invalid_grant", f"subject_token is refused: {error}") from None

    def _key(self, identifier: object) -> dict[str, Any]:
        for key in self.keys or ():
            if key.get("kid") == identifier:
                return key
        raise LookupError(f"the issuer has no key {identifier!r}")


def _keys(jwks: Path) -> list[dict[str, Any]]:
    try:
        return [dict(key) for key in json.loads(jwks.read_bytes())["keys"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{jwks} is not a JWKS: a JSON object with a list of keys") from None


def _refusal(error: str, description: str) -> errors.HubError:
    return errors.HubError(400, description, body={"error": error, "error_description": description})
