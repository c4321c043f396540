"""What every endpoint needs: who asks and what they may, bodies checked against their shapes, pages, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

from pydantic import BaseModel, ValidationError

from demo.github.shown import Shown
from demo.github.state import LEVELS, Account, Issue, Repository, State, Token

DOCS = "https://docs.github.com/rest"
Model = TypeVar("Model", bound=BaseModel)


class Refused(Exception):
    """A request that is not done, with GitHub's status and message."""

    def __init__(self, status: int, message: str, errors: Sequence[Any] = (), headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"message": message, "documentation_url": DOCS, "status": str(status)}
        if errors:
            self.body["errors"] = list(errors)
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Answer:
    """A status, what is shown as JSON (or bytes as they are), and headers."""

    status: int
    value: Any = None
    headers: Mapping[str, str] | None = None


def not_found() -> Refused:
    return Refused(404, "Not Found")


def invalid(message: str, **error: Any) -> Refused:
    return Refused(422, "Validation Failed" if error else message, [error | {"message": message}] if error else ())


@dataclass(frozen=True)
class Call:
    """One request: who asks, for what, and the server's state, whose lock is held."""

    state: State
    shown: Shown
    token: Token | None
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    data: bytes
    parameters: Mapping[str, str]

    @property
    def account(self) -> Account:
        if self.token is None:
            raise Refused(401, "Requires authentication")
        return self.token.account

    @property
    def repository(self) -> Repository:
        """The repository of the path, if whoever asks may see it."""
        found = self.state.repository(f"{self.parameters['owner']}/{self.parameters['repo']}")
        if found is None:
            raise not_found()
        if found.private:
            inside = self.token is not None and self.token.repository == found.full_name
            if not inside and (self.token is None or self.state.role(found, self.token.account) == "none"):
                raise not_found()
        return found

    def need(self, *names: str, level: str = "write") -> Repository:
        """The repository, if whoever asks may do this in it: any of the named permissions is enough. Raises Refused."""
        repository = self.repository
        if level == "read" and not repository.private:
            return repository
        if self.token is None:
            raise Refused(401, "Requires authentication")
        if self.token.permissions is None:
            # A person may comment wherever they can read; the rest takes a role in the repository.
            role = self.state.role(repository, self.token.account)
            enough = "read" if "issues" in names else level
            if LEVELS.index(role) < LEVELS.index(enough):
                raise Refused(403, "Must have write access to the repository.")
            return repository
        has = [self.token.permissions.get(name, "none") for name in names]
        if self.token.repository != repository.full_name or max(map(LEVELS.index, has)) < LEVELS.index(level):
            accepted = "; ".join(f"{name}={level}" for name in names)
            raise Refused(
                403, "Resource not accessible by integration", headers={"X-Accepted-GitHub-Permissions": accepted}
            )
        return repository

    def body(self, model: type[Model]) -> Model:
        """The body, if it is what the API takes here. Raises Refused."""
        try:
            value = json.loads(self.data or b"{}")
        except ValueError:
            raise Refused(400, "Problems parsing JSON") from None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            said = [
                {
                    "resource": model.__name__,
                    "field": ".".join(map(str, one["loc"])),
                    "code": "invalid",
                    "message": one["msg"],
                }
                for one in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            raise Refused(422, "Validation Failed", said) from None

    def given(self, model: type[Model]) -> dict[str, Any]:
        """What the body sets, nothing that it leaves out."""
        return self.body(model).model_dump(exclude_unset=True)

    def one(self, name: str, default: str = "") -> str:
        """A parameter of the query."""
        return self.query.get(name, [default])[-1]

    def number(self, name: str, default: int, most: int) -> int:
        text = self.one(name, str(default))
        return max(1, min(int(text), most)) if text.isdigit() else default

    def issue(self) -> Issue:
        found = self.repository.issues.get(int(self.parameters["number"]))
        if found is None:
            raise not_found()
        return found

    def pull(self) -> Issue:
        found = self.issue()
        if found.head is None:
            raise not_found()
        return found

    def page(self, items: Sequence[Any], show: Callable[[Any], Any], wrap: str | None = None) -> Answer:
        """One page of a list, 30 entries where not asked for more and at most 100, with Link to the others."""
        size, page = self.number("per_page", 30, 100), self.number("page", 1, 1 << 30)
        last = max(1, -(-len(items) // size))
        shown = [show(item) for item in items[(page - 1) * size : page * size]]
        places = {"next": page + 1, "last": last} if page < last else {}
        places |= {"first": 1, "prev": page - 1} if page > 1 else {}
        links = []
        for relation, number in places.items():
            query = urlencode({**self.query, "page": [str(number)], "per_page": [str(size)]}, doseq=True)
            links.append(f'<{self.shown.url}{self.path}?{query}>; rel="{relation}"')
        headers = {"Link": ", ".join(links)} if links else {}
        return Answer(200, {"total_count": len(items), wrap: shown} if wrap else shown, headers)

    def commit(self, name: str) -> str:
        """The id of a commit by its id, a branch or a tag. Raises Refused."""
        git = self.repository.git
        for candidate in (f"refs/heads/{name}", f"refs/tags/{name}", name):
            if found := git.resolve(candidate):
                return found
        raise Refused(422, f"No commit found for SHA: {name}")


def parse_query(text: str) -> dict[str, list[str]]:
    return parse_qs(text, keep_blank_values=True)
