from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard

from bot.hub.card import LICENSES as known_to_the_embedded_hub
from bot.hub.card import problems
from cards.hub_results import result_files
from cards.markdown import one_line
from cards.metadata import LICENSES
from cards.render import render_gguf_card, render_model_card
from evals.results import (
    CardText,
    ExpertUsed,
    FileMade,
    FindingSaid,
    LayerGroup,
    LayerRouting,
    QuantMade,
    Report,
    RouterMeasured,
    SourceUsed,
)
from tests.cards.page import Page, body, page
from tests.cards.reports import BEYONDER, GOLDEN, demo_report, golden, made, measured_report, quant, release_report

RENDER = {"model": render_model_card, "gguf": render_gguf_card}


@pytest.mark.parametrize("name", golden())
def test_cards_are_as_they_were(name: str) -> None:
    assert golden()[name] == (GOLDEN / name).read_text(encoding="utf-8"), (
        "python -m tests.cards.reports, if it is meant"
    )


@pytest.mark.parametrize("render", RENDER.values(), ids=RENDER)
def test_the_same_report_gives_the_same_card(render: Any) -> None:
    assert render(release_report()) == render(release_report())


# ---------------------------------------------------------------------------------------------------------- front matter


def test_metadata_of_a_release_is_what_the_hub_reads_back() -> None:
    assert ModelCard(render_model_card(release_report())).data.to_dict() == {
        "base_model": list(BEYONDER),
        "base_model_relation": "merge",
        "language": ["en", "fr"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "cc-by-nc-4.0-and-more",
        "license_link": "https://creativecommons.org/licenses/by-nc/4.0/",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "frankenmoe", "merge", "beyonder", "role-play"],
    }


def test_metadata_of_gguf_files_name_the_merge_and_no_library() -> None:
    data = ModelCard(render_gguf_card(release_report())).data.to_dict()
    assert data["base_model"] == ["mlabonne/Beyonder-4x7B-v3"]
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["gguf", "moe", "frankenmoe", "merge", "beyonder", "role-play"]
    assert "library_name" not in data


def test_local_folders_are_no_base_models() -> None:
    for render in RENDER.values():
        data = ModelCard(render(demo_report())).data.to_dict()
        assert not {"base_model", "base_model_relation", "license", "language"} & set(data)
    mixed = replace(demo_report(), sources=(*demo_report().sources, SourceUsed("a/b@v1", "0" * 40, "", None, 1, 1)))
    assert ModelCard(render_model_card(mixed)).data.base_model == ["a/b"]


@pytest.mark.parametrize(
    ("given", "name", "place", "expected"),
    [
        ("apache-2.0", None, None, {"license": "apache-2.0"}),
        ("Apache-2.0", None, None, {"license": "apache-2.0"}),
        ("My Own, v1", None, None, {"license": "other", "license_name": "my-own-v1"}),
        ("other", "yi", "LICENSE", {"license": "other", "license_name": "yi", "license_link": "LICENSE"}),
        (None, "yi", "javascript:x", {"license": "other", "license_name": "yi"}),
        (None, None, "https://x.org", {}),
    ],
)
def test_a_licence_the_hub_does_not_know_is_other(
    given: str | None, name: str | None, place: str | None, expected: dict[str, str]
) -> None:
    report = replace(demo_report(), license=given, license_name=name, license_link=place)
    data = ModelCard(render_model_card(report)).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


@pytest.mark.parametrize("report", [demo_report(), release_report()], ids=["demo", "release"])
@pytest.mark.parametrize("render", RENDER.values(), ids=RENDER)
def test_the_embedded_hub_takes_the_cards(render: Any, report: Report) -> None:
    errors, _ = problems(render(report))
    assert not errors
    assert known_to_the_embedded_hub == LICENSES


def test_a_word_that_is_no_language_is_left_out() -> None:
    report = replace(demo_report(), language=("en", "zh-Hans", "<b>", "english language", "en"))
    assert ModelCard(render_model_card(report)).data.language == ["en", "zh-Hans"]


# ------------------------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("report", [demo_report(), release_report()], ids=["demo", "release"])
@pytest.mark.parametrize("render", RENDER.values(), ids=RENDER)
def test_every_link_is_whole(render: Any, report: Report) -> None:
    hosts = {"huggingface.co", "docs.vllm.ai", "github.com", "ollama.com", "lmstudio.ai", "creativecommons.org"}
    links = page(body(render(report))).links
    assert links
    for link in links:
        parts = urlsplit(link)
        assert parts.scheme == "https"
        assert parts.netloc in hosts
        assert re.fullmatch(r"[\w./-]*", parts.path)
        assert not parts.query
        assert not parts.fragment


