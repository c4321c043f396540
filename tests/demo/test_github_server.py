"""The local GitHub behaves to the unmodified PyGithub as GitHub does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from github import Auth, Github, GithubException, GithubRetry, UnknownObjectException

from demo.github.outer import Fault, Said
from demo.github.server import Server, running
from demo.github.state import Limits
from tests.bot.workflow import Recipes, git

NAME = "me/recipes"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "github") as served:
        yield served


@pytest.fixture
def recipes(tmp_path: Path, server: Server) -> Recipes:
    """A checkout whose origin is the server's repository, with one commit on main."""
    made = Recipes(tmp_path / "checkout", models=False)
    made.git("remote", "add", "origin", str(server.repository(NAME).git.path))
    made.commit(**{"recipes/a.yaml": "base_model: a/b\n", "README.md": "Hello\n"})
    made.git("push", "--quiet", "origin", "main")
    return made


def client(server: Server, token: str, **options: object) -> Github:
    given = {"seconds_between_requests": 0, "seconds_between_writes": 0, "retry": None} | options
    return Github(auth=Auth.Token(token), base_url=server.url, **given)  # type: ignore[arg-type]


def fork_with_pull(tmp_path: Path, server: Server, files: dict[str, str]) -> int:
    """A stranger's fork with a branch of these files, and its pull request's number."""
    person = client(server, server.token("stranger"))
    fork = person.get_repo(NAME).create_fork()
    folder = tmp_path / "fork"
    git(tmp_path, "clone", "--quiet", fork.clone_url, str(folder))
    work = Recipes(folder, models=False)
    work.git("switch", "--quiet", "-c", "feature")
    work.commit(**files)
    work.git("push", "--quiet", "origin", "feature")
    return person.get_repo(NAME).create_pull(base="main", head="stranger:feature", title="Mine", body="").number


def test_git_data_is_what_git_has(server: Server, recipes: Recipes) -> None:
    repo = client(server, server.token("me")).get_repo(NAME)
    head = recipes.git("rev-parse", "HEAD")
    assert repo.get_branch("main").commit.sha == repo.get_commit("main").sha == head
    tree = {entry.path: entry for entry in repo.get_git_tree(head, recursive=True).tree}
    assert tree["recipes/a.yaml"].size == len("base_model: a/b\n")
    assert repo.get_contents("recipes/a.yaml").decoded_content == b"base_model: a/b\n"
    assert [entry.path for entry in repo.get_contents("recipes")] == ["recipes/a.yaml"]
    assert repo.get_git_blob(tree["README.md"].sha).encoding == "base64"
    made = repo.create_file("recipes/deep/b.yaml", "add", "experts: 1\n", branch="main")["commit"].sha
    recipes.git("pull", "--quiet", "origin", "main")
    assert (recipes.folder / "recipes/deep/b.yaml").read_text() == "experts: 1\n"
    compared = repo.compare(head, made)
    assert [(file.filename, file.status) for file in compared.files] == [("recipes/deep/b.yaml", "added")]
    assert compared.merge_base_commit.sha == head and compared.ahead_by == 1
    repo.create_git_ref("refs/tags/v1", made)
    assert [tag.name for tag in repo.get_tags()] == ["v1"] and repo.get_git_ref("tags/v1").object.sha == made
    with pytest.raises(UnknownObjectException):
        repo.get_git_blob("0" * 40)


def test_a_fork_s_pull_request_has_its_files_comments_and_merge(
    tmp_path: Path, server: Server, recipes: Recipes
) -> None:
    number = fork_with_pull(tmp_path, server, {f"recipes/{n}.yaml": f"n: {n}\n" for n in range(35)})
    repo = client(server, server.token("me")).get_repo(NAME)
    pull = repo.get_pull(number)
    assert pull.head.repo.full_name == "stranger/recipes" and pull.changed_files == 35 and pull.mergeable
    assert len(list(pull.get_files())) == 35  # two pages
    for text in range(32):
        pull.create_issue_comment(f"comment {text}")
    assert [comment.body for comment in pull.get_issue_comments()] == [f"comment {text}" for text in range(32)]
    first = pull.get_issue_comments()[0]
    first.edit("edited")
    first.create_reaction("eyes")
    assert pull.get_issue_comment(first.id).body == "edited" and [r.content for r in first.get_reactions()] == ["eyes"]
    first.delete()
    assert pull.get_issue_comments().totalCount == 31
    pull.merge()
    assert repo.get_pull(number).merged and repo.get_contents("recipes/7.yaml").decoded_content == b"n: 7\n"


