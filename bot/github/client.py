"""One repository on GitHub, through PyGithub: nothing here knows of recipes.

Every method makes as few requests as there can be and says in its docstring how many. Trouble becomes a `GitHubError`, one
sentence; what can be waited out (a rate limit of a minute, a server error) is waited out by PyGithub.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from merge.errors import MoergeError

if TYPE_CHECKING:
    from github.Repository import Repository

API = "https://api.github.com"
# Longer than this no job should sleep: a limit that ends later is an error that says when.
MAX_WAIT = 90
TIMEOUT = 30
# Blobs in one GraphQL query: GitHub answers within ten seconds or not at all.
BLOBS, BLOB_BYTES = 100, 4 << 20
# Files that are asked for one by one, because they are not the text that they should be.
NOT_TEXT = 50
ANNOTATIONS = 50


class GitHubError(MoergeError):
    """GitHub did not do what was asked: no right, no such thing, a limit, or no answer. `status` is HTTP's, 0 for none."""

    exit_code = 4

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """An entry of a tree, its path from the repository's top; `size` in bytes is of files only."""

    path: str
    mode: str
    kind: str
    oid: str
    size: int


@dataclass(frozen=True)
class Comment:
    """A comment of our own."""

    id: int
    body: str


class GitHub:
    """The repository `name` (owner/name), asked with `token`. Of one thread: `another` makes the same for another one."""

    def __init__(self, name: str, token: str, api: str = API) -> None:
        from github import Auth, Github, GithubRetry

        # The library logs what it waits for on its own; people read our sentences.
        logging.getLogger("github").setLevel(logging.ERROR)
        self.name = name
        self.another: Callable[[], GitHub] = partial(GitHub, name, token, api)
        self.client = Github(
            auth=Auth.Token(token),
            base_url=api.rstrip("/"),
            timeout=TIMEOUT,
            retry=GithubRetry(total=4, backoff_factor=0.5, max_rate_limit_wait=MAX_WAIT),
            # A job makes a dozen requests: GitHub's advice to wait between writes is for those who make many.
            seconds_between_requests=0,
            seconds_between_writes=0,
            per_page=100,
            lazy=True,
        )

    @property
    def repository(self) -> Repository:
        """PyGithub's own object; no request is made for it."""
        return self.client.get_repo(self.name)

    # --------------------------------------------------------------------------------------------------------- git's data

    def merge_base(self, base: str, head: str) -> str | None:
        """The commit where two commits' histories parted; None where one is not there. One request."""
        with readable(f"comparison of {base[:9]} and {head[:9]}"):
            try:
                found = self._get(f"/compare/{base}...{head}", {"per_page": "1"})
            except GitHubError as error:
                if error.status == 404:
                    return None
                raise
        sha: str = found["merge_base_commit"]["sha"]
        return sha

    def commit(self, ref: str) -> str | None:
        """The id of a branch's or tag's commit (`heads/main`, `tags/v1`); None where there is none. One request."""
        try:
            found = self._get(f"/git/ref/{ref}", {})
        except GitHubError as error:
            if error.status in (404, 409):
                return None
            raise
        sha: str = found["object"]["sha"]
        return sha

    def tree(self, oid: str, *, recursive: bool = True) -> tuple[list[TreeEntry], bool] | None:
        """The entries of a commit's or tree's tree, and whether they are all (GitHub cuts off after 100,000). None where
        there is no such object. One request."""
        try:
            found = self._get(f"/git/trees/{oid}", {"recursive": "1"} if recursive else {})
        except GitHubError as error:
            if error.status in (404, 409, 422):
                return None
            raise
        entries = [
            TreeEntry(entry["path"], entry["mode"], entry["type"], entry["sha"], entry.get("size", 0))
            for entry in found["tree"]
        ]
        return entries, not found["truncated"]

    def blobs(self, sizes: Mapping[str, int], limit: int) -> dict[str, bytes]:
        """The first `limit` bytes of files by their ids, given their sizes. One GraphQL query for a hundred of them.

        GraphQL gives text, at most half a megabyte of it; what is whole and does not hash to its id (another encoding) is
        asked for by REST, one by one.
        """
        found: dict[str, bytes] = {}
        others = 0
        for batch in _batches(sizes):
            for oid, raw in self._texts(batch).items():
                if raw is None or (sizes[oid] <= limit and not _is_blob(raw, oid)):
                    others += 1
                    if others > NOT_TEXT:
                        raise GitHubError(
                            f"{self.name}: more than {NOT_TEXT} files that should be YAML are not UTF-8 text"
                        )
                    raw = self._blob(oid)
                found[oid] = raw[:limit]
        return found

    def _texts(self, oids: Sequence[str]) -> dict[str, bytes | None]:
        fields = "".join(f' b{n}: object(oid: "{_hex(oid)}") {{ ...on Blob {{ text }} }}' for n, oid in enumerate(oids))
        query = f"query($owner: String!, $name: String!) {{ repository(owner: $owner, name: $name) {{{fields} }} }}"
        data = self._graphql(query, {})["repository"]
        texts = [(data.get(f"b{number}") or {}).get("text") for number in range(len(oids))]
        return {
            oid: text.encode("utf-8", "surrogatepass") if text is not None else None
            for oid, text in zip(oids, texts, strict=True)
        }

    def _blob(self, oid: str) -> bytes:
        raw = base64.b64decode(self._get(f"/git/blobs/{oid}", {})["content"])
        if not _is_blob(raw, oid):
            raise GitHubError(f"GitHub sent other bytes than those of file {oid[:9]}; run the job again")
        return raw

    # ------------------------------------------------------------------------------------------------- comments and checks

    def own_comment(self, number: int, marker: str) -> Comment | None:
        """Our own comment with `marker` on an issue or pull request, the first. One query for each hundred comments.

        Ours is what this very token's author wrote: a marker alone, anyone can copy.
        """
        query = """query($owner: String!, $name: String!, $number: Int!, $after: String) {
          repository(owner: $owner, name: $name) { pullRequest(number: $number) { comments(first: 100, after: $after) {
            nodes { databaseId body viewerDidAuthor } pageInfo { hasNextPage endCursor } } } } }"""
        after = None
        while True:
            found = self._graphql(query, {"number": number, "after": after})
            page = found["repository"]["pullRequest"]["comments"]
            for node in page["nodes"]:
                if node["viewerDidAuthor"] and marker in node["body"]:
                    return Comment(node["databaseId"], node["body"])
            if not page["pageInfo"]["hasNextPage"]:
                return None
            after = page["pageInfo"]["endCursor"]

    def write_comment(self, number: int, body: str) -> None:
        """A new comment on an issue or pull request. One request."""
        self._request("POST", f"/issues/{number}/comments", {"body": body})

    def edit_comment(self, comment: Comment, body: str) -> None:
        """Replace a comment's text, if it is another. One request at most."""
        if comment.body != body:
            self._request("PATCH", f"/issues/comments/{comment.id}", {"body": body})

    def check_run(
        self, name: str, head: str, conclusion: str, title: str, summary: str, annotations: Sequence[dict[str, Any]]
    ) -> None:
        """A completed check run on a commit. One request, and one more for each further fifty annotations."""
        output = {"title": title, "summary": summary}
        first = output | {"annotations": list(annotations[:ANNOTATIONS])}
        # Its conclusion comes with the last annotations: a run that is completed must not change any more.
        done = {"status": "completed", "conclusion": conclusion}
        later = range(ANNOTATIONS, len(annotations), ANNOTATIONS)
        state = {"status": "in_progress"} if later else done
        made = self._request("POST", "/check-runs", {"name": name, "head_sha": head, "output": first} | state)
        for start in later:
            more = output | {"annotations": list(annotations[start : start + ANNOTATIONS])}
            last = start + ANNOTATIONS >= len(annotations)
            self._request("PATCH", f"/check-runs/{made['id']}", {"output": more} | (done if last else {}))

    def status(self, commit: str, state: str, description: str, context: str, url: str | None = None) -> None:
        """A commit's status: error, failure, pending or success. One request."""
        body = {"state": state, "description": description[:140], "context": context}
        self._request("POST", f"/statuses/{commit}", body | ({"target_url": url} if url else {}))

    def may_write(self, login: str) -> bool:
        """Whether a person may push to the repository. One request."""
        try:
            return self._get(f"/collaborators/{login}/permission", {})["permission"] in ("admin", "write")
        except GitHubError as error:
            if error.status == 404:
                return False
            raise

    def react(self, comment: int, reaction: str) -> None:
        """A reaction of ours to a comment, such as `eyes`. One request."""
        self._request("POST", f"/issues/comments/{comment}/reactions", {"content": reaction})

    def pull(self, number: int) -> dict[str, Any]:
        """A pull request, as events have it. One request."""
        found: dict[str, Any] = self._get(f"/pulls/{number}", {})
        return found

    def release(self, body: Mapping[str, Any], marker: str) -> str:
        """Make the release of a tag, or edit the one that is there if its text has `marker`; someone else's stays as it is.
        Returns its address. Two requests."""
        try:
            there = self._get(f"/releases/tags/{body['tag_name']}", {})
        except GitHubError as error:
            if error.status != 404:
                raise
            return str(self._request("POST", "/releases", dict(body))["html_url"])
        if marker in (there.get("body") or "") and there["body"] != body["body"]:
            kept = {key: body[key] for key in ("tag_name", "name", "body")}
            self._request("PATCH", f"/releases/{there['id']}", kept)
        return str(there["html_url"])

    # ------------------------------------------------------------------------------------------------------------ requests

    def _get(self, path: str, parameters: dict[str, str]) -> Any:
        with readable(f"GET {path}"):
            return self.client.requester.requestJsonAndCheck("GET", f"/repos/{self.name}{path}", parameters)[1]

    def _request(self, verb: str, path: str, body: dict[str, Any]) -> Any:
        with readable(f"{verb} {path}"):
            return self.client.requester.requestJsonAndCheck(verb, f"/repos/{self.name}{path}", input=body)[1]

    def _graphql(self, query: str, variables: dict[str, Any]) -> Any:
        owner, name = self.name.split("/")
        with readable("a GraphQL query"):
            given = {"owner": owner, "name": name} | variables
            return self.client.requester.graphql_query(query, given)[1]["data"]


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn PyGithub's exceptions into one sentence each."""
    import requests
    from github import BadCredentialsException, GithubException, RateLimitExceededException

    try:
        yield
    except BadCredentialsException:
        raise GitHubError("GitHub refused the token; check the input github_token", 401) from None
    except RateLimitExceededException as error:
        raise GitHubError(f"GitHub's rate limit is used up ({_said(error)}); run the job again later", 429) from None
    except GithubException as error:
        if error.status == 403:
            needs = (error.headers or {}).get("x-accepted-github-permissions")
            hint = (
                f"; the job needs permissions {needs}" if needs else "; docs/security.md lists the permissions it needs"
            )
            raise GitHubError(f"the token may not do this on GitHub: {what}{hint}", 403) from None
        raise GitHubError(f"GitHub answered {what} with {error.status}: {_said(error)}", error.status) from None
    except requests.RequestException as error:
        raise GitHubError(f"GitHub cannot be reached ({type(error).__name__}) for {what}") from None


def _said(error: Any) -> str:
    data = error.data
    return str(data.get("message", data) if isinstance(data, dict) else data)[:300]


def _is_blob(raw: bytes, oid: str) -> bool:
    """Whether bytes are the git object of this id, which is a hash of them."""
    hashed = hashlib.sha256 if len(oid) == 64 else hashlib.sha1
    return hashed(b"blob %d\0" % len(raw) + raw).hexdigest() == oid


def _hex(oid: str) -> str:
    int(oid, 16)
    return oid


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    count = 0
    for oid, size in sizes.items():
        if batch and (len(batch) == BLOBS or count + size > BLOB_BYTES):
            yield batch
            batch, count = [], 0
        batch.append(oid)
        count += size
    if batch:
        yield batch