def test_experts_are_linked_at_their_pinned_commits() -> None:
    links = page(body(render_model_card(release_report()))).links
    for source in release_report().sources:
        assert f"https://huggingface.co/{source.name}/tree/{source.commit}" in links


def test_an_expert_named_with_a_revision_is_linked_at_its_commit() -> None:
    source = SourceUsed("a/b@v1", "0123456789" * 4, "", "mit", 1, 1)
    expert = ExpertUsed("a/b@v1", None, (), ())
    report = replace(release_report(), base="a/b@v1", sources=(source,), experts=(expert, expert))
    card = page(body(render_model_card(report)))
    assert f"https://huggingface.co/a/b/tree/{source.commit}" in card.links


def test_quants_are_linked_in_their_own_repository() -> None:
    links = page(body(render_model_card(release_report()))).links
    place = "https://huggingface.co/mlabonne/Beyonder-4x7B-v3-GGUF"
    assert place in links
    for made_quant in release_report().quants:
        assert f"{place}/blob/main/{made_quant.file.name}" in links


# ------------------------------------------------------------------------------------------------------------ no holes


def variants() -> dict[str, Report]:
    release, demo = release_report(), demo_report()
    same = ExpertUsed("a/b", None, (), ())
    no_pair = LayerRouting(0, 1.0, float("nan"), None)
    return {
        "demo": demo,
        "release": release,
        "no repository": replace(release, repo=None),
        "an impossible repository": replace(release, repo="../x y"),
        "no quants": replace(release, quants=()),
        "no quants, no repository": replace(demo, quants=()),
        "no licence": replace(release, license=None, license_name=None, license_link=None),
        "a licence without a link": replace(release, license="mit", license_name=None, license_link=None),
        "a licence in a file": replace(release, license_link="LICENSE"),
        "a licence in a file of no repository": replace(release, repo=None, license_link="LICENSE"),
        "no routing": replace(release, routing=()),
        "random": replace(release, gate_mode="random"),
        "an unheard-of gate mode": replace(release, gate_mode="of tomorrow"),
        "a discriminant without held-out text": replace(release, gate_mode="discriminant"),
        "a measured router": replace(measured_report(), card=CardText()),
        "one expert": replace(demo, experts=demo.experts[:1], experts_per_token=1, routing=(no_pair,)),
        "the base many times": replace(release, base="a/b", experts=(same,) * 16, gate_mode="random"),
        "unknown sources": replace(release, sources=()),
        "no files, no identities": replace(demo, files=(), recipe_identity="", gates_key=""),
        "no counts": replace(demo, parameters={}),
        "a type of tomorrow": replace(release, quants=(quant("x", "IQ9_Z", 10, 9.9, sample="", proof=""),)),
        "a split file": replace(release, quants=(QuantMade(made("x-00001-of-00002.gguf", 1), "BF16", 16, 1, "ran", "", ""),)),
        "a long recipe": replace(release, recipe_text="# line\n\n\n" * 100),
        "blank texts": replace(release, title=" ", description=" \n", license_name=" ", license=" "),
    }  # fmt: skip


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("render", RENDER.values(), ids=RENDER)
def test_what_is_not_known_leaves_no_hole(render: Any, name: str) -> None:
    card = render(variants()[name])
    text = body(card)
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "code", text)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|undefined|\(\)|\[\]|(?<!`)``(?!`)", outside)
    assert "\n\n\n" not in outside
    assert not re.search(r"[ \t]$|\| *\|", outside, re.MULTILINE)
    headings = [line for line in outside.splitlines() if line.strip()]
    for heading, following in zip(headings, [*headings[1:], "#"], strict=True):
        assert not (heading.startswith("#") and following.startswith("#")), f"nothing under {heading}"
    assert not re.search(r"^\|[ |-]+\|\n(?!\|)", outside, re.MULTILINE), "a table without rows"
    assert text.endswith("\n")
    assert balanced(page(text))


def balanced(seen: Page) -> bool:
    open_tags: list[str] = []
    for tag, *_ in seen.tags:
        if tag.lstrip("/") in ("br", "hr", "img"):
            continue
        if not tag.startswith("/"):
            open_tags.append(tag)
        elif not open_tags or open_tags.pop() != tag[1:]:
            return False
    return not open_tags


