"""What there is to say about the licence of a result."""

from __future__ import annotations

from merge.findings.base import ERROR, SOURCE, WARNING, Finding


class LicenseConflict(Finding):
    """A merge holds copies of its sources' weights, so their terms apply to it. A source with a non-commercial, share-alike or
    company licence cannot be given away under a freer one. State the source's licence in `release.license` (or `other`, with
    `license_name` and `license_link`), or take another source. moerge compares the licences' names; what they mean for you, only
    their texts say."""

    id = "license-conflict"
    level = WARNING
    message = "release.license is {license}, but {model} is {source}: {reason}"


class LicenseUndecided(Finding):
    """The sources have different licences, and none of them holds for all. The card would state none. Read them, and say in
    `release.license` what the result may be published under: often `other` with `license_name` and `license_link`."""

    id = "license-undecided"
    level = WARNING
    message = "the sources' licences ({licenses}) do not give one for the result; state release.license"


class LicenseUnknown(Finding):
    """The model's page on the Hub states no licence. What has no licence may not be passed on: ask its author for one, or take
    another source. A merge that only you use is another matter."""

    id = "license-unknown"
    level = WARNING
    fault = SOURCE
    message = "no licence is stated by {models}: whether a merge may be published is not known"


class LicenseForbidsMerges(Finding):
    """A licence with ND (no derivatives) allows copies of the unchanged work only. A merge is a changed work: it may be made, and
    not published. Take the source out, or ask its author."""

    id = "license-forbids-merges"
    level = ERROR
    message = "{model} is {license}, which forbids publishing what is made of it"


class LlamaName(Finding):
    """The Llama licences from version 3 on ask that the name of a model made with Llama begins with "Llama", and that "Built
    with Llama" is displayed. Rename `release.repo` accordingly."""

    id = "llama-name"
    level = WARNING
    message = "{model} is {license}, which asks that the name of {repo} begins with Llama"
