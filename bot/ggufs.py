"""The GGUF stage of a build: which files are missing, in how many passes they are made, what is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.quants import LARGE_PARTS, SMALL_PARTS, make_imatrix, measure_quants, open_model, quant_of, quantised
from bot.state import stage_key
from bot.work import Work
from evals.results import FileMade, QuantFailed, QuantMade, QuantsMeasured
from merge import __version__
from merge.plan import MergePlan
from merge.progress import say
from merge.recipe import LoadedRecipe
from quants.layout import wants_imatrix

if TYPE_CHECKING:
    from quants.metadata import ModelInfo


@dataclass(frozen=True)
class GgufMade:
    """What the stage leaves: the files that are part of the release, and the types that could not be. `unreached` are by
    expert the layers in which no token of the calibration text reached it."""

    quants: tuple[QuantMade, ...]
    failed: tuple[QuantFailed, ...]
    imatrix: FileMade | None
    unreached: Mapping[int, Sequence[int]]
    measured: QuantsMeasured | None


def gguf_files(work: Work) -> GgufMade:
    """The GGUF files, those that are missing made in one pass over the merged checkpoint; under `max_disk` in one each, in
    split files."""
    types, folder, plan = work.plan.quants, work.gguf, work.plan
    info = model_info(work.loaded, plan)
    limited, with_imatrix = work.loaded.recipe.build.max_disk is not None, wants_imatrix(types)
    keys = {
        name: stage_key("gguf", name, with_imatrix, limited, work.merge_key, plan.name, info, __version__)
        for name in types
    }
    missing = [name for name in types if work.state.result(f"gguf/{name}", keys[name]) is None]
    _remove_old(work, [name for name in types if name not in missing])
    imatrix, imatrix_file, unreached = _imatrix(work) if with_imatrix else (None, None, {})
    failed: list[QuantFailed] = []
    for names in [[name] for name in missing] if limited else [missing] if missing else []:
        max_bytes = SMALL_PARTS if limited else LARGE_PARTS
        for made in quantised(open_model(work.model), folder, plan.name, names, info, imatrix, max_bytes):
            if isinstance(made, QuantFailed):
                say(f"{made.type} is not part of the release: {made.reason}")
                failed.append(made)
            else:
                paths = [folder / file.name for file in made.files]
                work.state.finish(f"gguf/{made.type}", keys[made.type], paths, asdict(made))
    results = [work.state.result(f"gguf/{name}", keys[name]) for name in types]
    quants, measured = _measured(work, tuple(quant_of(result) for result in results if result is not None))
    return GgufMade(quants, tuple(failed), imatrix_file, unreached, measured)


def _imatrix(work: Work) -> tuple[Path, FileMade, dict[int, list[int]]]:
    """The importance matrix that one of the file types needs: measured on our calibration text and the recipe's prompts."""
    path = work.gguf / f"{work.plan.name}-imatrix.gguf"
    prompts = tuple(prompt for expert in work.loaded.recipe.experts for prompt in expert.positive_prompts)
    key = stage_key("imatrix", work.merge_key, prompts, __version__)
    result = work.state.result("imatrix", key)
    if result is None:
        result = make_imatrix(open_model(work.model), path, prompts, work.on_device)
        work.state.finish("imatrix", key, [path], result)
    unreached = {int(expert): layers for expert, layers in result["unreached"].items()}
    return path, FileMade(**result["file"]), unreached


def _measured(work: Work, quants: tuple[QuantMade, ...]) -> tuple[tuple[QuantMade, ...], QuantsMeasured | None]:
    """The quants with their divergence from the merged model, measured once for each set of files."""
    from quants.filetypes import FILE_TYPES

    wanted = [quant for quant in quants if FILE_TYPES[quant.type].is_quantised]
    if not wanted:
        return quants, None
    key = stage_key("quality", work.merge_key, [file for quant in wanted for file in quant.files], __version__)
    result = work.state.result("quality", key)
    if result is None:
        result = measure_quants(open_model(work.model), work.gguf, wanted, work.on_device)
        work.state.finish("quality", key, [], result)
    measured = QuantsMeasured(result["perplexity"], result["tokens"])
    return tuple(replace(quant, **result["quants"].get(quant.type, {})) for quant in quants), measured


def _remove_old(work: Work, kept: list[str]) -> None:
    """Files of an earlier recipe in this folder, which this one does not have or has otherwise."""
    folder, plan, state = work.gguf, work.plan, work.state
    keep = {f"{plan.name}-imatrix.gguf"} if wants_imatrix(plan.quants) else set()
    for stage in state.stages("gguf/"):
        if stage.removeprefix("gguf/") in kept:
            keep |= {path.rpartition("/")[2] for path in state.files(stage)}
    for stage in state.stages("gguf/"):
        if stage.removeprefix("gguf/") not in kept:
            state.drop(stage)
    if folder.is_dir():
        for path in folder.glob("*.gguf"):
            if path.name not in keep:
                path.unlink()


def model_info(loaded: LoadedRecipe, plan: MergePlan) -> ModelInfo:
    """What the GGUF metadata say of the model besides its numbers."""
    from quants.metadata import BaseModel, ModelInfo

    release = loaded.recipe.release
    bases = []
    for source in plan.sources.values():
        path = source.name.partition("@")[0]
        owner, _, name = path.rpartition("/")
        url = f"https://huggingface.co/{path}" if source.is_hub else None
        bases.append(BaseModel(name=name, organization=owner or None, version=source.commit, repo_url=url))
    return ModelInfo(
        name=loaded.recipe.card.title or plan.name,
        basename=plan.name,
        quantized_by="moerge",
        license=plan.license,
        license_name=release.license_name,
        license_link=release.license_link,
        repo_url=f"https://huggingface.co/{release.repo}" if release.repo else None,
        base_models=tuple(bases),
        tags=tuple(dict.fromkeys(("moe", "frankenmoe", "merge", *release.tags))),
        languages=release.language,
    )