def test_commands_name_this_repository_and_work_without_one_or_are_left_out() -> None:
    card = render_model_card(release_report())
    for command in (
        'from_pretrained("mlabonne/Beyonder-4x7B-v3")',
        "vllm serve mlabonne/Beyonder-4x7B-v3\n",
        "llama-cli -hf mlabonne/Beyonder-4x7B-v3-GGUF:Q4_K_M\n",
        "ollama run hf.co/mlabonne/Beyonder-4x7B-v3-GGUF:Q4_K_M\n",
    ):
        assert command in card
    local = render_model_card(demo_report()) + render_gguf_card(demo_report())
    assert not re.search(r"-hf |ollama|hf\.co|huggingface\.co/demo", local)
    assert "llama-cli -m ./demo-2x135M-Q4_K_M.gguf" in local


def test_commands_take_a_type_that_was_made() -> None:
    report = replace(release_report(), quants=(quant("x", "F16", 10, 16.0), quant("x", "Q8_0", 5, 8.5)))
    assert "GGUF:Q8_0" in render_model_card(report)
    assert "llama" not in render_model_card(replace(report, quants=())).lower()


def test_a_file_name_cannot_run_a_command() -> None:
    file = made("x; rm -rf ~ `id` $(id).gguf", 1)
    report = replace(demo_report(), quants=(QuantMade(file, "Q8_0", 8.5, 1, "ran", "p", "s"),))
    assert f"llama-cli -m './{file.name}' -p" in render_gguf_card(report)


# --------------------------------------------------------------------------------------------------- what the cards tell


def told(report: Report) -> str:
    return page(body(render_model_card(report))).words


def test_the_summary_is_in_words() -> None:
    summary = (
        "Beyonder-4x7B-v3 is a mixture-of-experts language model of the Mixtral family. It was merged from 4 dense models "
        "and has 4 experts in every layer, 2 of which work on each token. The model has 24.15 B parameters, 12.88 B of "
        "them active for a token, is stored in bfloat16, and has a context of 32,768 tokens."
    )
    assert summary in told(release_report())
    assert "which all work on each token" in told(demo_report())


def test_layers_whose_experts_are_hard_to_tell_apart_are_named() -> None:
    assert "In 4 of 32 layers (0 to 3), some experts are hard to tell apart" in told(release_report())
    assert "layer 2, where expert 1 (chat) and expert 4 (math) are the closest" in told(release_report())
    assert "In none of the 4 layers" in told(demo_report())
    one = (LayerRouting(0, 1.0, 0.1, (0, 1)), LayerRouting(1, 6.0, 0.1, (0, 1)))
    assert "In layer 1 of 2, some experts" in told(replace(demo_report(), routing=one))
    assert "In every layer, some experts" in told(replace(demo_report(), routing=one[1:]))


def many_experts(count: int) -> Report:
    """A measured discriminant of so many experts, of whose text 1 %, 2 %, ... find its expert."""
    report = measured_report()
    matrix = tuple(tuple((i + 1) / 100 if i == j else 0.0 for j in range(count)) for i in range(count))
    even = (1 / count,) * count
    router = RouterMeasured(
        "discriminant",
        (0.9,) * 4,
        (even,) * 4,
        (0.5,) * 4,
        (0.8,) * 4,
        (LayerGroup(0, 1, matrix), LayerGroup(2, 3, matrix)),
    )
    experts = (report.experts * count)[:count]
    return replace(report, gate_mode="discriminant", experts=experts, routers=(router,), card=CardText())


@pytest.mark.parametrize(("count", "whole"), [(8, True), (9, False)])
def test_of_more_experts_than_can_be_read_only_the_matrix_s_diagonal_is_shown(count: int, whole: bool) -> None:
    text = told(many_experts(count))
    assert ("where each expert's held-out text goes" in text) is whole
    assert ("the share of each expert's held-out text that finds it" in text) is not whole
    assert f" {count}.0 " in text
    assert (" 0.0 " in text) is whole
    assert "hard to tell apart" not in text


def test_a_router_that_was_not_measured_is_not_judged_by_vectors_that_sum_to_zero() -> None:
    """Those of a discriminant do, and those of a base that is a mixture may."""
    nothing = told(replace(release_report(), gate_mode="discriminant"))
    kept = replace(release_report().experts[0], kept=True)
    added = told(replace(release_report(), experts=(kept, *release_report().experts[1:])))
    for text, why in ((nothing, "the prompts left no text"), (added, "the experts kept from the base")):
        assert "condition number" not in text.lower()
        assert "hard to tell apart" not in text
        assert why in text
    assert "that of the base for each expert kept from it" in added


