"""A build: gates, checkpoint, GGUF, report and cards, one stage after the other, each only if its inputs changed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bot.gates import gate_findings, gates_key_of, make_gates, routing_of, written_in
from bot.preview import plan_recipe
from bot.quants import LARGE_PARTS, SMALL_PARTS, make_imatrix, measure_quants, quant_of, quantised
from bot.report import planned_report, said
from bot.state import State, locked, stage_key
from cards.render import write_cards
from evals.results import REPORT, FileMade, QuantFailed, QuantMade, QuantsMeasured, Report
from merge import __version__
from merge import findings as f
from merge.checkpoint import Checkpoint
from merge.errors import DestinationError, SourceError
from merge.expr import reads
from merge.files import file_sha256, write_atomically, writing
from merge.plan import MergePlan
from merge.progress import progress, say
from merge.recipe import LoadedRecipe
from merge.source_files import open_files
from merge.sources import Sources
from merge.writer import is_cut_off, write_checkpoint
from quants.layout import wants_imatrix

if TYPE_CHECKING:
    from quants.metadata import ModelInfo

MODEL, GGUF = "model", "gguf"
# Files of DIR/model/ that the card stage writes; the rest is the checkpoint.
CARD = "README.md"
# So many of the tensors that are not numbers are named; the first tells where to look.
SAID = 5


def build(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> Report:
    """Build `loaded` into `out`: `model/`, `gguf/`, `report.json` and `state.json`.

    What an earlier run of the same inputs finished is kept. `device` overrides the recipe's. Raises RecipeError,
    SourceError, DestinationError, ProofError or UsageError; what was finished by then stays and is used by the next run.
    """
    plan = plan_recipe(loaded, sources)
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))
    with locked(out):
        return _Build(loaded, plan, sources, out, device).run()


def merge(loaded: LoadedRecipe, sources: Sources, out: Path, *, device: str | None = None) -> MergePlan:
    """The checkpoint alone, in the new folder `out`. The gates are calibrated into the folder beside it and removed."""
    from merge.gates.store import gates_path

    plan = plan_recipe(loaded, sources)
    if out.exists() and not is_cut_off(out):
        raise DestinationError(f"{out}: exists already; choose another folder, or remove it to merge again")
    local = fetched(plan, sources)
    gates = out.with_name(out.name + ".gates")
    key = gates_key_of(loaded, plan)
    path = gates_path(gates, key)
    if not path.is_file():  # a run that was cut off may have left them
        make_gates(loaded, plan, local, gates, key, device)
    make_checkpoint(plan, local, path, key, out)
    shutil.rmtree(gates)
    return plan


class _Build:
    """One build in its folder."""

    def __init__(self, loaded: LoadedRecipe, plan: MergePlan, sources: Sources, out: Path, device: str | None) -> None:
        self.loaded, self.plan, self.sources, self.out, self.device = loaded, plan, sources, out, device
        self.state = State(out)
        self.failed_quants: list[QuantFailed] = []
        self.imatrix_made: FileMade | None = None
        self.unreached: Mapping[int, Sequence[int]] = {}
        self.quants_measured: QuantsMeasured | None = None
        self.gates_key = gates_key_of(loaded, plan)
        self.merge_key = stage_key("merge", plan.identity(), self.gates_key)
        # Sources are brought to this machine at the first stage that needs them, and not at all if none does.
        self.local: Callable[[], Mapping[str, Checkpoint]] = cache(lambda: fetched(plan, sources))

    def run(self) -> Report:
        gates = self.gates()
        files = self.checkpoint(gates)
        self.check_weights()
        quants = self.quants()
        report = self.report(gates, files, quants)
        with writing(self.out):
            write_atomically(self.out / REPORT, report.to_json())
            write_cards(self.out, report)
        return report

    def gates(self) -> Path:
        from merge.gates import gates_path

        path = gates_path(self.out, self.gates_key)
        if self.state.result("gates", self.gates_key) is None:
            started = time.monotonic()
            made = make_gates(self.loaded, self.plan, self.local(), self.out, self.gates_key, self.device)
            for old in set(self.out.glob("gates-*.safetensors")) - {made}:
                old.unlink()
            self.state.finish("gates", self.gates_key, [made], {"seconds": time.monotonic() - started})
        return path

    def checkpoint(self, gates: Path) -> tuple[FileMade, ...]:
        folder = self.out / MODEL
        done = self.state.result("merge", self.merge_key)
        if done is None:
            if folder.exists():
                if not (self.state.knows("merge") or self.state.knows("merging")):
                    raise DestinationError(f"{folder}: not from a build; choose another folder, or remove it")
                # It has its name only when all of it is there; what is left after a kill is to take its checksums.
                if self.state.result("merging", self.merge_key) is None or self.state.knows("merge"):
                    shutil.rmtree(folder)
            started = time.monotonic()
            if not folder.exists() or is_cut_off(folder):
                self.state.forget("merge")
                self.state.finish("merging", self.merge_key, [], {})
                make_checkpoint(self.plan, self.local(), gates, self.gates_key, folder)
            made = sorted(path for path in folder.iterdir() if path.name != CARD)
            files = [FileMade(path.name, path.stat().st_size, file_sha256(path)) for path in made]
            done = {"seconds": time.monotonic() - started, "files": [asdict(file) for file in files]}
            self.state.finish("merge", self.merge_key, made, done)
        return tuple(FileMade(**file) for file in done["files"])

    def check_weights(self) -> None:
        """Raise SourceError where the merged model has weights that are not numbers: named with the tensors they are from."""
        key = stage_key("weights", self.merge_key, __version__)
        if self.state.result("weights", key) is not None:
            return
        from evals.weights import broken_tensors
        from merge.evaluate import checkpoint_expressions

        tensors, _, evaluator = checkpoint_expressions(self.out / MODEL)
        with progress("weights looked through", self.plan.checkpoint_bytes) as shown:
            broken = broken_tensors(tensors, evaluator, shown.advance)
        if broken:
            made_of = {tensor.name: tensor.expr for tensor in self.plan.tensors}
            named = []
            for tensor in broken[:SAID]:
                origins = {
                    f"{read.tensor} of {self.plan.sources[read.source].name}": None
                    for read in reads(made_of[tensor.name])
                }
                named.append(
                    f"{tensor.name} ({tensor.broken} of {tensor.elements}; from {', '.join(origins) or 'the gates'})"
                )
            more = f"; and {len(broken) - SAID} tensors more" if len(broken) > SAID else ""
            raise SourceError(
                f"weights that are NaN or infinite: {'; '.join(named)}{more}; no model can be made of them"
            )
        self.state.finish("weights", key, [], {})

    def quants(self) -> tuple[QuantMade, ...]:
        """The GGUF files, those that are missing made in one pass over the merged checkpoint; under `max_disk` in one
        each, in split files."""
        types, folder = self.plan.quants, self.out / GGUF
        info = model_info(self.loaded, self.plan)
        limited, with_imatrix = self.loaded.recipe.build.max_disk is not None, wants_imatrix(types)
        keys = {
            name: stage_key("gguf", name, with_imatrix, limited, self.merge_key, self.plan.name, info, __version__)
            for name in types
        }
        missing = [name for name in types if self.state.result(f"gguf/{name}", keys[name]) is None]
        self._remove_old_quants(folder, [name for name in types if name not in missing])
        imatrix = self.imatrix(types)
        for names in [[name] for name in missing] if limited else [missing] if missing else []:
            max_bytes = SMALL_PARTS if limited else LARGE_PARTS
            for made in quantised(self.out / MODEL, folder, self.plan.name, names, info, imatrix, max_bytes):
                if isinstance(made, QuantFailed):
                    say(f"{made.type} is not part of the release: {made.reason}")
                    self.failed_quants.append(made)
                else:
                    paths = [folder / file.name for file in made.files]
                    self.state.finish(f"gguf/{made.type}", keys[made.type], paths, asdict(made))
        results = [self.state.result(f"gguf/{name}", keys[name]) for name in types]
        return self.measured(tuple(quant_of(result) for result in results if result is not None))

    def imatrix(self, types: Sequence[str]) -> Path | None:
        """The importance matrix, where one of the file types needs it: measured on our calibration text and the recipe's
        prompts."""
        if not wants_imatrix(types):
            return None
        path = self.out / GGUF / f"{self.plan.name}-imatrix.gguf"
        prompts = tuple(prompt for expert in self.loaded.recipe.experts for prompt in expert.positive_prompts)
        key = stage_key("imatrix", self.merge_key, prompts, __version__)
        result = self.state.result("imatrix", key)
        if result is None:
            result = make_imatrix(self.out / MODEL, path, prompts, self.on_device)
            self.state.finish("imatrix", key, [path], result)
        self.imatrix_made = FileMade(**result["file"])
        self.unreached = {int(expert): layers for expert, layers in result["unreached"].items()}
        return path

    @property
    def on_device(self) -> str:
        return self.device or self.loaded.recipe.build.device

    def measured(self, quants: tuple[QuantMade, ...]) -> tuple[QuantMade, ...]:
        """The quants with their divergence from the merged model, measured once for each set of files."""
        from quants.filetypes import FILE_TYPES

        wanted = [quant for quant in quants if FILE_TYPES[quant.type].is_quantised]
        if not wanted:
            return quants
        key = stage_key("quality", self.merge_key, [file for quant in wanted for file in quant.files], __version__)
        result = self.state.result("quality", key)
        if result is None:
            result = measure_quants(self.out / MODEL, self.out / GGUF, wanted, self.on_device)
            self.state.finish("quality", key, [], result)
        self.quants_measured = QuantsMeasured(result["perplexity"], result["tokens"])
        return tuple(replace(quant, **result["quants"].get(quant.type, {})) for quant in quants)

    def _remove_old_quants(self, folder: Path, kept: list[str]) -> None:
        """Files of an earlier recipe in this folder, which this one does not have or has otherwise."""
        keep = {f"{self.plan.name}-imatrix.gguf"} if wants_imatrix(self.plan.quants) else set()
        for stage in self.state.stages("gguf/"):
            if stage.removeprefix("gguf/") in kept:
                keep |= {path.rpartition("/")[2] for path in self.state.files(stage)}
        for stage in self.state.stages("gguf/"):
            if stage.removeprefix("gguf/") not in kept:
                self.state.forget(stage)
        if folder.is_dir():
            for path in folder.glob("*.gguf"):
                if path.name not in keep:
                    path.unlink()

    def findings_made(self) -> list[f.Finding]:
        """What only the finished model shows."""
        return [
            f.ExpertUnreached(
                self.loaded.line("experts", expert, "source_model"),
                expert=expert + 1,
                layers=f"layer {layers[0]}"
                if len(layers) == 1
                else f"{len(layers)} layers, the first of them {layers[0]}",
            )
            for expert, layers in self.unreached.items()
        ]

    def report(self, gates: Path, files: tuple[FileMade, ...], quants: tuple[QuantMade, ...]) -> Report:
        seconds = {
            stage: (self.state.result(stage, key) or {}).get("seconds", 0.0)
            for stage, key in (("gates", self.gates_key), ("merge", self.merge_key))
        }
        found = (*self.plan.findings, *gate_findings(self.loaded, self.plan, gates), *self.findings_made())
        return replace(
            planned_report(self.loaded, self.plan, self.gates_key),
            files=files,
            quants=quants,
            failed_quants=tuple(self.failed_quants),
            imatrix=self.imatrix_made,
            quants_measured=self.quants_measured,
            routing=routing_of(gates),
            written_prompts=written_in(gates),
            findings=tuple(map(said, found)),
            seconds=seconds,
        )


def fetched(plan: MergePlan, sources: Sources) -> dict[str, Checkpoint]:
    """The plan's sources with every file that is needed on this machine. Raises SourceError."""
    for source in plan.sources.values():
        if source.why_no_headers is not None:
            raise SourceError(f"{source.name}: its weights are not there, only its config.json")
    return sources.fetch(plan.needed_files, plan.sources)


def make_checkpoint(plan: MergePlan, local: Mapping[str, Checkpoint], gates: Path, key: str, out: Path) -> None:
    """Write the merged checkpoint to the new folder `out`."""
    from merge.gates.store import read_gates
    from merge.stored import Stored

    contents = Stored(open_files(local), read_gates(gates))
    with progress("checkpoint", plan.checkpoint_bytes) as shown:
        write_checkpoint(plan, local[plan.base], contents, out, gates_key=key, advance=shown.advance)


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
