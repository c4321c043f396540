"""The recipe: mergekit-moe's configuration, unchanged, and our own optional sections.

A recipe is untrusted. It is parsed into frozen pydantic models; everything wrong with it becomes a finding with the line it
stands at. mergekit's keys and their meaning: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, ValidationError

from merge import findings as f
from merge import yaml_file
from merge.errors import RecipeError
from merge.recipe_evals import Evals
from merge.recipe_types import LIST, Line, Markdown, Number, Prompt, Section, as_text
from merge.reference import ModelReference, parse_reference
from merge.yaml_file import Document

DISCRIMINANT = "discriminant"
GATE_MODES = (DISCRIMINANT, "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
RANDOM_GATES = ("random", "uniform_random")
DTYPES = ("bfloat16", "float16", "float32")
QUANTS = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_0", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
DEFAULT_QUANTS = ("Q8_0", "Q4_K_M")
# Of a recipe with more mistakes than anyone mends at once.
MAX_FINDINGS = 200
# Keys of mergekit's other merge methods that recipes in the wild carry along; mergekit-moe ignores them.
MERGEKIT_KEYS = frozenset(
    {"merge_method", "models", "slices", "parameters", "tokenizer", "tokenizer_source", "chat_template", "name"}
)
# The sections of a model card (cards/sections.py has their headings).
CARD_SECTIONS = (
    "quickstart", "experts", "architecture", "evaluation", "comparison", "samples", "gguf", "router", "explainer",
    "limitations", "licence", "recipe", "provenance", "sponsor",
)  # fmt: skip
# The weights of language models have about this standard deviation.
WEIGHT_STD = 0.02

_REPO = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
Repository = Annotated[str, StringConstraints(pattern=rf"^{_REPO}/{_REPO}$", max_length=96 * 2 + 1)]


class PromptSlice(Section):
    """The first texts of a file of a dataset on the Hub."""

    dataset: Line = Field(description="owner/name, or owner/name@revision")
    file: Line = Field(description="a .jsonl, .json, .csv or .txt file of it")
    field: Line = Field("text", description="the key, or the column, that has the text")
    limit: int = Field(64, ge=1, le=10_000, description="how many texts are taken, from the file's beginning")


class Expert(Section):
    """One expert: a dense model whose MLPs become an expert of every layer, or one expert of a mixture of the same family."""

    source_model: str = Field(
        description="owner/name, owner/name@revision, or a local folder; model+adapter with a LoRA adapter"
    )
    positive_prompts: Annotated[tuple[Prompt, ...], LIST] = Field((), description="text that should go to this expert")
    negative_prompts: Annotated[tuple[Prompt, ...], LIST] = Field((), description="text that should not")
    noise_scale: Number | None = Field(
        None, ge=0, le=10, description="standard deviation of noise added to each weight"
    )
    residual_scale: Number | None = Field(
        None, ge=-10, le=10, description="factor on the expert's output (down projection)"
    )
    expert: int | None = Field(None, ge=0, description="which expert of a mixture-of-experts source, from 0")
    prompts_file: Line | None = Field(None, description="a file of prompts beside the recipe")
    prompts: PromptSlice | None = Field(None, description="prompts from a file of a dataset on the Hub")
    role: Line | None = Field(None, description="what this expert is for, in a word or two; shown in the card")

    @property
    def has_prompts(self) -> bool:
        """Whether it names prompts of its own, written out or in a file."""
        return bool(self.positive_prompts) or self.prompts_file is not None or self.prompts is not None


class Release(Section):
    """Where and how the result is published."""

    repo: Repository | None = Field(None, description="owner/name on the Hub; the GGUF goes to owner/name-GGUF")
    license: Line | None = Field(None, description="the Hub's licence id, e.g. apache-2.0")
    license_name: Line | None = None
    license_link: Line | None = None
    language: Annotated[tuple[Line, ...], LIST] = Field((), max_length=200)
    tags: Annotated[tuple[Line, ...], LIST] = Field((), max_length=100)
    quants: Annotated[tuple[Literal[QUANTS], ...], LIST, Field(max_length=len(QUANTS))] = Field(  # type: ignore[valid-type]
        DEFAULT_QUANTS, description="GGUF types to make"
    )
    private: bool = False
    private_first: bool = Field(False, description="private until all of the release is there, then public")
    gated: Literal["auto", "manual"] | None = Field(None, description="readers must ask: let in at once, or by hand")
    collection: Line | None = Field(
        None, description="a collection of the owner's, by title or slug, to add both repositories to"
    )
    replaces: Repository | None = Field(
        None, description="an earlier model, whose card will name this one as its new version"
    )
    create_pr: bool = Field(False, description="open a pull request on the Hub instead of committing")
    version: Annotated[Line, BeforeValidator(as_text)] | None = None


class Build(Section):
    """On what machine, and with which seed."""

    runner: Line | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_disk: Line | None = Field(None, description="the most disk a published build may take, such as 14GB")
    seed: int = Field(0, ge=0, lt=2**63)


class Router(Section):
    """How the router is calibrated."""

    expand: bool | Literal["base", "experts"] | None = Field(
        None,
        description="who writes text from prompts of a few words: the base (also true), each expert, or nobody (false)",
    )
    prompts_file: Line | None = Field(
        None, description="a file beside the recipe with prompts of several experts, by their role or number"
    )
    regularisation: Number | None = Field(
        None,
        gt=0,
        description="the ridge, in units of the mean square activation; chosen on held-out prompts where absent",
    )


class Card(Section):
    """Text for the model card. Markdown, never template source."""

    title: Line | None = None
    description: Markdown | None = None
    image: Line | None = Field(None, description="a PNG, JPEG, GIF or WebP file beside the recipe")
    sections: dict[Line, Markdown | bool] | None = Field(
        None,
        max_length=50,
        description="by section: false leaves it out, true puts it in, a text fills it; a new name is a new section",
    )
    order: Annotated[tuple[Line, ...], LIST] | None = Field(
        None, max_length=50, description="the sections that come first, in this order"
    )
    sponsor: Markdown | None = Field(None, description="a word about who made the model possible")


class Recipe(Section):
    """A mixture-of-experts model to be built: mergekit-moe's keys, and the sections release, build, router, card, evals."""

    base_model: str = Field(
        description="the model that gives everything but the experts, or the mixture that they are added to: owner/name or a folder"
    )
    experts: Annotated[tuple[Expert, ...], LIST] = Field(min_length=1, max_length=1024)
    gate_mode: Literal[GATE_MODES] = Field("hidden", description="how the router is made from the prompts")  # type: ignore[valid-type]
    dtype: Literal[DTYPES] | None = Field(None, description="the result's dtype; the base's own where absent")  # type: ignore[valid-type]
    experts_per_token: int = Field(2, ge=1, le=1024, description="experts that each token is sent to")
    shared_experts: Annotated[tuple[Expert, ...], LIST] | None = Field(
        None, description="experts that run for every token, in families that have them"
    )
    architecture: Line | None = Field(None, description="the family of the result; chosen by the base where absent")
    release: Release = Release()
    build: Build = Build()
    router: Router = Router()
    card: Card = Card()
    evals: Evals = Evals()

    @property
    def needs_prompts(self) -> bool:
        return self.gate_mode not in RANDOM_GATES

    @property
    def files(self) -> tuple[str, ...]:
        """The files beside the recipe that it names: prompts, texts, results, an image."""
        named = [expert.prompts_file for expert in (*self.experts, *(self.shared_experts or ()))]
        named += [self.router.prompts_file, self.card.image]
        return tuple(dict.fromkeys([*filter(None, named), *self.evals.files]))

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """The models of the recipe in order, the base first, each once."""
        experts = (*self.experts, *(self.shared_experts or ()))
        texts = [self.base_model, *(expert.source_model for expert in experts)]
        return tuple(dict.fromkeys(parse_reference(text) for text in texts))

    def identity(self) -> str:
        """SHA-256 of what the recipe says: comments, key order and formatting do not change it."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class LoadedRecipe:
    """A recipe with the file it came from: its path, its lines, its text, and what was found in it."""

    def __init__(self, path: Path, recipe: Recipe, document: Document, found: tuple[f.Finding, ...], text: str) -> None:
        self.path = path
        self.recipe = recipe
        self.document = document
        self.findings = found
        self.text = text

    @property
    def name(self) -> str:
        """The model's name: the repository's, or the file's."""
        repo = self.recipe.release.repo
        return repo.split("/")[1] if repo else self.path.stem

    @property
    def folder(self) -> Path:
        """Where relative paths of the recipe begin."""
        return self.path.parent

    def line(self, *path: str | int) -> int | None:
        return self.document.line(path)