def test_how_a_file_was_proven_is_said_of_each() -> None:
    text = told(release_report())
    assert text.count(" ran in llama.cpp ") == 2
    assert " checked; a few layers ran " in text
    assert "the whole file was loaded there and generated" in text
    assert "a copy cut to a few layers generated in llama.cpp" in text


def test_only_files_that_ran_show_what_they_generated() -> None:
    texts = body(render_gguf_card(release_report())).split("## What the files generated")[1]
    assert "Q8_0.gguf" in texts
    assert "BF16.gguf" not in texts


def test_warnings_of_the_build_are_limitations_and_notices_are_not() -> None:
    assert "A warning given at the build: the prompts of expert 1 are single words" in told(release_report())
    assert "not for the card" not in told(release_report())


def test_copies_of_the_base_are_called_that() -> None:
    expert = ExpertUsed("a/b", None, (), ())
    report = replace(release_report(), base="a/b", experts=(expert,) * 16, gate_mode="random")
    assert "It was merged from one dense model" in told(report)
    assert "All experts are the base model's own MLP" in told(report)
    noisy = replace(report, experts=(*report.experts, replace(expert, noise_scale=0.01)))
    assert "All experts are the base model's own MLP" not in told(noisy)


def test_the_recipe_stands_in_the_card_to_the_letter() -> None:
    recipe = "# a comment with ``` and ````\nbase_model: x\n\n\n\nexperts: []\n"
    assert f"\n`````yaml\n{recipe}`````\n" in render_model_card(replace(release_report(), recipe_text=recipe))


# ---------------------------------------------------------------------------------------------------------- hostile text

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</summary></details><h1>owned</h1>",
    "<!-- hidden",
    "a | b | c |\n| --- | --- |\n| x | y |",
    "---\nlicense: mit\ntags: [owned]\n---",
    "@everyone and @mlabonne, mail a@b.org",
    "{{ 7 * 7 }} {% for x in y %} {# no #} {{ card.repo }}",
    "![x](https://evil.org/track.png)",
    "[click](javascript:alert(1)) [x][y]\n\n[y]: https://evil.org",
    "https://evil.org www.evil.org evil.org mailto:a@evil.org",
    "`code` ``` ```` `",
    "```\n# owned\n```\n# owned",
    "~~~\nowned",
    "# owned\n## owned\nowned\n===",
    "- owned\n1. owned\n> owned",
    "**bold** _em_ ~~gone~~ <b>x</b> &lt;b&gt; &#60;b&#62;",
    "$$x$$ \\(x\\) \\[x\\] \\| \\",
    "\u202egnp.exe \u2066 \x00 \x1b[31m \x7f",
    "[^1] [^1]: owned :smile: #1 owner/name#1",
)
WORD = "harmless"


def benign(text: str) -> str:
    """A text of the same lines that means nothing, so that what differs between the cards came from `text`."""
    return re.sub(r"[^\n]+", WORD, text)


def with_text(report: Report, place: str, text: str) -> Report:
    """`report` with `text` in one of its places: `field`, `field.part`, or in every part of a tuple."""
    name, _, part = place.partition(".")
    if not part:
        value: Any = (text,) if isinstance(getattr(report, name), tuple) else text
        return replace(report, **{name: {text: 1.5} if name == "seconds" else value})
    changed = []
    for item in getattr(report, name):
        if part.startswith("file."):
            changed.append(replace(item, file=replace(item.file, **{part[5:]: text})))
        else:
            changed.append(replace(item, **{part: (text, text) if isinstance(getattr(item, part), tuple) else text}))
    return replace(report, **{name: tuple(changed)})


def places() -> list[str]:
    """Every place of a report that holds text. `description` is the author's Markdown, with laws of its own."""
    found = [f.name for f in fields(Report) if f.type in ("str", "str | None", "tuple[str, ...]")]
    parts = {
        "sources": SourceUsed,
        "experts": ExpertUsed,
        "files": FileMade,
        "quants": QuantMade,
        "findings": FindingSaid,
    }
    for name, kind in parts.items():
        found += [f"{name}.{f.name}" for f in fields(kind) if f.type in ("str", "str | None", "tuple[str, ...]")]
    return [*(set(found) - {"description"}), "quants.file.name", "quants.file.sha256", "seconds"]


