"""Issues, pull requests, and what is said in them."""

from __future__ import annotations

from collections.abc import Iterator

from demo.github import bodies
from demo.github.git import GitError
from demo.github.state import Comment, Issue, Repository, now
from demo.github.web import Answer, Call, Refused, invalid, not_found

SAYS = ("issues", "pull_requests")


def issues(call: Call) -> Answer:
    repository, state = call.need(*SAYS, level="read"), call.one("state", "open")
    found = [one for one in reversed(repository.issues.values()) if state in ("all", one.state)]
    return call.page(found, lambda issue: call.shown.issue(repository, issue))


def get_issue(call: Call) -> Answer:
    return Answer(200, call.shown.issue(call.need(*SAYS, level="read"), call.issue()))


def create_issue(call: Call) -> Answer:
    repository, wish = call.need("issues"), call.body(bodies.IssueCreate)
    issue = Issue(call.state.new_id(), len(repository.issues) + 1, call.account, wish.title, wish.body or "")
    repository.issues[issue.number] = issue
    return Answer(201, call.shown.issue(repository, issue))


def edit_issue(call: Call) -> Answer:
    repository, issue = call.need(*SAYS), call.issue()
    for name, value in call.given(bodies.IssueEdit).items():
        setattr(issue, name, value)
    issue.updated = now()
    return Answer(200, call.shown.issue(repository, issue))


# ---------------------------------------------------------------------------------------------------------------- comments


def comments(call: Call) -> Answer:
    repository, issue = call.need(*SAYS, level="read"), call.issue()
    found = [one for one in issue.comments if one.updated >= call.one("since")]
    return call.page(found, lambda comment: call.shown.comment(repository, issue, comment))


def all_comments(call: Call) -> Answer:
    repository = call.need(*SAYS, level="read")
    found = [pair for pair in _all(repository) if pair[1].updated >= call.one("since")]
    by = "created" if call.one("sort", "created") == "created" else "updated"
    found.sort(key=lambda pair: getattr(pair[1], by), reverse=call.one("direction", "asc") == "desc")
    return call.page(found, lambda pair: call.shown.comment(repository, *pair))


def create_comment(call: Call) -> Answer:
    repository, issue = call.need(*SAYS), call.issue()
    comment = Comment(call.state.new_id(), call.account, _text(call))
    issue.comments.append(comment)
    issue.updated = now()
    return Answer(201, call.shown.comment(repository, issue, comment))


def get_comment(call: Call) -> Answer:
    return Answer(200, call.shown.comment(call.need(*SAYS, level="read"), *_one(call)))


def edit_comment(call: Call) -> Answer:
    repository = call.need(*SAYS)
    issue, comment = _own(call)
    comment.body, comment.updated = _text(call), now()
    return Answer(200, call.shown.comment(repository, issue, comment))


def delete_comment(call: Call) -> Answer:
    call.need(*SAYS)
    issue, comment = _own(call)
    issue.comments.remove(comment)
    return Answer(204)


def reactions(call: Call) -> Answer:
    call.need(*SAYS, level="read")
    return call.page(_one(call)[1].reactions, lambda one: call.shown.reaction(*one))


def react(call: Call) -> Answer:
    call.need(*SAYS)
    _, comment = _one(call)
    said = (call.body(bodies.ReactionBody).content, call.account)
    known = said in comment.reactions
    if not known:
        comment.reactions.append(said)
    return Answer(200 if known else 201, call.shown.reaction(*said))


def _text(call: Call) -> str:
    body, limit = call.body(bodies.CommentBody).body, call.state.limits.comment_characters
    if len(body) > limit:
        raise invalid(
            f"body is too long (maximum is {limit} characters)", resource="IssueComment", field="body", code="custom"
        )
    return body


def _all(repository: Repository) -> Iterator[tuple[Issue, Comment]]:
    for issue in repository.issues.values():
        for comment in issue.comments:
            yield issue, comment


def _one(call: Call) -> tuple[Issue, Comment]:
    wanted = int(call.parameters["id"])
    for issue, comment in _all(call.repository):
        if comment.id == wanted:
            return issue, comment
    raise not_found()


def _own(call: Call) -> tuple[Issue, Comment]:
    """A comment that whoever asks may change: their own, or any where they may write."""
    issue, comment = _one(call)
    writes = call.token is not None and (
        call.token.permissions is not None or call.state.role(call.repository, call.account) in ("write", "admin")
    )
    if comment.author is not call.account and not writes:
        raise Refused(403, "Must have admin rights to Repository.")
    return issue, comment