def load_recipe(path: Path) -> LoadedRecipe:
    """Read, check and parse a recipe file. Raises RecipeError with every finding where there is an error among them."""
    try:
        with path.open("rb") as file:
            raw = file.read(yaml_file.MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([f.NotReadable(problem=error.strerror or str(error))], str(path)) from None
    return parse_recipe(raw, path)


def parse_recipe(raw: bytes, path: Path) -> LoadedRecipe:
    """Parse a recipe's bytes; `path` is shown in messages. Raises RecipeError."""
    return parse_document(yaml_file.load(raw, str(path)), raw, path)


def parse_document(document: Document, raw: bytes, path: Path) -> LoadedRecipe:
    """Parse the YAML document of a recipe's bytes. Raises RecipeError."""
    if not isinstance(document.value, dict):
        raise RecipeError([f.NotARecipe(1, found=_kind(document.value))], str(path))
    value = {key: item for key, item in document.value.items() if key not in MERGEKIT_KEYS}
    ignored = [f.IgnoredKey(document.line((key,)), key=key) for key in document.value if key in MERGEKIT_KEYS]
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        problems = [problem for problem in error.errors(include_url=False) if not _is_echo(problem)]
        found = [_from_pydantic(dict(problem), document) for problem in problems[:MAX_FINDINGS]]
        if len(problems) > MAX_FINDINGS:
            found.append(f.TooManyMistakes(1, count=len(problems) - MAX_FINDINGS))
        unique = list(dict.fromkeys(found))
        raise RecipeError(sorted([*ignored, *unique], key=_by_line), str(path)) from None
    found = sorted([*ignored, *_check(recipe, document)], key=_by_line)
    if any(finding.level == f.ERROR for finding in found):
        raise RecipeError(found, str(path))
    return LoadedRecipe(path, recipe, document, tuple(found), raw.decode("utf-8-sig"))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "moerge recipe"
    return schema


def _by_line(finding: f.Finding) -> int:
    return finding.line or 0


def _check(recipe: Recipe, document: Document) -> Iterator[f.Finding]:
    """What is wrong or doubtful in a recipe that is well formed."""
    yield from _check_references(recipe, document)
    yield from _check_prompts(recipe, document)
    yield from _check_card(recipe.card, document)
    for section, index, expert in _all_experts(recipe):
        if expert.noise_scale is not None and expert.noise_scale >= WEIGHT_STD:
            line = document.line((section, index, "noise_scale"))
            yield f.LargeNoise(line, value=expert.noise_scale, expert=_where((section, index)))
    for key in ("expand", "regularisation"):
        if getattr(recipe.router, key) is not None and recipe.gate_mode != DISCRIMINANT:
            yield f.OnlyForDiscriminant(document.line(("router", key)), key=f"router.{key}", mode=recipe.gate_mode)


def _all_experts(recipe: Recipe) -> Iterator[tuple[str, int, Expert]]:
    """Every expert with the section and the place in it where it stands."""
    for section, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts or ())):
        for index, expert in enumerate(experts):
            yield section, index, expert


