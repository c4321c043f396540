"""What jobs report: check runs, commit statuses, releases and their files."""

from __future__ import annotations

from typing import Any

from demo.github import bodies
from demo.github.state import Check, Release, now
from demo.github.web import Answer, Call, Refused, invalid, not_found


def create_check(call: Call) -> Answer:
    repository, token = call.need("checks"), call.token
    if token is not None and token.permissions is None:
        raise Refused(403, "You must authenticate via a GitHub App.")
    given = call.given(bodies.CheckCreate)
    if repository.git.resolve(given["head_sha"]) is None:
        raise Refused(422, f"No commit found for SHA: {given['head_sha']}")
    check = Check(call.state.new_id(), given["head_sha"], {"status": "queued", "started_at": now()})
    _report(call, check, given)
    repository.checks[check.id] = check
    return Answer(201, call.shown.check(repository, check))


def edit_check(call: Call) -> Answer:
    repository, check = call.need("checks"), _check(call)
    _report(call, check, call.given(bodies.CheckEdit))
    return Answer(200, call.shown.check(repository, check))


def _report(call: Call, check: Check, given: dict[str, Any]) -> None:
    """Annotations add up; all else is replaced."""
    limits, output = call.state.limits, given.get("output") or {}
    for name in ("summary", "text"):
        if len(output.get(name) or "") > limits.check_characters:
            raise invalid(
                "Invalid request.\n\nOnly 65535 characters are allowed.", field=f"output.{name}", code="custom"
            )
    annotations = output.pop("annotations", [])
    if len(annotations) > limits.annotations:
        raise invalid(f"No more than {limits.annotations} items are allowed; {len(annotations)} were supplied.")
    if output and not output.get("title"):
        raise invalid("For 'properties/output', \"title\" wasn't supplied.")
    if given.get("conclusion"):
        given = {"status": "completed", "completed_at": now()} | given
    check.fields |= given
    check.annotations += annotations


def get_check(call: Call) -> Answer:
    return Answer(200, call.shown.check(call.need("checks", level="read"), _check(call)))


def check_annotations(call: Call) -> Answer:
    call.need("checks", level="read")
    return call.page(_check(call).annotations, lambda one: one)


def checks(call: Call) -> Answer:
    repository, sha = call.need("checks", level="read"), call.commit(call.parameters["ref"])
    found = [one for one in repository.checks.values() if one.head_sha == sha]
    if name := call.one("check_name"):
        found = [one for one in found if one.fields["name"] == name]
    if call.one("filter", "latest") == "latest":
        found = list({one.fields["name"]: one for one in found}.values())
    return call.page(found, lambda check: call.shown.check(repository, check), wrap="check_runs")


def _check(call: Call) -> Check:
    found = call.repository.checks.get(int(call.parameters["id"]))
    if found is None:
        raise not_found()
    return found


# ---------------------------------------------------------------------------------------------------------------- statuses


def create_status(call: Call) -> Answer:
    repository, sha = call.need("statuses"), call.parameters["sha"]
    if repository.git.resolve(sha) is None:
        raise Refused(422, f"No commit found for SHA: {sha}")
    wish = call.body(bodies.StatusCreate)
    status = wish.model_dump() | {
        "id": call.state.new_id(), "sha": sha, "created_at": now(), "updated_at": now(),
        "creator": call.shown.account(call.account), "url": f"{call.shown.url}{call.path}",
    }  # fmt: skip
    repository.statuses.append(status)
    return Answer(201, status)


def statuses(call: Call) -> Answer:
    sha = call.commit(call.parameters["ref"])
    found = [one for one in reversed(call.need("statuses", level="read").statuses) if one["sha"] == sha]
    return call.page(found, lambda one: one)


def combined_status(call: Call) -> Answer:
    repository, sha = call.need("statuses", level="read"), call.commit(call.parameters["ref"])
    latest = {one["context"]: one for one in repository.statuses if one["sha"] == sha}
    states = {one["state"] for one in latest.values()}
    state = (
        "failure" if states & {"failure", "error"} else "pending" if "pending" in states or not states else "success"
    )
    shown = {"state": state, "sha": sha, "total_count": len(latest), "statuses": list(latest.values())}
    return Answer(200, shown | {"repository": call.shown.repository(repository), "url": f"{call.shown.url}{call.path}"})


