"""GraphQL queries over the same state: the fields the bot asks for, each checked against its type.

The language: one query with variables, arguments, aliases and inline fragments (https://spec.graphql.org/October2021/).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from demo.github import bodies
from demo.github.state import Account, Comment, Issue, Repository
from demo.github.web import Answer, Call, Refused

_TOKEN = re.compile(r'\s*(?:#[^\n]*\n\s*)*(\.\.\.|[{}()\[\]:!$=]|"(?:[^"\\]|\\.)*"|-?\d+|[A-Za-z_]\w*|,)')
MAX_PAGE = 100


class _Bad(Exception):
    """An error of the query, told with status 200 as GraphQL does."""

    def __init__(self, message: str, kind: str | None = None, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.shown = {"message": message} | ({"type": kind, "path": list(path)} if kind else {})


@dataclass
class Field:
    name: str
    alias: str
    arguments: dict[str, Any] = field(default_factory=dict)
    selection: list[Field | Fragment] = field(default_factory=list)


@dataclass
class Fragment:
    kind: str
    selection: list[Field | Fragment]


class _Parser:
    """Reads one query into its fields, variables filled in."""

    def __init__(self, text: str, variables: dict[str, Any]) -> None:
        self.words = [word for word in self._split(text) if word != ","]
        self.place = 0
        self.variables = variables

    def _split(self, text: str) -> Iterator[str]:
        place, end = 0, len(text.rstrip())
        while place < end:
            found = _TOKEN.match(text, place)
            if found is None:
                raise _Bad(f"Parse error on {text[place : place + 20]!r}")
            yield found[1]
            place = found.end()

    def peek(self) -> str:
        return self.words[self.place] if self.place < len(self.words) else ""

    def take(self, wanted: str | None = None) -> str:
        word = self.peek()
        if not word or (wanted is not None and word != wanted):
            raise _Bad(f"Expected {wanted or 'more'}, actual: {word or 'end of the query'}")
        self.place += 1
        return word

    def query(self) -> list[Field | Fragment]:
        if self.peek() != "{":
            self.take("query")
            if self.peek() not in ("(", "{"):
                self.take()
            if self.peek() == "(":
                self._declarations()
        found = self.selection()
        if self.peek():
            raise _Bad(f"Expected the end of the query, actual: {self.peek()}")
        return found

    def _declarations(self) -> None:
        self.take("(")
        while self.peek() != ")":
            self.take("$")
            name = self.take()
            self.take(":")
            required = False
            while self.peek() not in ("$", ")"):
                required = self.take() == "!"
            if required and self.variables.get(name) is None:
                raise _Bad(f"Variable ${name} was provided invalid value")
        self.take(")")

    def selection(self) -> list[Field | Fragment]:
        self.take("{")
        found: list[Field | Fragment] = []
        while self.peek() != "}":
            if self.peek() == "...":
                self.take()
                self.take("on")
                found.append(Fragment(self.take(), self.selection()))
            else:
                found.append(self._field())
        self.take("}")
        return found

    def _field(self) -> Field:
        alias = name = self.take()
        if self.peek() == ":":
            self.take()
            name = self.take()
        one = Field(name, alias)
        if self.peek() == "(":
            self.take()
            while self.peek() != ")":
                key = self.take()
                self.take(":")
                one.arguments[key] = self._value()
            self.take(")")
        if self.peek() == "{":
            one.selection = self.selection()
        return one

    def _value(self) -> Any:
        word = self.take()
        if word == "$":
            name = self.take()
            return self.variables.get(name)
        if word.startswith('"') or re.fullmatch(r"-?\d+", word):
            return json.loads(word)
        return {"true": True, "false": False, "null": None}.get(word, word)


Resolver = Callable[[Call, Any, dict[str, Any]], Any]


def _repository(call: Call, _: Any, given: dict[str, Any]) -> Any:
    inner = Call(**{**vars(call), "parameters": {"owner": given["owner"], "repo": given["name"]}})
    try:
        return _readable(inner)
    except Refused:
        said = f"Could not resolve to a Repository with the name '{given['owner']}/{given['name']}'."
        raise _Bad(said, "NOT_FOUND", ("repository",)) from None


def _readable(call: Call) -> Repository:
    return call.need("contents", "pull_requests", level="read")


def _object(call: Call, repository: Repository, given: dict[str, Any]) -> Any:
    name = given.get("oid") or given.get("expression") or ""
    for kind in ("blob", "commit", "tree"):
        # Of a commit only commit and tree exist, of a tree only the tree: the first that fits is what it is.
        if sha := repository.git.resolve(name, kind):
            return (kind, repository, sha)
    return None


def _pull(call: Call, repository: Repository, given: dict[str, Any]) -> Issue:
    issue = repository.issues.get(given["number"])
    if issue is None or issue.head is None:
        said = f"Could not resolve to a PullRequest with the number of {given['number']}."
        raise _Bad(said, "NOT_FOUND", ("repository", "pullRequest"))
    return issue


def _comments(call: Call, issue: Issue, given: dict[str, Any]) -> Any:
    size = given.get("first") or given.get("last")
    if not size or not 1 <= size <= MAX_PAGE:
        raise _Bad("You must provide a `first` or `last` value between 1 and 100 to properly paginate the connection.")
    start = int(base64.b64decode(given["after"])) if given.get("after") else 0
    comments = issue.comments[start : start + size] if given.get("first") else issue.comments[-size:]
    return {"all": issue.comments, "nodes": comments, "end": start + len(comments)}


def _text(repository: Repository, sha: str) -> str | None:
    data = repository.git.blob(sha)
    return None if b"\0" in data[:8000] else data[:512_000].decode("utf-8", "replace")


def _cursor(page: dict[str, Any]) -> dict[str, Any]:
    more = page["end"] < len(page["all"])
    return {"hasNextPage": more, "endCursor": base64.b64encode(str(page["end"]).encode()).decode()}


def _login(account: Account) -> str:
    """GraphQL's name of a bot has no [bot]."""
    return account.login.removesuffix("[bot]")