def _check_references(recipe: Recipe, document: Document) -> Iterator[f.Finding]:
    places: list[tuple[yaml_file.Path, str]] = [(("base_model",), recipe.base_model)]
    places += [((key, index, "source_model"), expert.source_model) for key, index, expert in _all_experts(recipe)]
    for place, text in places:
        try:
            parse_reference(text)
        except ValueError as error:
            yield f.BadModelReference(document.line(place), value=text, problem=str(error))


def _check_card(card: Card, document: Document) -> Iterator[f.Finding]:
    sections = card.sections or {}
    own = {name for name, text in sections.items() if isinstance(text, str)}
    named: list[tuple[str, str, yaml_file.Path]] = [
        ("sections", name, ("card", "sections", name)) for name in sections if name not in own
    ]
    named += [
        ("order", name, ("card", "order", number)) for number, name in enumerate(card.order or ()) if name not in own
    ]
    for key, name, place in named:
        if name not in CARD_SECTIONS:
            hint = _hint(name, CARD_SECTIONS)
            yield f.UnknownCardSection(
                document.line(place), key=f"card.{key}", name=name, hint=hint, known=", ".join(CARD_SECTIONS)
            )


def _check_prompts(recipe: Recipe, document: Document) -> Iterator[f.Finding]:
    for section, index, expert in _all_experts(recipe):
        for key in ("positive_prompts", "negative_prompts"):
            for number, prompt in enumerate(getattr(expert, key)):
                if not prompt.strip():
                    line = document.line((section, index, key, number))
                    yield f.EmptyPrompt(line, index=number + 1, expert=_where((section, index)))
    if not recipe.needs_prompts:
        if any(expert.has_prompts for expert in recipe.experts):
            yield f.UnusedPrompts(document.line(("gate_mode",)), mode=recipe.gate_mode)
        return
    for index, expert in enumerate(recipe.experts):
        if not (expert.has_prompts or recipe.router.prompts_file):
            yield f.PromptsMissing(document.line(("experts", index)), number=index + 1, mode=recipe.gate_mode)
    if recipe.router.prompts_file:
        return
    # A file's name stands for what is in it.
    prompts = [
        (
            expert.positive_prompts + tuple(str(x) for x in (expert.prompts_file, expert.prompts) if x is not None),
            expert.negative_prompts,
        )
        for expert in recipe.experts
    ]
    if len(prompts) > 1 and prompts[0][0] and len(set(prompts)) == 1:
        yield f.IdenticalPrompts(document.line(("experts",)))
        return
    first_with: dict[Any, int] = {}
    for index, pair in enumerate(prompts):
        if pair[0] and pair in first_with:
            line = document.line(("experts", index, "positive_prompts"))
            yield f.SamePromptsTwice(line, first=first_with[pair] + 1, second=index + 1)
        first_with.setdefault(pair, index)