def test_lists_are_cut_where_github_cuts_them(tmp_path: Path) -> None:
    with running(tmp_path / "github", limits=Limits(compared_files=5, pull_files=7, tree_entries=6)) as server:
        made = Recipes(tmp_path / "checkout", models=False)
        made.git("remote", "add", "origin", str(server.repository(NAME).git.path))
        made.commit(a="1")
        made.git("push", "--quiet", "origin", "main")
        number = fork_with_pull(tmp_path, server, {f"{n}.yaml": str(n) for n in range(9)})
        repo = client(server, server.token("me")).get_repo(NAME)
        pull = repo.get_pull(number)
        assert len(list(pull.get_files())) == 7
        assert len(repo.compare("main", "stranger:feature").files) == 5
        assert repo.get_git_tree(pull.head.sha, recursive=True).raw_data["truncated"] is True


def test_check_runs_take_fifty_annotations_a_request_and_statuses_140_characters(
    server: Server, recipes: Recipes
) -> None:
    head = recipes.git("rev-parse", "HEAD")
    repo = client(server, server.workflow_token(NAME)).get_repo(NAME)
    one = {"path": "recipes/a.yaml", "start_line": 1, "end_line": 1, "annotation_level": "failure", "message": "no"}
    output = {"title": "t", "summary": "s", "annotations": [one] * 50}
    check = repo.create_check_run("moerge", head, status="completed", conclusion="failure", output=output)
    check.edit(output=output)
    assert check.get_annotations().totalCount == 100
    assert [found.name for found in repo.get_commit(head).get_check_runs()] == ["moerge"]
    for wrong in (
        {"output": output | {"annotations": [one] * 51}},
        {"output": {"title": "t", "summary": "s" * 65_536}},
        {"output": output | {"annotations": [one | {"annotation_level": "error"}]}},
        {"status": "completed"},
    ):
        with pytest.raises(GithubException) as refused:
            check.edit(**wrong)
        assert refused.value.status == 422
    repo.get_commit(head).create_status("success", description="fine", context="moerge")
    assert repo.get_commit(head).get_combined_status().state == "success"
    with pytest.raises(GithubException):
        repo.get_commit(head).create_status("success", description="x" * 141)
    with pytest.raises(GithubException) as refused:
        client(server, server.token("me")).get_repo(NAME).create_check_run("moerge", head)
    assert refused.value.status == 403  # check runs are of apps


def test_a_release_makes_its_tag_and_keeps_its_files(tmp_path: Path, server: Server, recipes: Recipes) -> None:
    repo = client(server, server.token("me")).get_repo(NAME)
    release = repo.create_git_release("v1", "First", "What it is", target_commitish="main")
    (tmp_path / "SHA256SUMS").write_text("abc\n")
    asset = release.upload_asset(str(tmp_path / "SHA256SUMS"))
    assert asset.size == 4 and repo.get_release("v1").get_assets().totalCount == 1
    assert repo.get_git_ref("tags/v1").object.sha == recipes.git("rev-parse", "HEAD")
    with pytest.raises(GithubException):
        repo.create_git_release("v1", "Again", "")
    release.delete_release()
    with pytest.raises(UnknownObjectException):
        repo.get_release("v1")


def test_a_token_may_do_what_it_was_given_and_no_more(server: Server, recipes: Recipes) -> None:
    head = recipes.git("rev-parse", "HEAD")
    reader = client(server, server.workflow_token(NAME, {"contents": "read"})).get_repo(NAME)
    assert reader.get_contents("README.md")
    for act in (
        lambda: reader.create_git_ref("refs/tags/x", head),
        lambda: reader.create_check_run("moerge", head),
        lambda: reader.get_commit(head).create_status("success"),
        lambda: client(server, server.workflow_token(NAME)).get_user().login,
    ):
        with pytest.raises(GithubException) as refused:
            act()
        assert refused.value.status == 403 and "not accessible by integration" in str(refused.value)
    with pytest.raises(GithubException) as refused:
        client(server, "wrong").get_repo(NAME)
    assert refused.value.status == 401
    server.repository("me/secret", private=True)
    with pytest.raises(UnknownObjectException):
        client(server, server.token("stranger")).get_repo("me/secret")
    owner = client(server, server.token("me")).get_repo(NAME)
    assert owner.get_collaborator_permission("stranger") == "read"
    assert owner.get_collaborator_permission("me") == "admin"