# ---------------------------------------------------------------------------------------------------------------- releases


def releases(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    return call.page(list(reversed(repository.releases.values())), lambda one: call.shown.release(repository, one))


def create_release(call: Call) -> Answer:
    """A tag that is not there is made, where the release's commit is."""
    repository, given = call.need("contents"), call.given(bodies.ReleaseCreate)
    if any(one.fields["tag_name"] == given["tag_name"] for one in repository.releases.values()):
        raise invalid("Validation Failed", resource="Release", code="already_exists", field="tag_name")
    tag = f"refs/tags/{given['tag_name']}"
    if not given.get("draft") and repository.git.resolve(tag) is None:
        target = given.get("target_commitish") or repository.branch
        sha = repository.git.resolve(f"refs/heads/{target}") or repository.git.resolve(target)
        if sha is None:
            raise invalid("Validation Failed", resource="Release", code="invalid", field="target_commitish")
        repository.git.update(tag, sha)
    release = Release(call.state.new_id(), call.account, given)
    repository.releases[release.id] = release
    return Answer(201, call.shown.release(repository, release))


def get_release(call: Call) -> Answer:
    return Answer(200, call.shown.release(call.need("contents", level="read"), _release(call)))


def release_by_tag(call: Call) -> Answer:
    repository, tag = call.need("contents", level="read"), call.parameters["tag"]
    for one in repository.releases.values():
        if one.fields["tag_name"] == tag and not one.fields.get("draft"):
            return Answer(200, call.shown.release(repository, one))
    raise not_found()


def latest_release(call: Call) -> Answer:
    repository = call.need("contents", level="read")
    found = [
        one for one in repository.releases.values() if not one.fields.get("draft") and not one.fields.get("prerelease")
    ]
    if not found:
        raise not_found()
    return Answer(200, call.shown.release(repository, found[-1]))


def edit_release(call: Call) -> Answer:
    repository, release = call.need("contents"), _release(call)
    release.fields |= call.given(bodies.ReleaseEdit)
    return Answer(200, call.shown.release(repository, release))


def delete_release(call: Call) -> Answer:
    repository, release = call.need("contents"), _release(call)
    del repository.releases[release.id]
    return Answer(204)


def assets(call: Call) -> Answer:
    repository, release = call.need("contents", level="read"), _release(call)
    return call.page(list(release.assets), lambda number: call.shown.asset(repository, release, number))


def upload_asset(call: Call) -> Answer:
    repository, release, name = call.need("contents"), _release(call), call.one("name")
    if not name or any(known == name for known, _, _ in release.assets.values()):
        raise invalid(
            "Validation Failed", resource="ReleaseAsset", code="already_exists" if name else "missing", field="name"
        )
    number = call.state.new_id()
    release.assets[number] = (name, call.headers.get("content-type", "application/octet-stream"), call.data)
    return Answer(201, call.shown.asset(repository, release, number))


def get_asset(call: Call) -> Answer:
    repository, wanted = call.need("contents", level="read"), int(call.parameters["id"])
    for release in repository.releases.values():
        if wanted in release.assets:
            _, kind, data = release.assets[wanted]
            if "octet-stream" in call.headers.get("accept", ""):
                return Answer(200, data, {"Content-Type": kind})
            return Answer(200, call.shown.asset(repository, release, wanted))
    raise not_found()


def delete_asset(call: Call) -> Answer:
    repository, wanted = call.need("contents"), int(call.parameters["id"])
    for release in repository.releases.values():
        if release.assets.pop(wanted, None) is not None:
            return Answer(204)
    raise not_found()


def _release(call: Call) -> Release:
    found = call.repository.releases.get(int(call.parameters["id"]))
    if found is None:
        raise not_found()
    return found
