"""A result's licence follows from its sources', and what cannot be reconciled is said."""

from __future__ import annotations

import pytest

from merge.licenses import Terms, derived, license_findings


def terms(*licenses: str | None) -> list[Terms]:
    return [Terms(f"lab/{number}", license, number + 1) for number, license in enumerate(licenses)]


def found(
    *licenses: str | None, stated: str | None = None, repo: str | None = "me/Mix", hub: bool = True
) -> list[tuple[str, int | None]]:
    sources = [Terms(one.model, one.license, one.line, hub) for one in terms(*licenses)]
    return [(finding.id, finding.line) for finding in license_findings(sources, stated, 20, repo, 30)]


@pytest.mark.parametrize(
    ("sources", "result"),
    [
        (["apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0", "bsd-3-clause"], "apache-2.0"),
        (["MIT", "mit"], "mit"),
        (["apache-2.0", "cc-by-4.0"], "cc-by-4.0"),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["apache-2.0", "llama3"], "llama3"),
        (["mit", "gpl-3.0"], "gpl-3.0"),
        (["apache-2.0", "gpl-2.0"], None),
        (["llama2", "cc-by-nc-4.0"], None),
        (["apache-2.0", None], None),
        (["apache-2.0", "unknown"], None),
        (["apache-2.0", "other"], None),
        (["other", "other"], "other"),
        (["some-new-licence", "mit"], "some-new-licence"),
        ([], None),
    ],
)
def test_one_licence_holds_for_the_whole_where_all_others_allow_it(
    sources: list[str | None], result: str | None
) -> None:
    assert derived(terms(*sources)) == result


@pytest.mark.parametrize(
    "source", ["cc-by-nc-4.0", "llama2", "llama3.1", "gemma", "gpl-3.0", "cc-by-sa-4.0", "agpl-3.0"]
)
def test_a_source_under_an_apache_release_that_may_not_be_there_is_said_at_the_release_s_line(source: str) -> None:
    assert ("license-conflict", 20) in found("apache-2.0", source, stated="apache-2.0", repo="me/Llama-Mix")


@pytest.mark.parametrize("source", ["mit", "cc-by-4.0", "apache-2.0", "other"])
def test_a_source_that_allows_it_is_no_conflict(source: str) -> None:
    assert found("apache-2.0", source, stated="apache-2.0") == []


def test_gpl_2_cannot_carry_what_is_under_apache() -> None:
    assert ("license-conflict", 20) in found("apache-2.0", "gpl-2.0", stated="gpl-2.0")
    assert found("apache-2.0", "gpl-3.0", stated="gpl-3.0") == []


def test_a_stated_licence_that_carries_the_source_s_terms_is_no_conflict() -> None:
    assert found("llama2", "apache-2.0", stated="llama2") == []
    assert found("cc-by-nc-4.0", "apache-2.0", stated="cc-by-nc-sa-4.0") == []
    assert found("llama2", "cc-by-nc-4.0", stated="other") == []


def test_a_merge_of_what_forbids_changes_may_not_be_published() -> None:
    assert ("license-forbids-merges", 2) in found("apache-2.0", "cc-by-nc-nd-4.0")
    assert ("license-forbids-merges", 2) in found("apache-2.0", "cc-by-nd-4.0", stated="other")
    assert found("apache-2.0", "cc-by-nd-4.0", stated="other", repo=None) == []


def test_licences_that_do_not_make_one_ask_for_a_decision_at_the_release() -> None:
    assert found("llama2", "cc-by-nc-4.0") == [("license-undecided", 30)]


def test_a_licence_that_is_not_stated_is_said_once_and_only_of_models_on_the_hub() -> None:
    assert found("apache-2.0", None, "unknown") == [("license-unknown", 2)]
    assert found("apache-2.0", None, hub=False) == []


def test_a_llama_3_source_asks_for_a_name_that_begins_with_llama() -> None:
    assert found("llama3.1", repo="me/Mix-8B") == [("llama-name", 30)]
    assert found("llama3.1", repo="me/Llama-3.1-Mix") == []
    assert found("llama2", repo="me/Mix-7B") == []
    assert found("llama3.1", repo=None) == []