def test_requests_of_wrong_shapes_are_refused_with_the_field_s_name(server: Server, recipes: Recipes) -> None:
    headers = {"Authorization": f"token {server.token('me')}"}
    for path, body, field in (
        ("issues", {"titel": "x"}, "title"),
        ("git/refs", {"ref": "main", "sha": "a" * 40}, "ref"),
        ("releases", {"tag_name": 1}, "tag_name"),
    ):
        answer = requests.post(f"{server.url}/repos/{NAME}/{path}", json=body, headers=headers, timeout=10)
        assert answer.status_code == 422 and field in {error["field"] for error in answer.json()["errors"]}


def test_an_unchanged_answer_is_304_and_costs_nothing(server: Server, recipes: Recipes) -> None:
    headers = {"Authorization": f"token {server.token('me')}"}
    url = f"{server.url}/repos/{NAME}/branches/main"
    first = requests.get(url, headers=headers, timeout=10)
    again = requests.get(url, headers=headers | {"If-None-Match": first.headers["ETag"]}, timeout=10)
    assert again.status_code == 304 and not again.content
    assert again.headers["X-RateLimit-Used"] == first.headers["X-RateLimit-Used"] == "1"
    recipes.commit(b="2")
    recipes.git("push", "--quiet", "origin", "main")
    assert requests.get(url, headers=headers | {"If-None-Match": first.headers["ETag"]}, timeout=10).status_code == 200


def test_rate_limits_and_server_errors_are_github_s_and_pygithub_waits_them_out(
    tmp_path: Path, server: Server, recipes: Recipes
) -> None:
    patient = client(server, server.token("me"), retry=GithubRetry(total=3, backoff_factor=0.01))
    planned = [Fault(limit="secondary", retry_after=1), Fault(status=502), Fault(limit="primary", reset=0)]
    server.faults = lambda number, request: planned.pop(0) if planned else None
    started = time.monotonic()
    assert patient.get_repo(NAME).full_name == NAME and not planned
    assert time.monotonic() - started > 1
    server.faults = None
    with running(tmp_path / "small", limits=Limits(requests=3, writes=2)) as small:
        small.repository(NAME)
        token = small.token("me")
        person, repo = client(small, token), client(small, token, lazy=True).get_repo(NAME)
        for _ in range(2):
            repo.create_issue("x")
        with pytest.raises(GithubException) as refused:
            repo.create_issue("x")
        assert "secondary rate limit" in str(refused.value) and int(refused.value.headers["retry-after"]) > 50
        with pytest.raises(GithubException) as refused:
            person.get_repo(NAME)
        assert "API rate limit exceeded" in str(refused.value)
        assert person.get_rate_limit().rate.remaining == 0


def test_graphql_reads_blobs_and_comments_and_refuses_fields_that_there_are_not(
    tmp_path: Path, server: Server, recipes: Recipes
) -> None:
    number = fork_with_pull(tmp_path, server, {"x.yaml": "é: 1\n"})
    token = server.workflow_token(NAME)
    client(server, token).get_repo(NAME).get_issue(number).create_comment("ours")
    client(server, server.token("stranger")).get_repo(NAME).get_issue(number).create_comment("theirs")
    oid = recipes.git("rev-parse", "HEAD:README.md")
    text = """
      query($owner: String!, $name: String!, $number: Int!, $oid: GitObjectID!) {
        viewer { login }
        repository(owner: $owner, name: $name) {
          b0: object(oid: $oid) { oid ... on Blob { text byteSize isTruncated isBinary } }
          pullRequest(number: $number) {
            comments(first: 1) { nodes { databaseId viewerDidAuthor author { login } } pageInfo { hasNextPage endCursor } }
          }
        }
      }"""
    given = {"owner": "me", "name": "recipes", "number": number, "oid": oid}
    requester = client(server, token).requester
    data = requester.graphql_query(text, given)[1]["data"]
    assert data["viewer"]["login"] == "github-actions[bot]"
    assert data["repository"]["b0"] == {
        "oid": oid,
        "text": "Hello\n",
        "byteSize": 6,
        "isTruncated": False,
        "isBinary": False,
    }
    page = data["repository"]["pullRequest"]["comments"]
    assert page["nodes"][0]["viewerDidAuthor"] and page["pageInfo"]["hasNextPage"]
    with pytest.raises(GithubException) as refused:
        requester.graphql_query(text.replace("byteSize", "bytes"), given)
    assert "doesn't exist on type 'Blob'" in str(refused.value)


def test_the_log_has_every_request_and_a_printer_is_told(tmp_path: Path) -> None:
    told: list[Said] = []
    with running(tmp_path / "github", printer=told.append) as server:
        server.repository(NAME)
        client(server, server.token("me")).get_repo(NAME)
        assert [(said.method, said.path, said.status, said.login) for said in told] == [
            ("GET", f"/repos/{NAME}", 200, "me")
        ]
        assert server.log.all() == told