# ----------------------------------------------------------------------------------------------------------- pull requests


def pulls(call: Call) -> Answer:
    repository, state = call.need("pull_requests", level="read"), call.one("state", "open")
    found = [one for one in repository.issues.values() if one.head is not None and state in ("all", one.state)]
    if base := call.one("base"):
        found = [one for one in found if one.base == base]
    for one in found:
        call.state.sync(repository, one)
    by = "updated" if call.one("sort") == "updated" else "number"
    found.sort(key=lambda one: getattr(one, by), reverse=call.one("direction", "desc") == "desc")
    return call.page(found, lambda issue: call.shown.pull(repository, issue))


def get_pull(call: Call) -> Answer:
    repository, issue = call.need("pull_requests", level="read"), call.pull()
    git, shown = repository.git, call.shown.pull(repository, issue)
    base, head = shown["base"]["sha"], shown["head"]["sha"]
    parted = git.merge_base(base, head)
    changed = git.diff(parted, head) if parted else []
    more = {"mergeable": _merges(repository, base, head), "changed_files": len(changed), "review_comments": 0}
    return Answer(200, shown | more | {"commits": len(git.log(base, head)), "additions": 0, "deletions": 0})


def create_pull(call: Call) -> Answer:
    repository, wish = call.repository, call.body(bodies.PullCreate)
    owner, _, branch = wish.head.rpartition(":")
    owner = owner or repository.owner.login
    forks = [one for one in call.state.repositories.values() if one.owner.login.lower() == owner.lower()]
    source = next((one for one in forks if repository.full_name in (one.parent, one.full_name)), None)
    if source is None or source.git.resolve(f"refs/heads/{branch}") is None:
        raise invalid("head is invalid", resource="PullRequest", field="head", code="invalid")
    if repository.git.resolve(f"refs/heads/{wish.base}") is None:
        raise invalid("base is invalid", resource="PullRequest", field="base", code="invalid")
    issue = Issue(
        call.state.new_id(), len(repository.issues) + 1, call.account, wish.title, wish.body or "",
        head=(source.full_name, branch), base=wish.base, draft=wish.draft,
    )  # fmt: skip
    repository.issues[issue.number] = issue
    return Answer(201, call.shown.pull(repository, issue))


def edit_pull(call: Call) -> Answer:
    repository, issue = call.need("pull_requests"), call.pull()
    for name, value in call.given(bodies.PullEdit).items():
        setattr(issue, name, value)
    issue.updated = now()
    return Answer(200, call.shown.pull(repository, issue))


def pull_files(call: Call) -> Answer:
    """What a pull request changes: at most 3,000 files, and no word that there are more."""
    repository, issue = call.need("pull_requests", "contents", level="read"), call.pull()
    head, base = call.state.sync(repository, issue)
    parted = repository.git.merge_base(base, head)
    found = repository.git.diff(parted, head)[: call.state.limits.pull_files] if parted else []
    return call.page(found, lambda file: call.shown.file(repository, head, file))


def pull_commits(call: Call) -> Answer:
    repository, issue = call.need("pull_requests", level="read"), call.pull()
    head, base = call.state.sync(repository, issue)
    found = list(reversed(repository.git.log(base, head)))[:250]
    return call.page(found, lambda sha: call.shown.commit(repository, sha))


def merge(call: Call) -> Answer:
    repository, issue, wish = call.need("contents"), call.pull(), call.body(bodies.PullMerge)
    head, base = call.state.sync(repository, issue)
    if issue.state != "open":
        raise Refused(405, "Pull Request is not mergeable")
    if wish.sha is not None and wish.sha != head:
        raise Refused(409, "Head branch was modified. Review and try the merge again.")
    assert issue.head is not None
    title = (
        wish.commit_title or f"Merge pull request #{issue.number} from {issue.head[0].split('/')[0]}/{issue.head[1]}"
    )
    try:
        merged = repository.git.merge(base, head, f"{title}\n\n{wish.commit_message or issue.title}")
    except GitError:
        raise Refused(405, "Pull Request is not mergeable") from None
    repository.git.update(f"refs/heads/{issue.base}", merged)
    issue.merged, issue.state, issue.updated, repository.pushed = merged, "closed", now(), now()
    return Answer(200, {"sha": merged, "merged": True, "message": "Pull Request successfully merged"})


def _merges(repository: Repository, base: str, head: str) -> bool:
    try:
        repository.git.text("merge-tree", "--write-tree", base, head)
    except GitError:
        return False
    return True
