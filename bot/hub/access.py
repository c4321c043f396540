"""Who may do what: tokens with rights, kept in the Hub's folder, and short-lived ones that are signed.

A token is written ``NAME:RIGHTS[=SCOPE,…]:TOKEN``. NAME is the user it speaks for. RIGHTS is one of

    admin   everything
    write   read and write in its scope; create and delete repositories in a namespace that is its scope
    read    read what is private or gated in its scope

SCOPE is a list of namespaces (``acme``) and repositories (``acme/model``, ``datasets/acme/texts``), or ``*``; without
one it is the namespace NAME. Anyone, with a token or without, reads what is public.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from bot.hub import errors, names
from bot.hub.names import RepoName
from bot.hub.objects import write_atomically
from bot.hub.repository import Settings
from bot.hub.store import StoreError, create_once

Rights = Literal["admin", "write", "read"]
ADMIN = "admin"
_SHORT_LIVED = "hf_jwt_"
_TOKEN = re.compile(r"[\x21-\x7e]{4,}")


@dataclass(frozen=True)
class Token:
    """One token. `scope` holds namespaces, repositories (as in their page's URL) or ``*``."""

    name: str
    rights: Rights
    scope: tuple[str, ...] = ()
    secret: str = field(default="", repr=False)

    @classmethod
    def of(cls, name: str, rights: str, scope: Iterable[str] | None = None, secret: str = "") -> Token:
        """A token from unchecked words; the scope is the namespace `name` by default. Raises ValueError."""
        if rights not in get_args(Rights):
            raise ValueError(f"the rights of {name!r} are one of {', '.join(get_args(Rights))}, not {rights!r}")
        try:
            names.namespace(name)
            chosen = tuple(_scope(each) for each in ((name,) if scope is None else scope))
        except errors.HubError as error:
            raise ValueError(f"{name!r}: {error.message}") from error
        return cls(name, cast(Rights, rights), chosen, secret)

    def covers(self, repo: RepoName) -> bool:
        """Whether a repository is in the scope."""
        return self.rights == "admin" or any(each in {"*", repo.owner, repo.url_path} for each in self.scope)

    def covers_namespace(self, owner: str) -> bool:
        """Whether a whole namespace is in the scope."""
        return self.rights == "admin" or "*" in self.scope or owner in self.scope


@dataclass(frozen=True)
class Caller:
    """Whoever sends a request: a token, or nobody."""

    token: Token | None = None

    @property
    def name(self) -> str:
        """The user's name, as commits record it."""
        return self.token.name if self.token else "anonymous"

    def sees(self, repo: RepoName, settings: Settings) -> bool:
        """Whether the repository exists, as far as this caller may know."""
        return not settings.private or (self.token is not None and self.token.covers(repo))

    def check_read(self, repo: RepoName, settings: Settings) -> None:
        """Raises HubError(404) unless the caller may see the repository."""
        if not self.sees(repo, settings):
            raise errors.repo_not_found()

    def check_download(self, repo: RepoName, settings: Settings) -> None:
        """Raises HubError(404), or (401, 403) where the repository is gated and the caller was not let in."""
        self.check_read(repo, settings)
        if settings.gated and not (self.token is not None and self.token.covers(repo)):
            raise errors.gated(repo.id, known=self.token is not None)

    def check_write(self, repo: RepoName, settings: Settings) -> None:
        """Raises HubError(404, 401 or 403) unless the caller may commit to the repository."""
        self.check_read(repo, settings)
        self._check(self.token is not None and self.token.covers(repo), repo.id)

    def check_namespace(self, owner: str) -> None:
        """Raises HubError(401, 403) unless the caller may create, delete and collect things under `owner`."""
        self._check(self.token is not None and self.token.covers_namespace(owner), owner)

    def _check(self, covered: bool, what: str) -> None:
        if self.token is None:
            raise errors.login_needed()
        if not covered or self.token.rights == "read":
            raise errors.forbidden(f"You don't have the required permissions to write to {what} with this token")


class Registry:
    """The tokens that a Hub knows: those in ``tokens.json``, those given for this run, and those it signed."""

    def __init__(self, root: Path, secret: bytes, extra: Iterable[Token] = ()) -> None:
        self.path = root / "tokens.json"
        self._secret = secret
        self._extra = tuple(extra)
        first = Token("admin", "admin", ("admin",), f"hf_{secrets.token_hex(17)}")
        create_once(self.path, _encode([first]), mode=0o600)
        try:
            self.tokens  # noqa: B018 - read once now, so that a mistake in the file is found at the start
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} is not a list of tokens: {error!r}") from error

    @property
    def tokens(self) -> list[Token]:
        """All lasting tokens; the file is read each time, so that an edit counts at once."""
        listed = json.loads(self.path.read_bytes())["tokens"]
        return [*self._extra, *(_token(each["name"], each["rights"], each["scope"], each["token"]) for each in listed)]

    def admin(self) -> Token:
        """The first token with every right. Raises LookupError where there is none."""
        for token in self.tokens:
            if token.rights == ADMIN:
                return token
        raise LookupError(f"{self.path} holds no token with admin rights")

    def add(self, token: Token) -> None:
        """Keep another token in the file."""
        write_atomically(self.path, _encode([*self.tokens[len(self._extra) :], token]), mode=0o600)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this ``Authorization`` header. Raises HubError(401) for a token nobody was given."""
        if authorization is None:
            return Caller()
        scheme, _, value = authorization.partition(" ")
        value = value.strip()
        if scheme.lower() != "bearer" or not value:
            raise errors.bad_credentials()
        if value.startswith(_SHORT_LIVED):
            return Caller(self._signed(value))
        for token in self.tokens:
            if hmac.compare_digest(token.secret.encode(), value.encode("utf-8", "surrogateescape")):
                return Caller(token)
        raise errors.bad_credentials()

    def mint(self, token: Token, seconds: int) -> str:
        """A signed token of these rights that ends by itself."""
        claims = {"name": token.name, "rights": token.rights, "scope": token.scope, "exp": int(time.time()) + seconds}
        body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        return f"{_SHORT_LIVED}{body}.{self._signature(body)}"

    def _signed(self, value: str) -> Token:
        body, _, signature = value.removeprefix(_SHORT_LIVED).partition(".")
        if not hmac.compare_digest(signature.encode("utf-8", "surrogateescape"), self._signature(body).encode()):
            raise errors.bad_credentials()
        try:
            claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (ValueError, binascii.Error):
            raise errors.bad_credentials() from None
        if claims["exp"] < time.time():
            raise errors.bad_credentials()
        return Token(claims["name"], claims["rights"], tuple(claims["scope"]))

    def _signature(self, body: str) -> str:
        return hmac.new(self._secret, b"token:" + body.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def parse(text: str) -> Token:
    """A token from ``NAME:RIGHTS[=SCOPE,…]:TOKEN``. Raises ValueError with a sentence."""
    parts = text.split(":", 2)
    if len(parts) != 3:
        raise ValueError("a token is written NAME:RIGHTS[=SCOPE,...]:TOKEN, for example acme:write:hf_secret")
    name, rights, secret = parts
    rights, equals, scope = rights.partition("=")
    return _token(name, rights, scope.split(",") if equals else None, secret)


def _token(name: str, rights: str, scope: Iterable[str] | None, secret: str) -> Token:
    if not _TOKEN.fullmatch(secret) or secret.startswith(_SHORT_LIVED):
        raise ValueError(f"the token of {name!r} needs four or more visible characters, and no prefix {_SHORT_LIVED}")
    return Token.of(name, rights, scope, secret)


def _scope(value: str) -> str:
    if value == "*":
        return value
    *prefix, last = value.split("/")
    if not prefix:
        return names.namespace(last)
    kind = prefix.pop(0).removesuffix("s") if len(prefix) == 2 else "model"
    return names.repo(kind, "/".join(prefix), last).url_path


def _encode(tokens: Iterable[Token]) -> bytes:
    listed = [{"name": t.name, "rights": t.rights, "scope": list(t.scope), "token": t.secret} for t in tokens]
    return json.dumps({"tokens": listed}, indent=2).encode() + b"\n"
