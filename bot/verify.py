"""Is a release exactly what its recipe says? The plan worked out again from the release's own recipe and lock, and every tensor
compared with its sources by ranges: nothing is trusted but the sources' commits on the Hub and the gates that were published.

A router that was calibrated is compared with those gates, which are not calculated again; a random one follows from its seed.
GGUF files are compared with the checksums in the lock. The card is people's to edit and is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bot.gates import behind_kept, gates_key_of
from bot.preview import plan_recipe
from bot.publish.contents import GATES, README, RECIPE
from bot.publish.destination import Destination
from bot.publish.lock import LOCK, Lock, gguf_repository, identity
from bot.publish.patience import limit_waiting
from bot.publish.repository import Found, found_at, small_file
from bot.publish.tokens import OneToken
from bot.report import planned_report
from merge.errors import DestinationError, RecipeError, SourceError
from merge.expr import Expr, Gate, Read, nbytes, pieces, reads
from merge.plan import MergePlan, OutputTensor
from merge.progress import Progress, progress
from merge.ranged import RangedFiles, RangeStore
from merge.recipe import RANDOM_GATES, LoadedRecipe, parse_recipe
from merge.reference import ModelReference
from merge.source_files import Files, fill, open_files
from merge.sources import Sources

if TYPE_CHECKING:
    from merge.stored import Stored

# Bytes compared at a time, and of the tensors that are here at the same time.
PIECE = 8 << 20
ROOM = 2_000_000_000
_EXPERT = re.compile(r"(?<=experts\.)(\d+)(?=\.)")
# So many differences are told of each kind.
SAID = 5


@dataclass(frozen=True)
class Verification:
    """What was found: sentences about what differs, and how much was compared."""

    repo: str
    commit: str
    differences: tuple[str, ...]
    files: int
    tensors: int
    bytes: int

    @property
    def is_exact(self) -> bool:
        return not self.differences


def verify(
    repo: str,
    *,
    revision: str | None = None,
    models: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Verification:
    """Compare the release in `repo` with what its recipe says. `models` as in `Sources`: where sources lie that are not on the
    Hub. Raises SourceError where the release or a source cannot be read, or is no release of ours."""
    limit_waiting()
    where = Destination(repo, OneToken(token), endpoint, create_pr=False)
    try:
        found = found_at(where, revision)
    except DestinationError as error:
        raise SourceError(str(error)) from None
    if found.head is None or found.lock is None:
        what = "there is no such repository, or it is private" if found.head is None else f"no {LOCK} in it"
        raise SourceError(f"{repo}: {what}; only a release of moerge can be verified")
    with tempfile.TemporaryDirectory(prefix="moerge-verify-") as folder:
        return _Check(where, found, found.lock, Path(folder), models, token, endpoint).run()


class _Check:
    def __init__(
        self,
        where: Destination,
        found: Found,
        lock: Lock,
        folder: Path,
        models: Path | None,
        token: str | None,
        endpoint: str | None,
    ) -> None:
        self.where, self.found, self.lock, self.folder = where, found, lock, folder
        self.repo, self.commit = where.repo, found.head or ""
        self.sources = Sources(
            folder, models=models, endpoint=endpoint, token=token, allow_local=False, pins=pins_of(lock)
        )
        self.differences: list[str] = []
        self.tensors = self.bytes = 0

    def run(self) -> Verification:
        files = self.files(self.where, self.found) + self.gguf_files()
        loaded = self.recipe()
        if loaded is not None:
            plan = plan_recipe(loaded, self.sources)
            self.identity(loaded, plan)
            self.config(plan)
            self.weights(loaded, plan)
        return Verification(self.repo, self.commit, tuple(self.differences), files, self.tensors, self.bytes)

    def files(self, where: Destination, found: Found) -> int:
        """The files of a repository against the checksums in the lock; how many."""
        listed = {name: entry for name, entry in self.lock.files(where.repo).items() if name != README}
        for name, entry in listed.items():
            there = found.files.get(name)
            if there is None:
                self.differences.append(f"{where.repo}/{name}: is missing")
            elif there != entry["sha256"]:
                small = len(there) == 40  # git's id: not a large file
                if not small or hashlib.sha256(small_file(where, name, found.head)).hexdigest() != entry["sha256"]:
                    self.differences.append(f"{where.repo}/{name}: is not the file that was released (checksum)")
        return len(listed)

    def gguf_files(self) -> int:
        repo = gguf_repository(self.repo)
        if not self.lock.files(repo):
            return 0
        where = Destination(repo, self.where._tokens, self.where._endpoint, create_pr=False)
        return self.files(where, found_at(where))

    def recipe(self) -> LoadedRecipe | None:
        """The release's recipe, if it can be read and is the one that the lock names."""
        if RECIPE not in self.found.files:
            return None  # told among the files
        path = self.folder / RECIPE
        path.write_bytes(small_file(self.where, RECIPE, self.commit))
        try:
            loaded = parse_recipe(path.read_bytes(), path)
        except RecipeError as error:
            self.differences.append(f"{RECIPE}: is not a recipe any more ({error.findings[0].text})")
            return None
        if loaded.recipe.identity() != self.lock.value.get("recipe"):
            self.differences.append(f"{RECIPE}: is not the recipe that the release was built from")
        return loaded

    def identity(self, loaded: LoadedRecipe, plan: MergePlan) -> None:
        """Whether recipe and pinned sources give the release's identity, the gates' key in it."""
        recorded = self.lock.value.get("sources", {})
        for source in plan.sources.values():
            entry = recorded.get(source.name)
            if not isinstance(entry, dict):
                self.differences.append(f"{LOCK}: does not name the source {source.name}")
            elif None not in (entry.get("commit"), source.commit) and entry["commit"] != source.commit:
                self.differences.append(f"{source.name}: is read at another commit than the lock names")
        from merge import __version__

        has_files = any(expert.prompts_file for expert in loaded.recipe.experts)  # which were not published
        same = all(
            isinstance(entry := recorded.get(source.name), dict) and entry.get("fingerprint") == source.fingerprint
            for source in plan.sources.values()
        )
        if has_files or not same or self.lock.value.get("moerge") != __version__:
            return
        key = gates_key_of(loaded, plan)
        if key != self.lock.value.get("gates"):
            self.differences.append(f"{LOCK}: the recipe gives other gates than those it names")
        elif identity(planned_report(loaded, plan, key), plan.quants) != self.lock.identity:
            self.differences.append(f"{LOCK}: the recipe and its sources give another identity than it says")

    def config(self, plan: MergePlan) -> None:
        """config.json against the plan's, and the files copied from the base against the base's."""
        if "config.json" in self.found.files:
            try:
                there = json.loads(small_file(self.where, "config.json", self.commit))
            except ValueError:
                there = None
            wanted = json.loads(json.dumps(dict(plan.config)))
            if not isinstance(there, dict):
                self.differences.append("config.json: is not a JSON object")
            else:
                for key in sorted(there.keys() | wanted.keys()):
                    if there.get(key) != wanted.get(key):
                        said = f"{_shown(there.get(key))}, and the recipe gives {_shown(wanted.get(key))}"
                        self.differences.append(f"config.json: {key} is {said}")
        local = self.sources.fetch({plan.base: plan.companions}, {plan.base: plan.sources[plan.base]})[plan.base]
        assert local.folder is not None
        for name in plan.companions:
            if (
                name in self.found.files
                and small_file(self.where, name, self.commit) != (local.folder / name).read_bytes()
            ):
                self.differences.append(f"{name}: is not that of the base, {plan.sources[plan.base].name}")

    def weights(self, loaded: LoadedRecipe, plan: MergePlan) -> None:
        """Every tensor of the release against what the plan makes it of."""
        from merge.stored import Stored

        release = self.sources.hub.open(ModelReference(self.repo, self.commit))
        there, made = release.tensors or {}, {tensor.name: tensor for tensor in plan.tensors}
        self._say([f"{name}: is missing" for name in made if name not in there])
        self._say([f"{name}: is not in the plan" for name in there if name not in made])
        store = RangeStore(self.folder / "release", ROOM, self.sources.hub.fetch_range)
        ours = RangedFiles(replace(release, ranges=store), store)
        local = self.sources.ranged({}, plan.sources, self.folder / "sources", ROOM)
        files = open_files(local)
        gates = self.gates(loaded, plan, files)
        contents = Stored(files, gates)
        wrong = []
        with progress("tensors compared", plan.checkpoint_bytes) as shown:
            for tensor in plan.tensors:
                if tensor.name in there and (gates or not any(isinstance(x, Gate) for x in pieces(tensor.expr))):
                    problem = self._compare(tensor, there[tensor.name], ours, contents, plan, shown)
                    wrong += [f"{tensor.name}: {problem}"] if problem else []
        self._say(wrong)

    def gates(self, loaded: LoadedRecipe, plan: MergePlan, files: Mapping[str, Files]) -> Mapping[int, Any]:
        """The gates that were published, layer -> (experts, hidden); random ones are drawn again and compared."""
        from merge.gates.store import read_gates

        if GATES not in self.found.files:
            self.differences.append(f"{GATES}: is missing, so the router cannot be compared")
            return {}
        path = self.folder / "gates.safetensors"
        path.write_bytes(small_file(self.where, GATES, self.commit))
        try:
            gates = read_gates(path)
        except SourceError:
            self.differences.append(f"{GATES}: is not a file of gates, so the router cannot be compared")
            return {}
        if plan.gate_mode in RANDOM_GATES:
            from merge.gates.random import random_gates

            layers, hidden = plan.config["num_hidden_layers"], plan.config["hidden_size"]
            seed = loaded.recipe.build.seed
            drawn = behind_kept(plan, files, random_gates(plan.gate_mode, layers, len(plan.gated), hidden, seed))
            if not all(layer in gates and np.array_equal(drawn[layer], gates[layer]) for layer in drawn):
                self.differences.append(f"{GATES}: is not what the recipe's seed gives")
        return gates

    def _compare(
        self, tensor: OutputTensor, info: Any, ours: Files, contents: Stored, plan: MergePlan, shown: Progress
    ) -> str | None:
        """What is wrong with one tensor of the release; None where it is what the plan says."""
        expr = tensor.expr
        if (info.dtype, info.shape) != (expr.dtype, expr.shape):
            return f"is {info.dtype} {info.shape}, and the recipe gives {expr.dtype} {expr.shape}"
        start = 0
        for piece in pieces(expr):
            at = _first_difference(tensor.name, start, piece, ours, contents)
            if at is not None:
                return self._said(tensor, piece, at, ours, contents, plan)
            start += nbytes(piece)
        shown.advance(start)
        self.tensors += 1
        self.bytes += start
        return None

    def _said(self, tensor: OutputTensor, piece: Expr, at: int, ours: Files, contents: Stored, plan: MergePlan) -> str:
        """Whose bytes they are instead, if another expert's, else where they begin to differ."""
        for other in plan.tensors:
            alike = (
                _EXPERT.sub("#", other.name) == _EXPERT.sub("#", tensor.name) and other.expr.shape == tensor.expr.shape
            )
            if not alike or other.name == tensor.name:
                continue
            if _first_difference(tensor.name, 0, other.expr, ours, contents) is None:
                number = _EXPERT.search(other.name)
                expert = f"expert {int(number[0]) + 1}" if number else other.name
                return f"holds what the recipe gives {expert} ({_origin(other.expr, plan)})"
        return f"differs from {_origin(piece, plan)} from byte {at} on"

    def _say(self, found: list[str]) -> None:
        more = len(found) - SAID
        self.differences += found[:SAID] + ([f"and {more} tensors more"] if more > 0 else [])


