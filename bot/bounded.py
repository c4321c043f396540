"""A build on a small disk: each shard and each part of a GGUF file made, uploaded and deleted before the next.

Nothing of it is seen on the Hub before the commit. What was uploaded is kept in the build's state (hash, size, that it went up
as a large file), so that a run after a kill makes only what is missing, and the commit needs no file. How much disk it takes is
worked out before (bot.disk) and promised in the preview.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.disk import TWIN, Bounded, Item, plan_bounded
from bot.gates import prompts_of
from bot.gates_by_layer import GatesByLayer
from bot.ggufs import GgufMade, model_info
from bot.passes import by_layer, check_expansion
from bot.publish.contents import item_stage, upload_stage
from bot.publish.destination import Destination, addition_of, preupload
from bot.publish.lock import gguf_repository
from bot.quants import OpenModel, make_imatrix, planned_model
from bot.report import said
from bot.state import stage_key
from bot.work import Work
from evals.results import FileMade, QuantFailed, QuantMade, Report
from merge import __version__
from merge import findings as f
from merge.checkpoint import INDEX
from merge.errors import ProofError, SourceError
from merge.expr import elements
from merge.files import file_sha256, write_atomically, writing
from merge.gates.store import read_gates
from merge.progress import say
from merge.recipe import LoadedRecipe
from merge.writer import write_shard
from quants.families import first_moe_layer
from quants.layout import wants_imatrix
from quants.split import SplitFile

if TYPE_CHECKING:
    from merge.ranged import RangeStore
    from quants.imatrix import Imatrix


def build_bounded(work: Work, max_disk: int, repositories: Mapping[str, Destination]) -> Report:
    """Make and upload everything that `moerge publish` then commits, and leave the report and the cards.

    `repositories` are the model's and the GGUF files', by name. Raises what a build raises.
    """
    from bot.pipeline import finish, gates_of, read_beside_recipe, report_of

    beside = read_beside_recipe(work.loaded)

    plan = work.plan
    bounded = plan_bounded(plan, max_disk)
    prompts = [prompt for expert in prompts_of(work.loaded, plan) for prompt in expert.positive]
    check_expansion(work.loaded, plan, prompts, bounded.schedule.peak)
    say(
        f"{plan.name}: {bounded.disk_bytes / 1e9:.2f} GB of disk, {bounded.download / 1e9:.2f} GB to download, "
        f"{sum(item.layer is None for item in bounded.schedule.items)} files one after the other"
    )
    if plan.quants:
        say(
            "under max_disk no GGUF file is loaded as a whole: a full proof and its divergence need a larger runner or a Job"
        )
    missing = not_measured(work.loaded)
    for finding in missing:
        say(finding.located(str(work.loaded.path)))
    store = next((checkpoint.ranges for checkpoint in work.local.values() if checkpoint.ranges is not None), None)
    if store is not None:
        store.capacity = bounded.schedule.peak
    coming = None
    if by_layer(plan) and work.state.result("gates", work.gates_key) is None:
        coming = GatesByLayer(work)
    model = planned_model(plan, work.local, read_gates(gates_of(work)) if coming is None else coming, work.model)
    imatrix, unreached = _imatrix(work, model) if wants_imatrix(plan.quants) else (None, {})
    sweep = _Sweep(work, bounded, model, imatrix, store, repositories, coming)
    started = time.monotonic()
    sweep.run()
    gates = gates_of(work) if coming is None else coming.finish()
    if store is not None:
        store.clear()
        store.capacity = bounded.schedule.peak
        store.expect(None)
    files = sweep.files()
    work.state.finish("merge", work.merge_key, [], {"seconds": time.monotonic() - started})
    gguf = GgufMade(sweep.quants(), tuple(sweep.failed), imatrix, unreached, None)
    report = report_of(work, gates, files, gguf)
    found = (*report.findings, *map(said, missing))
    return finish(work, replace(report, scores=beside.inputs.scores, findings=found), beside)


def not_measured(loaded: LoadedRecipe) -> list[f.Finding]:
    """What the recipe wants to know of the model, for which all of it would have to be on the disk."""
    evals = loaded.recipe.evals
    keys = [f"evals.{key}" for key in ("texts", "tasks", "samples") if getattr(evals, key)]
    return [f.NotMeasuredBounded(loaded.line("evals"), keys=", ".join(keys))] if keys else []


class _Sweep:
    """All items of a schedule, one after the other."""

    def __init__(
        self,
        work: Work,
        bounded: Bounded,
        model: OpenModel,
        imatrix: FileMade | None,
        store: RangeStore | None,
        repositories: Mapping[str, Destination],
        gates: GatesByLayer | None,
    ) -> None:
        from quants.build import embedding_rows
        from quants.imatrix import load_imatrix
        from quants.metadata import gguf_metadata
        from quants.tokenizer import read_vocabulary

        self.work, self.bounded, self.model, self.store = work, bounded, model, store
        self.repo = work.loaded.recipe.release.repo or ""
        self.repositories, self.gates = repositories, gates
        self.failed: list[QuantFailed] = []
        self.matrix: Imatrix | None = load_imatrix(work.gguf / imatrix.name) if imatrix else None
        self.importance = self.matrix.importance() if self.matrix else None
        self.metadata: dict[str, Any] = {}
        info = model_info(work.loaded, work.plan)
        for name, split in bounded.splits.items():
            layout = split.layout
            vocabulary = read_vocabulary(model.folder, embedding_rows(layout), layout.architecture)
            named = (imatrix.name, self.matrix) if imatrix and self.matrix else None
            self.metadata[name] = gguf_metadata(model.config, layout, vocabulary, info, split.file_type, named)
        self.made_of = stage_key(work.merge_key, info, imatrix, __version__)
        self.parts = {
            path.name: (name, index) for name, split in bounded.splits.items() for index, path in enumerate(split.paths)
        }

    def run(self) -> None:
        """Make what is not made yet."""
        with writing(self.work.out):
            for folder in (self.work.model, self.work.gguf):
                folder.mkdir(parents=True, exist_ok=True)
        for step, item in enumerate(self.bounded.schedule.items):
            if item.layer is not None:
                if self.gates is not None and item.layer not in self.gates:
                    self._make_room(step, item)
                    self.gates.advance(item.layer)
            elif self.done(item) is None and self._type(item) not in {failed.type for failed in self.failed}:
                self._make_room(step, item)
                self._make(item)
            elif (self.done(item) or {}).get("sent"):
                self._path(item).unlink(missing_ok=True)  # a kill came between the record and this

    def done(self, item: Item) -> dict[str, Any] | None:
        """What the state has of an item that was made from the same inputs."""
        return self.work.state.result(item_stage(item.name), self._key(item))

    def files(self) -> tuple[FileMade, ...]:
        """The checkpoint's files: the shards, and the small ones."""
        shards = self.bounded.shards
        if len(shards) > 1:
            weights = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": self.work.plan.checkpoint_bytes}, "weight_map": weights}
            write_atomically(self.work.model / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        small = ("config.json", *self.work.plan.companions, *((INDEX,) if len(shards) > 1 else ()))
        made = [FileMade(name, (path := self.work.model / name).stat().st_size, file_sha256(path)) for name in small]
        return tuple(sorted([*made, *(self._file(name) for name in shards)], key=lambda file: file.name))

    def quants(self) -> tuple[QuantMade, ...]:
        """The GGUF files whose twin ran."""
        from quants.proof import PROMPT

        weights = sum(elements(x) for x in self.model.tensors.values())
        made = []
        for name, split in self.bounded.splits.items():
            if name in {failed.type for failed in self.failed}:
                continue
            parts = [self._file(path.name) for path in split.paths]
            twin = self._result(f"{split.paths[0].name}{TWIN}")
            made.append(
                QuantMade(
                    file=parts[0],
                    further_files=tuple(parts[1:]),
                    type=name,
                    bits_per_weight=8 * sum(part.bytes for part in parts) / weights,
                    seconds=sum(self._result(path.name)["seconds"] for path in split.paths),
                    proof=twin["proof"],
                    prompt=PROMPT,
                    sample=twin["sample"],
                    sample_tokens=tuple(twin["tokens"]),
                )
            )
        return tuple(made)

    def _result(self, name: str) -> dict[str, Any]:
        item = next(item for item in self.bounded.schedule.items if item.name == name)
        result = self.done(item)
        assert result is not None
        return result

    def _file(self, name: str) -> FileMade:
        result = self._result(name)
        return FileMade(name, result["bytes"], result["sha256"])

    def _type(self, item: Item) -> str | None:
        """The file type that an item is of; None for a shard."""
        found = self.parts.get(item.name.removesuffix(TWIN))
        return found[0] if found else None

    def _key(self, item: Item) -> str:
        return stage_key(self.made_of, item.name, sorted(item.reads))

    def _path(self, item: Item) -> Path:
        return (self.work.model if item.name in self.bounded.shards else self.work.gguf) / item.name

    def _make_room(self, step: int, item: Item) -> None:
        if self.store is not None:
            uses = self.bounded.schedule.next_use(step)
            self.store.capacity = self.bounded.schedule.peak - item.bytes
            self.store.expect(lambda key: uses.get(key, float("inf")), item.reads)
            self.store.make_room(0)

    def _make(self, item: Item) -> None:
        started, path = time.monotonic(), self._path(item)
        quant = self._type(item)
        try:
            if item.name.endswith(TWIN):
                self._twin(item, path)
                return
            if quant is None:
                self._shard(item, path)
            else:
                self._part(item, path)
        except ProofError as error:
            assert quant is not None
            say(f"{quant} is not part of the release: {error}")
            self.failed.append(QuantFailed(quant, str(error)))
            return
        repo = self.repo if quant is None else gguf_repository(self.repo)
        size, sha256 = path.stat().st_size, file_sha256(path)
        sent = self._send(repo, path, sha256)
        result = {"bytes": size, "sha256": sha256, "sent": sent, "seconds": time.monotonic() - started}
        if sent:
            self.work.state.finish(upload_stage(repo, item.name), sha256, [], {"bytes": size, "mode": "lfs"})
        self.work.state.finish(item_stage(item.name), self._key(item), [] if sent else [path], result)
        if sent:
            path.unlink()

    def _send(self, repo: str, path: Path, sha256: str) -> bool:
        """Upload a file; False where the Hub wants it within the commit, so that it must stay here."""
        say(f"{repo}: uploading {path.name} ({path.stat().st_size / 1e6:,.0f} MB)")
        addition = addition_of(path.name, path, sha256)
        preupload(self.repositories[repo], [addition])
        return bool(addition._is_uploaded)

    def _shard(self, item: Item, path: Path) -> None:
        from evals.weights import broken_tensors

        tensors = self.bounded.shards[item.name]
        write_shard(tensors, self.model.contents, path, lambda count: None)
        broken = broken_tensors({tensor.name: tensor.expr for tensor in tensors}, self.model.contents.evaluator)
        if broken:
            path.unlink()
            raise SourceError(
                f"weights that are NaN or infinite: {broken[0].name} ({broken[0].broken} of {broken[0].elements}); no model "
                "can be made of them"
            )

    def _part(self, item: Item, path: Path) -> None:
        from quants.parts import write_part

        name, index = self.parts[item.name]
        write_part(self._placed(name), index, self.metadata[name], self.model.contents, self.importance)

    def _twin(self, item: Item, path: Path) -> None:
        from quants.parts import prove_with_twin

        name, _ = self.parts[item.name.removesuffix(TWIN)]
        first = first_moe_layer(self.model.config)
        proof = prove_with_twin(
            self._placed(name), path, self.metadata[name], self.model.contents, self.importance, first
        )
        result = {"proof": proof.kind, "sample": proof.generation.text, "tokens": list(proof.generation.tokens)}
        self.work.state.finish(item_stage(item.name), self._key(item), [], result)

    def _placed(self, name: str) -> SplitFile:
        """A split file with its paths in the build's folder."""
        split = self.bounded.splits[name]
        paths = tuple(self.work.gguf / path.name for path in split.paths)
        return SplitFile(split.layout, split.file_type, split.types, split.parts, paths)


def _imatrix(work: Work, model: OpenModel) -> tuple[FileMade, dict[int, list[int]]]:
    path = work.gguf / f"{work.plan.name}-imatrix.gguf"
    prompts = tuple(prompt for expert in work.loaded.recipe.experts for prompt in expert.positive_prompts)
    key = stage_key("imatrix", work.merge_key, prompts, __version__)
    result = work.state.result("imatrix", key)
    if result is None:
        result = make_imatrix(model, path, prompts, work.on_device)
        work.state.finish("imatrix", key, [path], result)
    return FileMade(**result["file"]), {int(expert): layers for expert, layers in result["unreached"].items()}
