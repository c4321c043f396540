"""The gallery of a recipe repository: every recipe with what its preview, its release on the Hub or its build here says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bot.changes import DEFAULT_GLOBS, is_recipe
from bot.evals import others_scores
from bot.globs import matcher
from bot.preview import preview_recipe
from bot.previous import published_report
from cards.gallery import BROKEN, CHANGED, PUBLISHED, UNKNOWN, UNPUBLISHED, Entry, Source, render_gallery
from cards.hub import HUB, gguf_repo, model_url
from cards.markdown import one_line
from evals.results import REPORT, Report, read_report
from evals.scores import Score
from evals.suites import SUITES, average
from merge import __version__
from merge.errors import DestinationError, RecipeError, UsageError
from merge.files import write_atomically, writing
from merge.recipe import LoadedRecipe, load_recipe
from merge.sources import Sources

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INDEX = "index.html"
AT_ONCE = 8
MAX_SUMMARY = 200


@dataclass(frozen=True)
class Places:
    """Where to look: a folder with models beside the Hub's names, builds as DIR/NAME, and the Hub (None: it is not asked)."""

    models: Path | None = None
    builds: Path | None = None
    endpoint: str | None = None
    token: str | None = None
    ask_hub: bool = True


def write_site(folder: Path, out: Path, places: Places, *, title: str | None = None, url: str | None = None) -> int:
    """Write the gallery of the recipes in `folder` to `out/index.html`. Returns how many recipes it shows.

    `url` is where the recipes' files can be seen, such as https://github.com/owner/name/blob/main. Raises UsageError where
    there are no recipes, DestinationError where the page cannot be written.
    """
    paths = recipes_in(folder)
    if not paths:
        raise UsageError(f"{folder}: no recipes in it (looked for {' and '.join(DEFAULT_GLOBS)})")
    api = _api(places) if places.ask_hub else None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        entries = list(pool.map(lambda path: entry(folder, path, places, api, url), paths))
    made = f"Made with moerge {__version__} on {datetime.now(UTC).date().isoformat()}."
    page = render_gallery(title or folder.resolve().name, entries, made)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / INDEX, page.encode())
        # GitHub Pages then serves the files as they are.
        write_atomically(out / ".nojekyll", b"")
    return len(entries)


def recipes_in(folder: Path) -> list[str]:
    """The recipes of a repository's folder, by path; found as the action finds them."""
    matches = matcher(DEFAULT_GLOBS)
    files = [path for path in folder.rglob("*.y*ml") if path.is_file() and ".git" not in path.parts]
    named = sorted(path.relative_to(folder).as_posix() for path in files)
    return [name for name in named if matches(name) and is_recipe((folder / name).read_bytes())]


def entry(folder: Path, path: str, places: Places, api: HfApi | None, url: str | None) -> Entry:
    """One recipe's row; what cannot be had is left out of it."""
    recipe_url = f"{url.rstrip('/')}/{path}" if url else None
    try:
        loaded = load_recipe(folder / path)
    except RecipeError as error:
        first = next((finding for finding in error.findings if finding.level == "error"), error.findings[0])
        line = f"line {first.line}: " if first.line else ""
        return Entry(path, Path(path).stem, BROKEN, recipe_url=recipe_url, problem=f"{line}{first.text}")
    report, status, problem = _release(loaded, places, api)
    repo = loaded.recipe.release.repo
    published = status in (PUBLISHED, CHANGED)
    row = Entry(
        path,
        loaded.name,
        status,
        summary=_summary(loaded),
        url=f"{HUB}/{repo}" if repo and published else None,
        gguf_url=f"{HUB}/{gguf_repo(repo)}" if repo and published and report and report.quants else None,
        recipe_url=recipe_url,
        version=loaded.recipe.release.version or "",
        experts=_experts(loaded),
        problem=problem,
    )
    return _measured(row, report) if report else _previewed(row, loaded, places)


