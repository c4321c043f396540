"""The licence of a result, from those of its sources: what a merge of them may be published under.

A merge holds copies of its sources' weights, so every source's terms apply to it. This knows the Hub's licence ids
(https://huggingface.co/docs/hub/repositories-licenses) and what each asks of copies; it compares words, and is no lawyer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from merge import findings as f
from merge.checkpoint import Checkpoint

# What a copy may be put under: any of these takes in those before it.
PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "pddl", "zlib", "isc", "ncsa", "postgresql", "mit", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "afl-3.0", "artistic-2.0", "ecl-2.0", "ms-pl", "openmdw-1.0", "apache-2.0",
)  # fmt: skip
ATTRIBUTION = (
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "odc-by",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
)
# These ask that whatever holds the work has the same licence. A later GPL may take in Apache-2.0, version 2 may not.
COPYLEFT = (
    "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "eupl-1.1", "eupl-1.2", "epl-1.0",
    "epl-2.0", "osl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "odbl", "gfdl",
)  # fmt: skip
NOT_WITH_APACHE = ("gpl-2.0", "lgpl-2.1")
# Licences of a company or for a kind of use: a copy stays under the very same terms.
OWN_TERMS = (
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "grok2-community", "openrail", "openrail++",
    "creativeml-openrail-m", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "lgpl-lr",
    "deepfloyd-if-license", "apple-amlr", "apple-ascl", "intel-research", "fair-noncommercial-research-license",
    "h-research", "cdla-sharing-1.0", "c-uda",
)  # fmt: skip
# From version 3 on Meta's licences ask for the name: "include 'Llama' at the beginning of any such AI model name".
NAMED_LLAMA = ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
UNSTATED = ("", "unknown")
OTHER = "other"


@dataclass(frozen=True)
class Terms:
    """A source's licence as the Hub names it; None where its card states none. Of a folder nobody asks it: it may be its
    author's own."""

    model: str
    license: str | None
    line: int | None = None
    is_hub: bool = True

    @property
    def key(self) -> str | None:
        """The licence's id in small letters; None where it is not stated."""
        text = (self.license or "").strip().lower()
        return None if text in UNSTATED else text


def is_noncommercial(license: str) -> bool:
    """Whether a licence forbids to use a copy commercially."""
    return "-nc" in license or license in ("apple-amlr", "intel-research", "fair-noncommercial-research-license")


def forbids_changes(license: str) -> bool:
    """Whether a licence forbids to publish what is made of the work."""
    return re.search(r"-nd(-|$)", license) is not None


def is_free(license: str) -> bool:
    """Whether a copy may be put under other terms, its notices kept."""
    return license in PERMISSIVE or license in ATTRIBUTION


def derived(sources: Iterable[Terms]) -> str | None:
    """The one licence that fits all sources; None where there is none or it cannot be told.

    Where all sources but one kind are permissive, that kind's licence holds for the whole.
    """
    keys = {source.key for source in sources}
    if None in keys or OTHER in keys or not keys:
        return OTHER if keys == {OTHER} else None
    known = {key for key in keys if key is not None}
    if len(known) == 1:
        return known.pop()
    asking = {key for key in known if not is_free(key)}
    if not asking:
        attribution = sorted(known & set(ATTRIBUTION))
        if not attribution:
            return max(known, key=PERMISSIVE.index)
        return attribution[0] if len(attribution) == 1 else None
    if len(asking) > 1:
        return None
    only = asking.pop()
    return None if only in NOT_WITH_APACHE and "apache-2.0" in known else only


def license_findings(
    sources: Iterable[Terms], stated: str | None, line: int | None, repo: str | None, repo_line: int | None
) -> Iterator[f.Finding]:
    """What there is to say of a release's licence: `stated` at `line` is the recipe's own, `repo` where it goes."""
    sources = list(dict.fromkeys(sources))
    known = [source for source in sources if source.key is not None]
    unstated = [source for source in sources if source.key is None]
    if on_hub := [source for source in unstated if source.is_hub]:
        yield f.LicenseUnknown(on_hub[0].line, models=", ".join(dict.fromkeys(source.model for source in on_hub)))
    for source in known:
        if repo is not None and forbids_changes(source.key or ""):
            yield f.LicenseForbidsMerges(source.line, model=source.model, license=source.license)
    said = (stated or "").strip().lower()
    if said and said != OTHER:
        for source in known:
            if reason := _conflict(source.key or "", said):
                yield f.LicenseConflict(line, license=stated, model=source.model, source=source.license, reason=reason)
    elif not said and derived(sources) is None and not unstated:
        listed = sorted({source.key or "" for source in known})
        yield f.LicenseUndecided(repo_line, licenses=" and ".join(listed))
    llama = next((source for source in known if source.key in NAMED_LLAMA), None)
    if llama is not None and repo is not None and not repo.partition("/")[2].lower().startswith("llama"):
        yield f.LlamaName(repo_line, repo=repo, model=llama.model, license=llama.license)


def source_terms(checkpoints: Iterable[tuple[Checkpoint, int | None]]) -> list[Terms]:
    """The licences of a recipe's models and adapters, each with the line that names it first."""
    found: dict[str, Terms] = {}
    for checkpoint, line in checkpoints:
        for part in (checkpoint, checkpoint.adapter):
            if part is not None:
                found.setdefault(part.key, Terms(part.name, part.license, line, part.is_hub))
    return list(found.values())


def _conflict(source: str, stated: str) -> str | None:
    """Why a copy of a work under `source` cannot be released under `stated`; None where it can, or nobody here can tell."""
    if source == "apache-2.0" and stated in NOT_WITH_APACHE:
        return "its terms cannot be kept under that licence"
    if source in (stated, OTHER) or is_free(source):
        return None
    if is_noncommercial(source) and not is_noncommercial(stated):
        return "it forbids commercial use, the release would allow it"
    if source in OWN_TERMS or source.startswith("llama"):
        return "its terms go with every copy, so the release has to carry them"
    if source in COPYLEFT or "-sa" in source:
        return "it asks that what contains it has the same licence"
    return None
