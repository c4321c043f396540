"""Repositories and their git data: branches, commits, comparisons, trees, blobs, contents, refs, tags."""

from __future__ import annotations

import base64
import time
from typing import Any

from demo.github import bodies
from demo.github.git import Entry, GitError
from demo.github.state import Repository
from demo.github.web import Answer, Call, Refused, invalid, not_found


def user(call: Call) -> Answer:
    account = call.account
    if call.token is not None and call.token.permissions is not None:
        raise Refused(403, "Resource not accessible by integration")
    return Answer(200, call.shown.account(account))


def account(call: Call) -> Answer:
    found = call.state.accounts.get(call.parameters["login"].lower())
    if found is None:
        raise not_found()
    return Answer(200, call.shown.account(found))


def rate_limit(call: Call) -> Answer:
    used, limit = (call.token.used, call.state.limits.requests) if call.token else (0, 60)
    reset = int(call.token.resets if call.token else time.time() + 3600)
    core = {"limit": limit, "used": used, "remaining": max(0, limit - used), "reset": reset}
    return Answer(200, {"resources": {"core": core, "search": core, "graphql": core}, "rate": core})


def get(call: Call) -> Answer:
    return Answer(200, call.shown.repository(call.repository, call.token.account if call.token else None))


def fork(call: Call) -> Answer:
    """A fork has the parent's default branch, and its objects."""
    parent, wish = call.repository, call.body(bodies.ForkCreate)
    owner = wish.organization or call.account.login
    name = f"{owner}/{wish.name or parent.name}"
    made = call.state.repository(name)
    if made is None:
        made = call.state.create(name, branch=parent.branch, private=parent.private, parent=parent.full_name)
        made.git.fetch(parent.git.path, f"refs/heads/{parent.branch}:refs/heads/{parent.branch}")
    return Answer(202, call.shown.repository(made, call.account))


def permission(call: Call) -> Answer:
    """What a person may do in the repository."""
    repository = call.need("metadata", level="read")
    if call.token is None:
        raise Refused(401, "Requires authentication")
    found = call.state.accounts.get(call.parameters["login"].lower())
    if found is None:
        raise not_found()
    role = call.state.role(repository, found)
    return Answer(200, {"permission": role, "role_name": role, "user": call.shown.account(found)})


