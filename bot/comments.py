"""Commands that people write as comments on GitHub: `/moerge preview` and `/moerge build recipes/x.yaml`.

Anyone can comment. A comment is a command only where all of it follows the grammar below, and it is obeyed only for someone
who may write to the repository, as GitHub says; anything else is passed over without an answer, so that nobody can have the
bot talk. What is built is the default branch's recipe, never a pull request's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bot.events import Event
from cards.markdown import code

if TYPE_CHECKING:
    from bot.github.client import GitHub

PREVIEW, BUILD = "preview", "build"
MAX_PATHS = 20
# A recipe's path: no glob, no list, nothing that leaves the repository.
_PATH = r"(?![/.-])(?:[\w.+@-]+/)*[\w.+@-]+\.ya?ml"
_GRAMMAR = re.compile(rf"/moerge (?:(?P<preview>preview)|build(?P<paths>(?: {_PATH}){{1,{MAX_PATHS}}}))")
SEEN, CONFUSED = "eyes", "confused"


@dataclass(frozen=True)
class Command:
    """What a comment asks for: a preview of its pull request, or builds of `paths`."""

    kind: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A comment that is a command: by whom, under which issue or pull request, and its own id."""

    command: Command
    login: str
    number: int
    comment: int
    on_pull_request: bool


def parse_command(body: str) -> Command | None:
    """The command that a comment is, all of it; None where it is none."""
    found = _GRAMMAR.fullmatch(body.strip())
    if found is None:
        return None
    if found["preview"]:
        return Command(PREVIEW)
    paths = tuple(dict.fromkeys(found["paths"].split()))
    return None if any(".." in path.split("/") for path in paths) else Command(BUILD, paths)


def asked(event: Event) -> Asked | None:
    """The command in the payload of `issue_comment`; None where there is none, or a bot or nobody in particular wrote it."""
    comment, issue = event.payload.get("comment"), event.payload.get("issue")
    if event.name != "issue_comment" or event.payload.get("action") != "created":
        return None
    if not isinstance(comment, dict) or not isinstance(issue, dict) or not isinstance(comment.get("user"), dict):
        return None
    login, body = comment["user"].get("login"), comment.get("body")
    if comment["user"].get("type") != "User" or not isinstance(body, str) or not isinstance(login, str):
        return None
    command = parse_command(body)
    if command is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}", login):
        return None
    return Asked(command, login, int(issue["number"]), int(comment["id"]), isinstance(issue.get("pull_request"), dict))


def obey(given: Asked, github: GitHub) -> bool:
    """Whether the command is to be obeyed; its author sees at once that it was read. Two requests, one for a stranger."""
    if not github.may_write(given.login):
        return False
    github.react(given.comment, SEEN)
    return True


def as_pull_request(event: Event, given: Asked, github: GitHub) -> Event:
    """The event of the pull request that was commented on, as if it had just been pushed to. One request."""
    payload: dict[str, Any] = {"pull_request": github.pull(given.number), "number": given.number}
    return replace(event, name="pull_request_target", payload=event.payload | payload)


def refuse(given: Asked, github: GitHub, sentence: str) -> None:
    """Say why a command cannot be followed. Two requests."""
    github.react(given.comment, CONFUSED)
    github.write_comment(given.number, sentence)


def no_such_recipes(missing: list[str], known: list[str]) -> str:
    """The answer to a build of what is no recipe."""
    there = ", ".join(code(path) for path in known[:20])
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return (
        f"{', '.join(code(path) for path in missing)}: no recipe of the default branch. "
        f"{f'There are {there}{more}.' if known else 'There is none.'}"
    )
