"""The YAML at the head of a card, from which the Hub files, filters and links a model.

Keys and values: https://huggingface.co/docs/hub/model-cards. The Hub refuses a commit whose card has values it does not
know, so what it would refuse is left out here, or put as it takes it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cards.hub import file_url, hub_id
from cards.hub_results import model_index
from cards.markdown import Markdown, is_web, one_line
from evals.results import Report

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

# https://huggingface.co/docs/hub/repositories-licenses
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENSES = frozenset(_LICENSES.split())
TAGS = ("moe", "frankenmoe", "merge")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9.]+")


def model_metadata(report: Report) -> ModelCardData:
    """Metadata of the model's card: a merge of its sources on the Hub."""
    from huggingface_hub import ModelCardData

    scores = model_index(report)
    sources = list(dict.fromkeys(filter(None, (hub_id(source.name) for source in report.sources))))
    return ModelCardData(
        base_model=sources or None,
        base_model_relation="merge" if sources else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=report.name if scores else None,
        eval_results=scores or None,
        tags=[*TAGS, *_tags(report)],
        language=_languages(report),
        **_license(report),
    )


def gguf_metadata(report: Report) -> ModelCardData:
    """Metadata of the GGUF repository's card: quants of the merge."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=[report.repo] if report.repo else None,
        base_model_relation="quantized" if report.repo else None,
        pipeline_tag="text-generation",
        tags=["gguf", *TAGS, *_tags(report)],
        language=_languages(report),
        **_license(report),
    )


def front_matter(data: ModelCardData) -> Markdown:
    """The metadata as the block that opens a card."""
    return Markdown(f"---\n{data.to_yaml()}\n---")


def license_url(report: Report) -> str | None:
    """Where the licence can be read: a page of the web, or a file of the repository."""
    place = report.license_link
    if place in ("LICENSE", "LICENSE.md"):
        return file_url(report.repo, place) if report.repo else None
    return one_line(place) if place and is_web(place) else None


def _tags(report: Report) -> list[str]:
    return [tag for tag in map(one_line, report.tags) if tag]


def _languages(report: Report) -> list[str] | None:
    known = [language for language in report.language if _LANGUAGE.fullmatch(language)]
    return list(dict.fromkeys(known)) or None


def _license(report: Report) -> dict[str, Any]:
    """The Hub knows a list of licences; any other is `other` with a name, in small letters without spaces."""
    given = one_line(report.license or "").lower()
    name = report.license_name
    if not given and not name:
        return {}
    if given in LICENSES - {"other"}:
        return {"license": given}
    place = report.license_link
    return {
        "license": "other",
        "license_name": _NOT_IN_A_NAME.sub("-", one_line(name or given).lower()).strip("-.") or None,
        "license_link": place if place in ("LICENSE", "LICENSE.md") else license_url(report),
    }
