"""What requests may say: one model for each body, strict about names and types as the REST API's reference has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Conclusion = Literal["action_required", "cancelled", "failure", "neutral", "success", "skipped", "stale", "timed_out"]
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CommentBody(Body):
    body: str = Field(min_length=1)


class ReactionBody(Body):
    content: Literal["+1", "-1", "laugh", "confused", "heart", "hooray", "rocket", "eyes"]


class IssueCreate(Body):
    title: str
    body: str | None = None
    labels: list[str] = []
    assignees: list[str] = []


class IssueEdit(Body):
    title: str | None = None
    body: str | None = None
    state: Literal["open", "closed"] | None = None
    labels: list[str] | None = None


class PullCreate(Body):
    title: str
    head: str
    base: str
    body: str | None = None
    draft: bool = False
    maintainer_can_modify: bool = True
    head_repo: str | None = None


class PullEdit(Body):
    title: str | None = None
    body: str | None = None
    state: Literal["open", "closed"] | None = None
    base: str | None = None


class PullMerge(Body):
    commit_title: str | None = None
    commit_message: str | None = None
    sha: Sha | None = None
    merge_method: Literal["merge", "squash", "rebase"] = "merge"


class Annotation(Body):
    path: str = Field(min_length=1)
    start_line: int = Field(ge=1)
    end_line: int = Field(ge=1)
    start_column: int | None = None
    end_column: int | None = None
    annotation_level: Literal["notice", "warning", "failure"]
    message: str = Field(min_length=1, max_length=65_536)
    title: str | None = Field(None, max_length=255)
    raw_details: str | None = Field(None, max_length=65_536)

    @model_validator(mode="after")
    def _columns(self) -> Annotation:
        if self.start_column is not None and self.start_line != self.end_line:
            raise ValueError("columns are only for annotations on one line")
        return self


class CheckOutput(Body):
    title: str | None = None
    summary: str
    text: str | None = None
    annotations: list[Annotation] = []
    images: list[dict[str, Any]] = []


class CheckEdit(Body):
    name: str | None = Field(None, min_length=1)
    details_url: str | None = None
    external_id: str | None = None
    status: Literal["queued", "in_progress", "completed"] | None = None
    started_at: str | None = None
    completed_at: str | None = None
    conclusion: Conclusion | None = None
    output: CheckOutput | None = None
    actions: list[dict[str, str]] = Field([], max_length=3)

    @model_validator(mode="after")
    def _concluded(self) -> CheckEdit:
        if self.status == "completed" and self.conclusion is None:
            raise ValueError("a completed check run needs a conclusion")
        return self


class CheckCreate(CheckEdit):
    name: str = Field(min_length=1)
    head_sha: Sha


class StatusCreate(Body):
    state: Literal["error", "failure", "pending", "success"]
    target_url: str | None = None
    description: str | None = Field(None, max_length=140)
    context: str = "default"


class RefCreate(Body):
    ref: str = Field(pattern=r"^refs/[^/]+/.+$")
    sha: Sha


class RefEdit(Body):
    sha: Sha
    force: bool = False


class TagCreate(Body):
    tag: str
    message: str
    object: Sha
    type: Literal["commit", "tree", "blob"]
    tagger: dict[str, str] | None = None


class ReleaseEdit(Body):
    tag_name: str | None = None
    target_commitish: str | None = None
    name: str | None = None
    body: str | None = Field(None, max_length=125_000)
    draft: bool | None = None
    prerelease: bool | None = None
    discussion_category_name: str | None = None
    make_latest: Literal["true", "false", "legacy"] | None = None


class ReleaseCreate(ReleaseEdit):
    tag_name: str = Field(min_length=1)
    generate_release_notes: bool = False


class ForkCreate(Body):
    organization: str | None = None
    name: str | None = None
    default_branch_only: bool | None = None


class FileWrite(Body):
    message: str
    content: str
    sha: Sha | None = None
    branch: str | None = None
    committer: dict[str, str] | None = None
    author: dict[str, str] | None = None


class Query(Body):
    query: str
    variables: dict[str, Any] | None = None
    operationName: str | None = None
