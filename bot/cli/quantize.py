"""`moerge quantize`: GGUF files of a checkpoint on this machine, or straight from a recipe, each proven before it counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.cli.options import add_device_option, add_source_options, source_options
from quants.filetypes import FILE_TYPES

if TYPE_CHECKING:
    from bot.quants import OpenModel
    from merge.recipe import LoadedRecipe
    from quants.metadata import ModelInfo

HELP = "make GGUF files of a model's folder, or of a recipe without its checkpoint, and prove that each of them runs"
DEFAULT_TYPES = "Q4_K_M"
# Where the small files of a planned checkpoint are while its GGUF files are made.
DESCRIBED = "described"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a folder with config.json, safetensors and tokenizer; or a recipe, which is merged on the way",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for <name>-<type>.gguf")
    parser.add_argument("--types", help=f"file types, with commas between (default: the recipe's, or {DEFAULT_TYPES})")
    parser.add_argument("--name", help="the model's name, in the files and of them (default: the folder's or recipe's)")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="an importance matrix (GGUF) to heed, or `auto` to measure one; measured anyway where a type needs it",
    )
    parser.add_argument(
        "--split", type=float, metavar="GB", help="split files larger than this (default: 50), as llama.cpp does"
    )
    add_device_option(parser)
    add_source_options(parser)
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    parser.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")
    parser.epilog = "file types:\n" + "\n".join(f"  {kind.name:8}{kind.when}" for kind in FILE_TYPES.values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


@dataclass(frozen=True, slots=True)
class _Asked:
    """The model to quantise, what its files say of it, the types wanted, and texts that an importance matrix is to see.
    `identity` is other where the model is another."""

    model: OpenModel
    info: ModelInfo
    types: list[str]
    prompts: tuple[str, ...]
    device: str
    identity: str


def run(args: argparse.Namespace) -> int:
    from bot.quants import LARGE_PARTS, make_imatrix, quantised
    from bot.state import stage_key
    from evals.results import QuantFailed
    from merge.errors import ProofError, UsageError
    from merge.files import writing
    from merge.progress import say
    from merge.recipe import load_recipe
    from quants.build import imatrix_path
    from quants.layout import wants_imatrix

    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: at least one is needed")
    if args.split is not None and not args.split > 0:
        raise UsageError(f"--split {args.split}: more than nothing is needed")
    types = _types(args.types) if args.types is not None else []
    loaded = load_recipe(args.model) if args.model.is_file() else None
    name = args.name or (loaded.name if loaded else args.model.resolve().name)
    _check_free(args, name, types if loaded else types or [DEFAULT_TYPES])
    with _work_folder(args.out, name) as work:
        asked = _of_recipe(loaded, args, types, work) if loaded else _of_folder(args, types)
        imatrix = Path(args.imatrix) if args.imatrix and args.imatrix != "auto" else None
        measured = imatrix is None and bool(args.imatrix or wants_imatrix(asked.types))
        if measured:
            imatrix = work / f"imatrix-{stage_key(asked.identity, asked.prompts)[:16]}.gguf"
            if not imatrix.is_file():
                make_imatrix(asked.model, imatrix, asked.prompts, asked.device)
        max_bytes = int(args.split * 1e9) if args.split else LARGE_PARTS
        files = quantised(asked.model, args.out, name, asked.types, asked.info, imatrix, max_bytes, args.threads)
        with writing(args.out):
            if measured and imatrix:
                imatrix.rename(imatrix_path(args.out, name))
            for path in (*work.glob("gates-*"), *work.glob("prompts-*")):
                path.unlink()
    failed = [file for file in files if isinstance(file, QuantFailed)]
    for file in files:
        if not isinstance(file, QuantFailed):
            by_twin = "" if file.proof == "ran" else "all blocks checked, a twin of its first layers "
            said = f"{file.bytes / 1e9:.2f} GB, {by_twin}generates: {file.sample!r}"
            say(f"{args.out / file.file.name}: {said}")
    for failure in failed[1:]:
        say(failure.reason)
    if failed:
        raise ProofError(failed[0].reason)
    return 0


@contextmanager
def _work_folder(out: Path, name: str) -> Iterator[Path]:
    """A folder in `out` for what is kept when a run is cut off, its gates and importance matrix. It goes with them."""
    import shutil

    from bot.state import LOCK, locked

    new, work = not out.exists(), out / f".{name}.work"
    with locked(work):
        try:
            yield work
        finally:
            shutil.rmtree(work / DESCRIBED, ignore_errors=True)
            if [path.name for path in work.iterdir()] == [LOCK]:
                shutil.rmtree(work)
                if new and not any(out.iterdir()):
                    out.rmdir()


def _types(text: str) -> list[str]:
    from quants.build import file_types

    return [kind.name for kind in file_types([name.strip() for name in text.split(",") if name.strip()])]


def _check_free(args: argparse.Namespace, name: str, types: list[str]) -> None:
    """Raises UsageError where a file that would be made is there already, and may not be replaced."""
    from merge.errors import UsageError
    from quants.build import file_path

    for kind in types:
        path = file_path(args.out, name, kind)
        there = [path, *args.out.glob(f"{path.stem}-?????-of-?????.gguf")]
        found = next((file for file in there if file.exists()), None)
        if found and not args.force:
            raise UsageError(f"{found} is there already; remove it, or replace it with --force")


def _of_folder(args: argparse.Namespace, types: list[str]) -> _Asked:
    from bot.quants import open_model
    from bot.state import stage_key
    from merge import findings as f
    from merge.checkpoint import open_folder
    from merge.families import FAMILIES
    from merge.progress import say
    from quants.families import routes_otherwise
    from quants.layout import gguf_layout
    from quants.metadata import folder_info

    model = open_model(args.model)
    info = folder_info(args.model, args.name, gguf_layout(model.config, model.tensors).parameters)
    if routes_otherwise(model.config):
        family = next(family for family in FAMILIES if model.config["model_type"] == family.NAME)
        value = str(bool(model.config.get("norm_topk_prob"))).lower()
        finding = f.ReadersDisagree(None, model=args.model.name, value=value, family=family.TITLE)
        say(finding.located(str(args.model)))
    identity = stage_key(open_folder(args.model).fingerprint)
    return _Asked(model, info, types or [DEFAULT_TYPES], (), args.device or "auto", identity)


def _of_recipe(loaded: LoadedRecipe, args: argparse.Namespace, types: list[str], work: Path) -> _Asked:
    """The model of a recipe: its gates are calibrated into `work`, its weights stay where they are."""
    from bot.gates import gates_key_of, make_gates
    from bot.ggufs import model_info
    from bot.preview import plan_recipe
    from bot.quants import check_tokenizer, planned_model
    from bot.state import stage_key
    from bot.work import fetched
    from merge import findings as f
    from merge.errors import RecipeError
    from merge.gates.store import gates_path, read_gates
    from merge.progress import say
    from merge.sources import Sources

    plan = plan_recipe(loaded, sources := Sources(loaded.folder, **source_options(args)))
    for finding in plan.findings:
        say(finding.located(str(loaded.path)))
    if plan.why_no_gguf:
        why = f.NoGguf(loaded.line("base_model"), family=plan.family_title, why=plan.why_no_gguf)
        raise RecipeError([why], str(loaded.path))
    types = types or list(plan.quants) or [DEFAULT_TYPES]
    _check_free(args, args.name or plan.name, types)  # before anything is downloaded
    local, key = fetched(plan, sources), gates_key_of(loaded, plan)
    gates = gates_path(work, key)
    if not gates.is_file():
        check_tokenizer(plan, local)
        make_gates(loaded, plan, local, work, key, args.device)
    info = model_info(loaded, plan)
    return _Asked(
        planned_model(plan, local, read_gates(gates), work / DESCRIBED),
        replace(info, name=args.name) if args.name else info,
        types,
        tuple(prompt for expert in loaded.recipe.experts for prompt in expert.positive_prompts),
        args.device or loaded.recipe.build.device,
        stage_key(plan.identity(), key),
    )