# By type, each field: what gives its value, and its type where it is an object (in brackets for a list of them).
TYPES: dict[str, dict[str, tuple[Resolver, str | None]]] = {
    "Query": {
        "repository": (_repository, "Repository"),
        "viewer": (lambda call, _, given: call.account, "User"),
    },
    "User": {"login": (lambda call, account, given: account.login, None)},
    "Actor": {"login": (lambda call, account, given: _login(account), None)},
    "Repository": {
        "nameWithOwner": (lambda call, repository, given: repository.full_name, None),
        "object": (_object, "GitObject"),
        "pullRequest": (_pull, "PullRequest"),
    },
    "GitObject": {
        "oid": (lambda call, what, given: what[2], None),
    },
    "Blob": {
        "oid": (lambda call, what, given: what[2], None),
        "byteSize": (lambda call, what, given: len(what[1].git.blob(what[2])), None),
        "isBinary": (lambda call, what, given: b"\0" in what[1].git.blob(what[2])[:8000], None),
        "isTruncated": (lambda call, what, given: len(what[1].git.blob(what[2])) > 512_000, None),
        "text": (lambda call, what, given: _text(what[1], what[2]), None),
    },
    "PullRequest": {
        "number": (lambda call, issue, given: issue.number, None),
        "title": (lambda call, issue, given: issue.title, None),
        "headRefOid": (
            lambda call, issue, given: issue.head and call.state.sync(_readable_of(call, issue), issue)[0],
            None,
        ),
        "comments": (_comments, "IssueCommentConnection"),
    },
    "IssueCommentConnection": {
        "totalCount": (lambda call, page, given: len(page["all"]), None),
        "nodes": (lambda call, page, given: page["nodes"], "[IssueComment]"),
        "pageInfo": (lambda call, page, given: _cursor(page), "PageInfo"),
    },
    "PageInfo": {
        "hasNextPage": (lambda call, info, given: info["hasNextPage"], None),
        "endCursor": (lambda call, info, given: info["endCursor"], None),
    },
    "IssueComment": {
        "id": (lambda call, comment, given: f"IC_{comment.id}", None),
        "databaseId": (lambda call, comment, given: comment.id, None),
        "body": (lambda call, comment, given: comment.body, None),
        "author": (lambda call, comment, given: comment.author, "Actor"),
        "viewerDidAuthor": (lambda call, comment, given: _is_own(call, comment), None),
    },
}
_ABSTRACT = {"GitObject": {"blob": "Blob"}}


def _is_own(call: Call, comment: Comment) -> bool:
    return comment.author is call.account


def _readable_of(call: Call, issue: Issue) -> Repository:
    return next(one for one in call.state.repositories.values() if one.issues.get(issue.number) is issue)


def query(call: Call) -> Answer:
    """POST /graphql."""
    if call.token is None:
        raise Refused(401, "This endpoint requires you to be authenticated.")
    asked = call.body(bodies.Query)
    try:
        selection = _Parser(asked.query, asked.variables or {}).query()
        return Answer(200, {"data": _resolve(call, "Query", None, selection)})
    except _Bad as bad:
        return Answer(200, {"data": None, "errors": [bad.shown]})


def _resolve(call: Call, kind: str, value: Any, selection: list[Field | Fragment]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for one in selection:
        if isinstance(one, Fragment):
            if _concrete(kind, value) == one.kind:
                shown |= _resolve(call, one.kind, value, one.selection)
            continue
        if one.name == "__typename":
            shown[one.alias] = _concrete(kind, value)
            continue
        if one.name not in TYPES[kind]:
            raise _Bad(f"Field '{one.name}' doesn't exist on type '{kind}'")
        resolver, inner = TYPES[kind][one.name]
        if bool(inner) is not bool(one.selection):
            raise _Bad(f"Field '{one.name}' must {'' if inner else 'not '}have selections")
        found = resolver(call, value, one.arguments)
        if inner is None or found is None:
            shown[one.alias] = found
        elif inner.startswith("["):
            shown[one.alias] = [_resolve(call, inner[1:-1], item, one.selection) for item in found]
        else:
            shown[one.alias] = _resolve(call, inner, found, one.selection)
    return shown


def _concrete(kind: str, value: Any) -> str:
    return _ABSTRACT[kind].get(value[0], kind) if kind in _ABSTRACT else kind
