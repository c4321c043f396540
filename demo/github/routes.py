"""Which function answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from demo.github import api_issues as issues
from demo.github import api_repos as repos
from demo.github import api_results as results
from demo.github import graphql
from demo.github.web import Answer, Call

Endpoint = Callable[[Call], Answer]

R = "/repos/{owner}/{repo}"
ROUTES: list[tuple[str, str, Endpoint]] = [
    ("POST", "/graphql", graphql.query),
    ("GET", "/user", repos.user),
    ("GET", "/users/{login}", repos.account),
    ("GET", "/rate_limit", repos.rate_limit),
    ("GET", R, repos.get),
    ("POST", f"{R}/forks", repos.fork),
    ("GET", f"{R}/collaborators/{{login}}/permission", repos.permission),
    ("GET", f"{R}/branches", repos.branches),
    ("GET", f"{R}/branches/{{branch:path}}", repos.branch),
    ("GET", f"{R}/commits", repos.commits),
    ("GET", f"{R}/commits/{{ref}}/check-runs", results.checks),
    ("GET", f"{R}/commits/{{ref}}/statuses", results.statuses),
    ("GET", f"{R}/commits/{{ref}}/status", results.combined_status),
    ("GET", f"{R}/commits/{{ref:path}}", repos.commit),
    ("GET", f"{R}/compare/{{basehead:path}}", repos.compare),
    ("GET", f"{R}/contents", repos.contents),
    ("GET", f"{R}/contents/{{path:path}}", repos.contents),
    ("PUT", f"{R}/contents/{{path:path}}", repos.write_contents),
    ("GET", f"{R}/git/commits/{{sha}}", repos.git_commit),
    ("GET", f"{R}/git/trees/{{sha:path}}", repos.tree),
    ("GET", f"{R}/git/blobs/{{sha}}", repos.blob),
    ("GET", f"{R}/git/ref/{{ref:path}}", repos.ref),
    ("GET", f"{R}/git/matching-refs/{{ref:path}}", repos.matching_refs),
    ("POST", f"{R}/git/refs", repos.create_ref),
    ("PATCH", f"{R}/git/refs/{{ref:path}}", repos.edit_ref),
    ("DELETE", f"{R}/git/refs/{{ref:path}}", repos.delete_ref),
    ("GET", f"{R}/tags", repos.tags),
    ("POST", f"{R}/git/tags", repos.create_tag),
    ("GET", f"{R}/issues", issues.issues),
    ("POST", f"{R}/issues", issues.create_issue),
    ("GET", f"{R}/issues/comments", issues.all_comments),
    ("GET", f"{R}/issues/comments/{{id:int}}", issues.get_comment),
    ("PATCH", f"{R}/issues/comments/{{id:int}}", issues.edit_comment),
    ("DELETE", f"{R}/issues/comments/{{id:int}}", issues.delete_comment),
    ("GET", f"{R}/issues/comments/{{id:int}}/reactions", issues.reactions),
    ("POST", f"{R}/issues/comments/{{id:int}}/reactions", issues.react),
    ("GET", f"{R}/issues/{{number:int}}", issues.get_issue),
    ("PATCH", f"{R}/issues/{{number:int}}", issues.edit_issue),
    ("GET", f"{R}/issues/{{number:int}}/comments", issues.comments),
    ("POST", f"{R}/issues/{{number:int}}/comments", issues.create_comment),
    ("GET", f"{R}/pulls", issues.pulls),
    ("POST", f"{R}/pulls", issues.create_pull),
    ("GET", f"{R}/pulls/{{number:int}}", issues.get_pull),
    ("PATCH", f"{R}/pulls/{{number:int}}", issues.edit_pull),
    ("GET", f"{R}/pulls/{{number:int}}/files", issues.pull_files),
    ("GET", f"{R}/pulls/{{number:int}}/commits", issues.pull_commits),
    ("PUT", f"{R}/pulls/{{number:int}}/merge", issues.merge),
    ("POST", f"{R}/check-runs", results.create_check),
    ("GET", f"{R}/check-runs/{{id:int}}", results.get_check),
    ("PATCH", f"{R}/check-runs/{{id:int}}", results.edit_check),
    ("GET", f"{R}/check-runs/{{id:int}}/annotations", results.check_annotations),
    ("POST", f"{R}/statuses/{{sha}}", results.create_status),
    ("GET", f"{R}/releases", results.releases),
    ("POST", f"{R}/releases", results.create_release),
    ("GET", f"{R}/releases/latest", results.latest_release),
    ("GET", f"{R}/releases/tags/{{tag:path}}", results.release_by_tag),
    ("GET", f"{R}/releases/assets/{{id:int}}", results.get_asset),
    ("DELETE", f"{R}/releases/assets/{{id:int}}", results.delete_asset),
    ("GET", f"{R}/releases/{{id:int}}", results.get_release),
    ("PATCH", f"{R}/releases/{{id:int}}", results.edit_release),
    ("DELETE", f"{R}/releases/{{id:int}}", results.delete_release),
    ("GET", f"{R}/releases/{{id:int}}/assets", results.assets),
    ("POST", f"{R}/releases/{{id:int}}/assets", results.upload_asset),
]


def _expression(path: str) -> re.Pattern[str]:
    kinds = {"": r"[^/]+", "int": r"\d+", "path": r".+"}
    parts = re.split(r"\{(\w+)(?::(\w+))?\}", path)
    # Of each hole its name and its kind, between the parts of the path that stand as they are.
    holes = zip(parts[1::3], parts[2::3], strict=True)
    texts = [re.escape(part) for part in parts[0::3]]
    return re.compile(
        "".join([texts[0], *(f"(?P<{n}>{kinds[k or '']}){t}" for (n, k), t in zip(holes, texts[1:], strict=True))])
    )


_TABLE = [(method, _expression(path), endpoint) for method, path, endpoint in ROUTES]


def route(method: str, path: str) -> tuple[Endpoint, dict[str, str]] | None:
    """What answers a request, and the parts of its path by name; None where the API has no such place."""
    for known, expression, endpoint in _TABLE:
        if known == ("GET" if method == "HEAD" else method) and (found := expression.fullmatch(path)):
            return endpoint, {name: unquote(value) for name, value in found.groupdict().items()}
    return None