def assert_harmless(hostile: Report, harmless: Report, text: str, place: str = "") -> None:
    for render in RENDER.values():
        card, expected = render(hostile), render(harmless)
        seen, wanted = page(body(card)), page(body(expected))
        assert seen.tags == wanted.tags
        assert [urlsplit(link)[:2] for link in seen.links] == [urlsplit(link)[:2] for link in wanted.links]
        assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00\x1b\x7f]", card)
        data, plain = ModelCard(card).data.to_dict(), ModelCard(expected).data.to_dict()
        assert data.keys() == plain.keys()
        assert {key for key in data if data[key] != plain[key]} <= {"tags", "license_name"}
        # Shown in one line, or as lines of a block of code: white space aside, the same letters. Revisions are cut short.
        if squeezed(benign(text)) in squeezed(wanted.words) and not place.startswith("sources."):
            assert squeezed(text) in squeezed(seen.words)
        assert not re.search(r"@\w", seen.prose)


def squeezed(text: str) -> str:
    return one_line(text).replace(" ", "")


@pytest.mark.parametrize("place", sorted(places()))
def test_hostile_text_in_any_place_stays_text(place: str) -> None:
    # All of it in one line, and all of it in many; each alone is for the test of all places.
    for text in (" ".join(map(one_line, HOSTILE)), "\n".join(HOSTILE)):
        assert_harmless(
            with_text(release_report(), place, text),
            with_text(release_report(), place, benign(text)),
            text,
            place,
        )


def test_hostile_text_in_all_places_at_once_stays_text() -> None:
    for text in HOSTILE:
        hostile = harmless = release_report()
        for place in sorted(set(places()) - {"license_link"}):  # an address there is meant to be a link
            hostile, harmless = with_text(hostile, place, text), with_text(harmless, place, benign(text))
        assert_harmless(hostile, harmless, text)


def with_evaluations(text: str) -> Report:
    """The measured release with `text` wherever its evaluations hold text of others'."""
    report = measured_report()
    assert report.perplexities
    assert report.previous
    perplexities = replace(
        report.perplexities,
        texts=(text, "code", "stories", "math"),
        models=tuple(replace(model, name=text) for model in report.perplexities.models),
    )
    scores = tuple(
        replace(
            score,
            title=text,
            metric=text,
            metric_name=text,
            harness=f"x {text}",
            date=text,
            config=text,
            source_name=text,
        )
        for score in report.scores
    )
    return replace(
        report,
        scores=scores,
        perplexities=perplexities,
        samples=tuple(replace(sample, prompt=text, greedy=text, sampled=text) for sample in report.samples),
        previous=replace(report.previous, label=text, scores=scores, perplexities=perplexities),
        recipe_files=(text,),
        card=replace(report.card, image=None),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_evaluations_stays_text(text: str) -> None:
    card, expected = render_model_card(with_evaluations(text)), render_model_card(with_evaluations(benign(text)))
    seen, wanted = page(body(card)), page(body(expected))
    # A name of letters alone may be code in another way than one with signs; nothing else may differ.
    assert [tag for tag in seen.tags if "code" not in tag[0]] == [tag for tag in wanted.tags if "code" not in tag[0]]
    assert [urlsplit(link)[:2] for link in seen.links] == [urlsplit(link)[:2] for link in wanted.links]
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00\x1b\x7f]", card)
    assert not re.search(r"@\w", seen.prose)
    assert ModelCard(card).data.to_dict().keys() == ModelCard(expected).data.to_dict().keys()
    for name, content in result_files(with_evaluations(text)).items():
        assert re.fullmatch(r"\.eval_results/[\w-]+\.yaml", name)
        assert not problems_of_yaml(content)


def problems_of_yaml(content: bytes) -> str:
    """Why the file of results cannot be read as plain YAML; nothing where it can."""
    try:
        rows = yaml.safe_load(content)
    except yaml.YAMLError as error:
        return str(error)
    return "" if all(set(row) <= {"dataset", "value", "date", "source", "notes"} for row in rows) else "other keys"


def test_a_hostile_description_leaves_the_rest_of_the_card_alone() -> None:
    plain = body(render_model_card(replace(release_report(), description=None)))
    _, sections = plain.split("\n## How to use\n")
    for text in HOSTILE:
        card = body(render_model_card(replace(release_report(), description=text)))
        assert card.endswith(sections)
        assert page(card).tags[-len(page(sections).tags) :] == page(sections).tags
        assert not {tag[0] for tag in page(card).tags} & {"script", "img", "b", "comment"}