def branches(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    found = sorted(repository.git.refs("refs/heads/").items())
    return call.page(found, lambda ref: call.shown.branch(repository, ref[0].removeprefix("refs/heads/"), ref[1][0]))


def branch(call: Call) -> Answer:
    repository, name = call.need("contents", level="read"), call.parameters["branch"]
    sha = repository.git.resolve(f"refs/heads/{name}")
    if sha is None:
        raise Refused(404, "Branch not found")
    return Answer(200, call.shown.branch(repository, name, sha))


def commits(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    found = repository.git.log(None, call.commit(call.one("sha", repository.branch)))
    return call.page(found, lambda sha: call.shown.commit(repository, sha))


def commit(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    sha = call.commit(call.parameters["ref"])
    parents = repository.git.commit(sha)["parents"]
    files = repository.git.diff(parents[0], sha) if parents else []
    shown = [call.shown.file(repository, sha, file) for file in files[:3000]]
    return Answer(200, call.shown.commit(repository, sha) | {"files": shown, "stats": {}})


def git_commit(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    sha = repository.git.resolve(call.parameters["sha"])
    if sha is None:
        raise not_found()
    shown = call.shown.commit(repository, sha)
    return Answer(200, shown["commit"] | {"sha": sha, "parents": shown["parents"], "url": shown["commit"]["url"]})


def compare(call: Call) -> Answer:
    """Two commits, branches, or `owner:branch` of a fork, with at most 300 files whatever the page."""
    repository = call.need("contents", level="read")
    first, dots, second = call.parameters["basehead"].partition("...")
    if not dots:
        raise not_found()
    base, head = _end(call, repository, first), _end(call, repository, second)
    parted = repository.git.merge_base(base, head)
    if parted is None:
        raise Refused(404, f"No common ancestor between {first} and {second}.")
    ahead, behind = repository.git.log(parted, head), repository.git.log(parted, base)
    states = {(False, False): "identical", (True, False): "ahead", (False, True): "behind", (True, True): "diverged"}
    page = call.page(list(reversed(ahead)), lambda sha: call.shown.commit(repository, sha))
    files = (
        repository.git.diff(parted, head)[: call.state.limits.compared_files] if call.one("page", "1") == "1" else []
    )
    shown: dict[str, Any] = {
        "status": states[bool(ahead), bool(behind)],
        "ahead_by": len(ahead),
        "behind_by": len(behind),
        "total_commits": len(ahead),
        "base_commit": call.shown.commit(repository, base),
        "merge_base_commit": call.shown.commit(repository, parted),
        "commits": page.value,
        "files": [call.shown.file(repository, head, file) for file in files],
        "url": f"{call.shown.url}{call.path}",
    }
    return Answer(200, shown, page.headers)


def _end(call: Call, repository: Repository, name: str) -> str:
    owner, colon, branch = name.partition(":")
    if colon:
        forks = [one for one in call.state.repositories.values() if one.owner.login.lower() == owner.lower()]
        of_network = [one for one in forks if repository.full_name in (one.parent, one.full_name)]
        for other in of_network:
            if sha := other.git.resolve(f"refs/heads/{branch}"):
                repository.git.run("fetch", "--quiet", "--no-tags", str(other.git.path), sha)
                return sha
        raise not_found()
    found = repository.git.resolve(f"refs/heads/{name}") or repository.git.resolve(name)
    if found is None:
        raise not_found()
    return found


def tree(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    sha = repository.git.resolve(call.parameters["sha"], "tree")
    if sha is None:
        raise not_found()
    # Any value asks for it, also 0 and false.
    entries = repository.git.tree(sha, recursive="recursive" in call.query)
    limit = call.state.limits.tree_entries
    return Answer(
        200,
        {
            "sha": sha,
            "url": f"{call.shown.url}{call.path}",
            "tree": [_entry(call, repository, entry) for entry in entries[:limit]],
            "truncated": len(entries) > limit,
        },
    )


def _entry(call: Call, repository: Repository, entry: Entry) -> dict[str, Any]:
    url = f"{call.shown.url}/repos/{repository.full_name}/git/{entry.kind}s/{entry.sha}"
    shown = {"path": entry.path, "mode": entry.mode, "type": entry.kind, "sha": entry.sha, "url": url}
    return shown | ({"size": entry.size} if entry.size is not None else {})


def blob(call: Call) -> Answer:
    repository, sha = call.need("contents", level="read"), call.parameters["sha"]
    if repository.git.resolve(sha, "blob") is None:
        raise not_found()
    data = repository.git.blob(sha)
    if "raw" in call.headers.get("accept", ""):
        return Answer(200, data, {"Content-Type": "application/vnd.github.raw"})
    content = base64.encodebytes(data).decode()
    return Answer(
        200,
        {"sha": sha, "node_id": f"B_{sha[:12]}", "size": len(data), "url": f"{call.shown.url}{call.path}",
         "content": content, "encoding": "base64"},
    )  # fmt: skip


def contents(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    path = call.parameters["path"].strip("/")
    ref = call.one("ref", repository.branch)
    sha = call.commit(ref)
    entries = {entry.path: entry for entry in repository.git.tree(sha, recursive=True)}
    below = [entry for entry in entries.values() if entry.path.rpartition("/")[0] == path]
    found = entries.get(path)
    if found is None and path:
        raise not_found()
    if found is None or found.kind == "tree":
        return Answer(200, [_content(call, repository, ref, entry) for entry in below])
    data = repository.git.blob(found.sha)
    if "raw" in call.headers.get("accept", ""):
        return Answer(200, data, {"Content-Type": "application/vnd.github.raw"})
    shown = _content(call, repository, ref, found)
    if len(data) > 1 << 20:
        return Answer(200, shown | {"content": "", "encoding": "none"})
    return Answer(200, shown | {"content": base64.encodebytes(data).decode(), "encoding": "base64"})


def _content(call: Call, repository: Repository, ref: str, entry: Entry) -> dict[str, Any]:
    api = f"{call.shown.url}/repos/{repository.full_name}"
    return {
        "type": {"tree": "dir", "commit": "submodule"}.get(entry.kind, "file"),
        "name": entry.path.rpartition("/")[2],
        "path": entry.path,
        "sha": entry.sha,
        "size": entry.size or 0,
        "url": f"{api}/contents/{entry.path}?ref={ref}",
        "git_url": f"{api}/git/{entry.kind}s/{entry.sha}",
        "html_url": f"{call.shown.url}/{repository.full_name}/blob/{ref}/{entry.path}",
        "download_url": f"{call.shown.url}/{repository.full_name}/raw/{ref}/{entry.path}",
    }


def write_contents(call: Call) -> Answer:
    """One file in one commit on a branch."""
    repository, wish = call.need("contents"), call.body(bodies.FileWrite)
    git, path, name = repository.git, call.parameters["path"], wish.branch or repository.branch
    ref = f"refs/heads/{name}"
    tip = git.resolve(ref)
    if tip is None and git.refs("refs/heads/"):
        raise Refused(404, f"Branch {name} not found")
    old = git.resolve(f"{tip}:{path}", "blob") if tip else None
    if old is not None and wish.sha is None:
        raise invalid('Invalid request.\n\n"sha" wasn\'t supplied.')
    if old != wish.sha:
        raise Refused(409, f"{path} does not match {wish.sha}")
    try:
        data = base64.b64decode(wish.content, validate=False)
    except ValueError:
        raise invalid("content is not valid Base64") from None
    sha = git.run("hash-object", "-w", "--stdin", data=data).decode().strip()
    tree_sha = _with_file(repository, tip, path, sha)
    made = git.text("commit-tree", tree_sha, *(["-p", tip] if tip else []), "-m", wish.message)
    git.update(ref, made)
    entry = next(one for one in git.tree(made, recursive=True) if one.path == path)
    shown = {"content": _content(call, repository, name, entry), "commit": call.shown.commit(repository, made)}
    return Answer(200 if old else 201, shown)


def _with_file(repository: Repository, tip: str | None, path: str, sha: str) -> str:
    """The tree of a commit with one file put in, by way of its folders."""
    folder, _, rest = path.partition("/")
    here = {entry.path: entry for entry in repository.git.tree(tip, recursive=False)} if tip else {}
    if rest:
        below = here.get(folder)
        inner = below.sha if below is not None and below.kind == "tree" else None
        here[folder] = Entry(folder, "040000", "tree", _with_file(repository, inner, rest, sha), None)
    else:
        here[folder] = Entry(folder, "100644", "blob", sha, None)
    lines = b"".join(f"{one.mode} {one.kind} {one.sha}\t{one.path}\0".encode() for one in here.values())
    return repository.git.run("mktree", "-z", data=lines).decode().strip()


def ref(call: Call) -> Answer:
    repository, name = call.need("contents", level="read"), f"refs/{call.parameters['ref']}"
    found = repository.git.refs(name).get(name)
    if found is None:
        raise not_found()
    return Answer(200, call.shown.ref(repository, name, *found))


def matching_refs(call: Call) -> Answer:
    repository, prefix = call.need("contents", level="read"), f"refs/{call.parameters['ref']}"
    found = [(name, *what) for name, what in repository.git.refs("refs/").items() if name.startswith(prefix)]
    return call.page(found, lambda one: call.shown.ref(repository, *one))


def create_ref(call: Call) -> Answer:
    repository, wish = call.need("contents"), call.body(bodies.RefCreate)
    if repository.git.refs(wish.ref).get(wish.ref):
        raise invalid("Reference already exists")
    if repository.git.resolve(wish.sha, "object") is None:
        raise invalid("Object does not exist")
    repository.git.update(wish.ref, wish.sha)
    return Answer(201, call.shown.ref(repository, wish.ref, *repository.git.refs(wish.ref)[wish.ref]))


def edit_ref(call: Call) -> Answer:
    repository, wish = call.need("contents"), call.body(bodies.RefEdit)
    name = f"refs/{call.parameters['ref']}"
    old = repository.git.refs(name).get(name)
    if old is None or repository.git.resolve(wish.sha, "object") is None:
        raise invalid("Reference does not exist" if old is None else "Object does not exist")
    if not wish.force and repository.git.merge_base(old[0], wish.sha) != old[0]:
        raise invalid("Update is not a fast forward")
    repository.git.update(name, wish.sha)
    return Answer(200, call.shown.ref(repository, name, *repository.git.refs(name)[name]))


def delete_ref(call: Call) -> Answer:
    repository, name = call.need("contents"), f"refs/{call.parameters['ref']}"
    if name not in repository.git.refs(name):
        raise invalid("Reference does not exist")
    repository.git.update(name, None)
    return Answer(204)


def tags(call: Call) -> Answer:
    repository = call.need("contents", level="read")

    def shown(name: str) -> dict[str, Any]:
        short, sha = name.removeprefix("refs/tags/"), repository.git.resolve(name)
        url = f"{call.shown.url}/repos/{repository.full_name}/commits/{sha}"
        return {"name": short, "commit": {"sha": sha, "url": url}, "node_id": f"TAG_{short}"}

    return call.page(sorted(repository.git.refs("refs/tags/"), reverse=True), shown)


def create_tag(call: Call) -> Answer:
    """An annotated tag as an object; a ref is made by another request."""
    repository, wish = call.need("contents"), call.body(bodies.TagCreate)
    tagger = "GitHub <noreply@github.com>"
    if wish.tagger:
        tagger = f"{wish.tagger['name']} <{wish.tagger['email']}>"
    text = f"object {wish.object}\ntype {wish.type}\ntag {wish.tag}\ntagger {tagger} {int(time.time())} +0000\n\n{wish.message}\n"
    try:
        sha = repository.git.run("mktag", data=text.encode()).decode().strip()
    except GitError as error:
        raise invalid(str(error)) from None
    return Answer(
        201,
        {"sha": sha, "tag": wish.tag, "message": wish.message, "object": {"sha": wish.object, "type": wish.type},
         "url": f"{call.shown.url}/repos/{repository.full_name}/git/tags/{sha}"},
    )  # fmt: skip