# ------------------------------------------------------------------------------------- pydantic's errors, in our own words

_EXPECTED = {
    "string_type": "a text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "model_attributes_type": "a mapping", "float_parsing": "a number",
    "int_parsing": "a whole number", "finite_number": "a finite number",
}  # fmt: skip
_CHOICES = {
    "gate_mode": GATE_MODES, "dtype": DTYPES, "quants": QUANTS, "device": ("auto", "cpu", "cuda"),
    "gated": ("auto", "manual"),
    "expand": ("true", "false", "base", "experts"),
}  # fmt: skip


def _is_echo(problem: Any) -> bool:
    """pydantic also calls a list too short when its items failed; the items' own errors say it better."""
    return bool(problem["type"] == "too_short" and problem["input"])


def _from_pydantic(problem: dict[str, Any], document: Document) -> f.Finding:
    # Parts of the location that name a branch of a union are not part of the document.
    path = _document_path(problem["loc"], document.value)
    line = document.line(path)
    key = _dotted(path)
    kind, value = problem["type"], problem.get("input")
    leaf = next((part for part in reversed(path) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return f.UnknownKey(
            line, key=str(path[-1]), what=_where(path[:-1]), hint=_hint(str(path[-1]), _keys_at(path[:-1]))
        )
    if kind == "missing":
        # pydantic names the missing key itself; the line is that of the mapping that lacks it.
        return f.MissingKey(line, key=str(problem["loc"][-1]), what=_where(path))
    if leaf in _CHOICES and (kind == "literal_error" or isinstance(value, str)):
        choices = _CHOICES[leaf]
        word = document.written.get(path, str(value))
        return f.UnknownValue(line, key=key, value=word, hint=_hint(word, choices), choices=", ".join(choices))
    if kind in _EXPECTED:
        written = document.written.get(path)
        hint = "; put it in quotes" if _EXPECTED[kind] == "a text" and written is not None and value is not None else ""
        found = _kind(value) if written is None or value is None else f"{written!r}, which YAML reads as {_kind(value)}"
        if isinstance(value, str):
            found = f"the text {value!r}"
        return f.WrongType(line, key=key, expected=_EXPECTED[kind], found=found, hint=hint)
    if kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        context = problem["ctx"]
        sign = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}[next(iter(context))]
        return f.OutOfRange(
            line, key=key, value=str(value), problem=f"it must be {sign} {next(iter(context.values()))}"
        )
    if kind == "too_short":
        return f.OutOfRange(line, key=key, value="empty", problem="at least one is needed")
    if kind == "too_long":
        return f.OutOfRange(
            line, key=key, value="a long list", problem=f"at most {problem['ctx']['max_length']} are allowed"
        )
    if leaf in ("repo", "replaces"):
        return f.BadRepository(line, value=str(value))
    if kind == "string_too_long":
        return f.BadText(line, key=key, problem=f"is longer than {problem['ctx']['max_length']} characters")
    if kind == "string_too_short":
        return f.BadText(line, key=key, problem="is empty")
    if kind == "string_pattern_mismatch" and leaf in ("url", "details"):
        return f.BadText(line, key=key, problem="must be a web address (https://…)")
    if kind == "string_pattern_mismatch" and path[:2] == ("evals", "tasks"):
        return f.BadText(line, key=key, problem="must be letters, digits, - and _")
    if kind == "string_pattern_mismatch":
        return f.BadText(line, key=key, problem="must be one line without control characters")
    return f.WrongType(line, key=key, expected=f"something else ({problem['msg']})", found=_kind(value), hint="")


def _document_path(loc: tuple[str | int, ...], value: Any) -> yaml_file.Path:
    """The part of pydantic's location that exists in the document."""
    path: list[str | int] = []
    for part in loc:
        inside_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside_list or (isinstance(value, dict) and part in value):
            path.append(part)
            value = value[part]
    return tuple(path)


def _dotted(path: yaml_file.Path) -> str:
    """`experts[2].source_model`, experts counted from 1 as people do."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the recipe"


def _where(path: yaml_file.Path) -> str:
    if not path:
        return "the recipe"
    if path[0] in ("experts", "shared_experts") and len(path) >= 2 and isinstance(path[1], int):
        return f"{'shared ' if path[0] == 'shared_experts' else ''}expert {path[1] + 1}"
    return _dotted(path)


_SECTIONS: dict[str, type[BaseModel]] = {
    "release": Release, "build": Build, "router": Router, "card": Card, "evals": Evals,
}  # fmt: skip


def _keys_at(path: yaml_file.Path) -> list[str]:
    model: type[BaseModel] = Recipe
    if path and path[0] in ("experts", "shared_experts"):
        model = PromptSlice if path[-1] == "prompts" else Expert
    elif len(path) == 1:
        model = _SECTIONS[str(path[0])]
    elif path:
        return []
    return list(model.model_fields)


def _hint(word: str, known: tuple[str, ...] | list[str]) -> str:
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:100].lower(), folded, n=1, cutoff=0.6)
    return f"; perhaps you meant {folded[near[0]]!r}" if near else ""


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"