def _release(loaded: LoadedRecipe, places: Places, api: HfApi | None) -> tuple[Report | None, str, str]:
    """The report of what was released or built, the status, and what could not be found out."""
    repo = loaded.recipe.release.repo
    if repo and api:
        import httpx2
        from huggingface_hub import errors

        try:
            report = published_report(api, repo)
        except (
            DestinationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx2.HTTPError, OSError,
        ) as error:  # fmt: skip
            return None, UNKNOWN, f"the Hub did not answer ({type(error).__name__})"
        if report:
            same = report.recipe_identity == loaded.recipe.identity()
            return report, PUBLISHED if same else CHANGED, ""
    if places.builds and (places.builds / loaded.name / REPORT).is_file():
        try:
            return read_report(places.builds / loaded.name / REPORT), UNPUBLISHED, ""
        except (OSError, ValueError):
            return None, UNPUBLISHED, f"{loaded.name}/{REPORT} cannot be read"
    return None, UNPUBLISHED if api or not repo else UNKNOWN, ""


def _measured(row: Entry, report: Report) -> Entry:
    """The row with what a build found out."""
    mean, of = _average(report.scores)
    accuracy = [layer.accuracy for layer in report.routing if layer.accuracy is not None]
    if report.routers:
        accuracy = list(report.routers[0].accuracy)
    return replace(
        row,
        family=report.family_title,
        total=report.parameters.get("total"),
        active=report.parameters.get("active"),
        licence=one_line(report.license_name or report.license or ""),
        accuracy=sum(accuracy) / len(accuracy) if accuracy else None,
        chance=1 / len(report.experts) if accuracy and report.experts else None,
        average=mean,
        average_of=of,
        gain=gain(report),
        quants=tuple(quant.type for quant in report.quants),
    )


def _average(scores: Sequence[Score]) -> tuple[float | None, str]:
    """The first complete set's average, and what it is of; figures of one origin only make an average."""
    for origin in ("measured", "imported", "reported"):
        same = [score for score in scores if score.origin == origin]
        for suite in SUITES.values():
            mean = average(suite, same)
            if mean is not None:
                return mean, suite.title if origin == "measured" else f"{suite.title}, {origin}"
    return None, ""


def gain(report: Report) -> float | None:
    """By which share the mixture's perplexity over all texts lies below that of the best model it was made from."""
    ratio = report.perplexities.ratio if report.perplexities else None
    return None if ratio is None else 1 - ratio


def _previewed(row: Entry, loaded: LoadedRecipe, places: Places) -> Entry:
    """The row of a recipe that was not built: what its sources' headers say, and the figures that it brings along."""
    try:
        mean, of = _average(others_scores(loaded))
    except RecipeError as error:
        return replace(row, status=BROKEN, problem=error.findings[0].text)
    row = replace(row, average=mean, average_of=of)
    sources = Sources(loaded.folder, models=places.models, endpoint=places.endpoint, token=places.token)
    preview = preview_recipe(loaded.path, sources)
    if preview.plan is None or preview.parameters is None:
        errors = [finding for finding in preview.findings if finding.level == "error"]
        status = row.status if preview.source_failed else BROKEN
        return replace(row, status=status, problem=errors[0].text if errors else row.problem)
    return replace(
        row,
        family=preview.plan.family_title,
        total=preview.parameters.total,
        active=preview.parameters.active,
        licence=preview.license or "",
    )


def _experts(loaded: LoadedRecipe) -> tuple[Source, ...]:
    names: Sequence[tuple[str, str]] = [(expert.role or "", expert.source_model) for expert in loaded.recipe.experts]
    return tuple(Source(role, name, model_url(name)) for role, name in names)


def _summary(loaded: LoadedRecipe) -> str:
    """The first paragraph of the author's description, as plain words."""
    text = one_line((loaded.recipe.card.description or "").strip().split("\n\n")[0].lstrip("# "))
    return text if len(text) <= MAX_SUMMARY else text[: MAX_SUMMARY - 1] + "…"


def _api(places: Places) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=places.endpoint, token=places.token)