def pins_of(lock: Lock) -> dict[str, str]:
    """By name the commit of each source on the Hub."""
    sources = lock.value.get("sources", {})
    if not isinstance(sources, dict):
        return {}
    return {
        name: commit
        for name, entry in sources.items()
        if isinstance(commit := entry.get("commit") if isinstance(entry, dict) else entry, str)
        and re.fullmatch(r"[0-9a-f]{40}", commit)
    }


def _first_difference(tensor: str, start: int, piece: Expr, ours: Files, contents: Stored) -> int | None:
    """The byte of `tensor` from which on it is not `piece`, which begins at byte `start` of it; None where it is."""
    for data in _bytes_of(piece, contents):
        there = memoryview(bytearray(data.nbytes))
        ours.fill(there, tensor, start)
        if there != data:
            return start + next(i for i, (a, b) in enumerate(zip(there, data, strict=True)) if a != b)
        start += data.nbytes
    return None


def _bytes_of(piece: Expr, contents: Stored) -> Any:
    """The bytes that the plan gives, slice by slice."""
    if not isinstance(piece, Read):
        for data in contents.stored(piece):
            yield data.cast("B")
        return
    done, size = 0, nbytes(piece)
    while done < size:
        data = memoryview(bytearray(min(PIECE, size - done)))
        fill(contents.files, piece, data, done)
        yield data
        done += data.nbytes


def _origin(x: Expr, plan: MergePlan) -> str:
    found = {f"{read.tensor} of {plan.sources[read.source].name}": None for read in reads(x)}
    return ", ".join(found) or "the gates that were published"


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)[:100]
