"""What the server knows, as the API shows it: the fields that clients and workflows read."""

from __future__ import annotations

from typing import Any

from demo.github.state import Account, Check, Comment, Issue, Release, Repository, State


class Shown:
    """Objects as JSON, with addresses below `url`, the server's own."""

    def __init__(self, state: State, url: str) -> None:
        self.state = state
        self.url = url

    def _api(self, repository: Repository, path: str = "") -> str:
        return f"{self.url}/repos/{repository.full_name}{path}"

    def _html(self, repository: Repository, path: str = "") -> str:
        return f"{self.url}/{repository.full_name}{path}"

    def account(self, account: Account) -> dict[str, Any]:
        return {
            "login": account.login,
            "id": account.id,
            "node_id": f"U_{account.id}",
            "type": account.kind,
            "url": f"{self.url}/users/{account.login}",
            "html_url": f"{self.url}/{account.login}",
            "site_admin": False,
        }

    def repository(self, repository: Repository, viewer: Account | None = None) -> dict[str, Any]:
        role = self.state.role(repository, viewer) if viewer else "read"
        rank = ("none", "read", "write", "admin").index(role)
        return {
            "id": repository.id,
            "node_id": f"R_{repository.id}",
            "name": repository.name,
            "full_name": repository.full_name,
            "owner": self.account(repository.owner),
            "private": repository.private,
            "visibility": "private" if repository.private else "public",
            "fork": repository.parent is not None,
            "default_branch": repository.branch,
            "description": None,
            "archived": False,
            "disabled": False,
            "pushed_at": repository.pushed,
            "url": self._api(repository),
            "html_url": self._html(repository),
            "clone_url": str(repository.git.path),
            "git_url": str(repository.git.path),
            "ssh_url": str(repository.git.path),
            "permissions": {"admin": rank >= 3, "push": rank >= 2, "pull": rank >= 1},
        }

    def branch(self, repository: Repository, name: str, sha: str) -> dict[str, Any]:
        return {"name": name, "commit": self.commit(repository, sha), "protected": name == repository.branch}

    def ref(self, repository: Repository, name: str, sha: str, kind: str) -> dict[str, Any]:
        return {
            "ref": name,
            "node_id": f"REF_{sha[:8]}",
            "url": self._api(repository, f"/git/{name}"),
            "object": {"sha": sha, "type": kind, "url": self._api(repository, f"/git/{kind}s/{sha}")},
        }

    def commit(self, repository: Repository, sha: str) -> dict[str, Any]:
        facts = repository.git.commit(sha)
        person = {"name": facts["name"], "email": facts["email"]}
        return {
            "sha": sha,
            "node_id": f"C_{sha[:12]}",
            "url": self._api(repository, f"/commits/{sha}"),
            "html_url": self._html(repository, f"/commit/{sha}"),
            "author": None,
            "committer": None,
            "commit": {
                "message": facts["message"],
                "author": person | {"date": facts["date"]},
                "committer": person | {"date": facts["committed"]},
                "tree": {"sha": facts["tree"], "url": self._api(repository, f"/git/trees/{facts['tree']}")},
                "url": self._api(repository, f"/git/commits/{sha}"),
            },
            "parents": [
                {"sha": parent, "url": self._api(repository, f"/commits/{parent}")} for parent in facts["parents"]
            ],
        }

    def file(self, repository: Repository, head: str, file: dict[str, Any]) -> dict[str, Any]:
        return file | {
            "additions": 0,
            "deletions": 0,
            "changes": 0,
            "blob_url": self._html(repository, f"/blob/{head}/{file['filename']}"),
            "raw_url": self._html(repository, f"/raw/{head}/{file['filename']}"),
            "contents_url": self._api(repository, f"/contents/{file['filename']}?ref={head}"),
        }

    def comment(self, repository: Repository, issue: Issue, comment: Comment) -> dict[str, Any]:
        return {
            "id": comment.id,
            "node_id": f"IC_{comment.id}",
            "url": self._api(repository, f"/issues/comments/{comment.id}"),
            "html_url": self._html(repository, f"/pull/{issue.number}#issuecomment-{comment.id}"),
            "issue_url": self._api(repository, f"/issues/{issue.number}"),
            "user": self.account(comment.author),
            "body": comment.body,
            "created_at": comment.created,
            "updated_at": comment.updated,
            "author_association": {"admin": "OWNER", "write": "COLLABORATOR"}.get(
                self.state.role(repository, comment.author), "NONE"
            ),
        }

    def reaction(self, content: str, account: Account) -> dict[str, Any]:
        return {"id": account.id, "node_id": f"REA_{account.id}", "user": self.account(account), "content": content}

    def issue(self, repository: Repository, issue: Issue) -> dict[str, Any]:
        shown = {
            "id": issue.id,
            "node_id": f"I_{issue.id}",
            "number": issue.number,
            "url": self._api(repository, f"/issues/{issue.number}"),
            "html_url": self._html(repository, f"/issues/{issue.number}"),
            "comments_url": self._api(repository, f"/issues/{issue.number}/comments"),
            "title": issue.title,
            "body": issue.body,
            "state": issue.state,
            "user": self.account(issue.author),
            "labels": [{"id": 1, "name": label, "color": "ededed"} for label in issue.labels],
            "comments": len(issue.comments),
            "created_at": issue.created,
            "updated_at": issue.updated,
            "locked": False,
        }
        if issue.head is not None:
            shown["pull_request"] = {"url": self._api(repository, f"/pulls/{issue.number}")}
        return shown

    def _side(self, full_name: str, branch: str, sha: str) -> dict[str, Any]:
        repository = self.state.repository(full_name)
        owner = full_name.split("/")[0]
        return {
            "label": f"{owner}:{branch}",
            "ref": branch,
            "sha": sha,
            "user": self.account(self.state.account(owner)),
            "repo": self.repository(repository) if repository else None,
        }

    def pull(self, repository: Repository, issue: Issue) -> dict[str, Any]:
        assert issue.head is not None
        head, base = self.state.sync(repository, issue)
        return {
            "id": issue.id,
            "node_id": f"PR_{issue.id}",
            "number": issue.number,
            "url": self._api(repository, f"/pulls/{issue.number}"),
            "html_url": self._html(repository, f"/pull/{issue.number}"),
            "issue_url": self._api(repository, f"/issues/{issue.number}"),
            "title": issue.title,
            "body": issue.body,
            "state": issue.state,
            "draft": issue.draft,
            "user": self.account(issue.author),
            "head": self._side(*issue.head, head),
            "base": self._side(repository.full_name, issue.base, base),
            "merged": issue.merged is not None,
            "merge_commit_sha": issue.merged,
            "mergeable": None,
            "labels": [],
            "comments": len(issue.comments),
            "created_at": issue.created,
            "updated_at": issue.updated,
            "author_association": "NONE",
        }

    def check(self, repository: Repository, check: Check) -> dict[str, Any]:
        output = check.fields.get("output") or {}
        url = self._api(repository, f"/check-runs/{check.id}")
        return {
            "id": check.id,
            "node_id": f"CR_{check.id}",
            "head_sha": check.head_sha,
            "url": url,
            "html_url": self._html(repository, f"/runs/{check.id}"),
            "name": check.fields.get("name"),
            "status": check.fields.get("status", "queued"),
            "conclusion": check.fields.get("conclusion"),
            "external_id": check.fields.get("external_id") or "",
            "details_url": check.fields.get("details_url"),
            "started_at": check.fields.get("started_at"),
            "completed_at": check.fields.get("completed_at"),
            "app": {"id": 15368, "slug": "github-actions", "name": "GitHub Actions"},
            "pull_requests": [],
            "output": {
                "title": output.get("title"),
                "summary": output.get("summary"),
                "text": output.get("text"),
                "annotations_count": len(check.annotations),
                "annotations_url": f"{url}/annotations",
            },
        }

    def release(self, repository: Repository, release: Release) -> dict[str, Any]:
        fields, api = release.fields, self._api(repository, f"/releases/{release.id}")
        return {
            "id": release.id,
            "node_id": f"RE_{release.id}",
            "url": api,
            "html_url": self._html(repository, f"/releases/tag/{fields['tag_name']}"),
            "upload_url": f"{api}/assets{{?name,label}}",
            "assets_url": f"{api}/assets",
            "tag_name": fields["tag_name"],
            "target_commitish": fields.get("target_commitish") or repository.branch,
            "name": fields.get("name") or "",
            "body": fields.get("body") or "",
            "draft": bool(fields.get("draft")),
            "prerelease": bool(fields.get("prerelease")),
            "author": self.account(release.author),
            "created_at": release.created,
            "published_at": None if fields.get("draft") else release.created,
            "assets": [self.asset(repository, release, number) for number in release.assets],
        }

    def asset(self, repository: Repository, release: Release, number: int) -> dict[str, Any]:
        name, kind, data = release.assets[number]
        return {
            "id": number,
            "node_id": f"RA_{number}",
            "url": self._api(repository, f"/releases/assets/{number}"),
            "browser_download_url": self._html(repository, f"/releases/download/{release.fields['tag_name']}/{name}"),
            "name": name,
            "label": "",
            "state": "uploaded",
            "content_type": kind,
            "size": len(data),
            "download_count": 0,
            "uploader": self.account(release.author),
            "created_at": release.created,
            "updated_at": release.created,
        }
