"""What may be wrong with where and how a recipe is to be built."""

from __future__ import annotations

from merge.findings.base import ERROR, WARNING, Finding


class BadRunner(Finding):
    """`build.runner` is not a runner. It is a label of your GitHub runners, several labels with commas between them, or
    `hf-jobs`, `hf-jobs:FLAVOR` or `hf-jobs:FLAVOR:TIME` for a Hugging Face Job, as in `hf-jobs:a10g-large:4h`."""

    id = "bad-runner"
    level = ERROR
    message = "build.runner {runner!r} is not a runner: {problem}"


class UnknownFlavor(Finding):
    """The Hub's client knows no hardware of that name for a Hugging Face Job. New flavors come now and then, so the build is
    tried; the Hub refuses a flavor that there is not. `hf jobs hardware` prints those there are."""

    id = "unknown-flavor"
    level = WARNING
    message = "{flavor!r} is no flavor of a Hugging Face Job that is known here{hint}; known are {known}"


class JobWithoutRepository(Finding):
    """A Hugging Face Job's machine is gone when it has ended, and what it built with it: only what it published stays. Say
    where: `release: {repo: owner/name}`."""

    id = "job-without-repository"
    level = ERROR
    message = "a build in a Hugging Face Job must be published, and the recipe names no release.repo"


class JobWithLocalSource(Finding):
    """A Hugging Face Job has the recipe and the files it names, not the folders of your repository. Put the model on the Hub,
    private if need be, or build on a runner of your own."""

    id = "job-with-local-source"
    level = ERROR
    message = "{model!r} is a folder of this repository, which a Hugging Face Job does not have"


class SharedRepository(Finding):
    """Two recipes that are to be built publish to the same repository: each would replace the other's release, and the last
    one to end would win. Give each recipe a `release.repo` of its own."""

    id = "shared-repository"
    level = ERROR
    message = "{other} publishes to {repo} too; give each recipe a repository of its own"


class TagVersion(Finding):
    """The tag that was pushed names another version than the recipe does, so it is not clear which is meant. Correct
    `release.version` and push the tag on the new commit, or leave the version out of the recipe: the tag then gives it."""

    id = "tag-version"
    level = ERROR
    message = "tag {tag} was pushed, and the recipe says version {version}"
