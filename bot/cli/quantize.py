"""`moerge quantize`: GGUF files of a checkpoint on this machine, each loaded in llama.cpp before it counts."""

from __future__ import annotations

import argparse
from pathlib import Path

from bot.cli.options import add_device_option
from quants.filetypes import FILE_TYPES

HELP = "make GGUF files of a model's folder, and prove that each of them runs"
DEFAULT_TYPES = "Q4_K_M"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a folder with config.json, safetensors and tokenizer"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for <name>-<type>.gguf")
    parser.add_argument(
        "--types", default=DEFAULT_TYPES, help=f"file types, with commas between (default {DEFAULT_TYPES})"
    )
    parser.add_argument("--name", help="the model's name, in the files and of them (default: the name of its folder)")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="an importance matrix (GGUF) to heed, or `auto` to measure one; measured anyway where a type needs it",
    )
    parser.add_argument(
        "--split", type=float, metavar="GB", help="split files larger than this (default: 50), as llama.cpp does"
    )
    add_device_option(parser)
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    parser.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")
    parser.epilog = "file types:\n" + "\n".join(f"  {kind.name:8}{kind.when}" for kind in FILE_TYPES.values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    from bot.quants import LARGE_PARTS, make_imatrix
    from merge.errors import UsageError
    from merge.evaluate import checkpoint_expressions
    from merge.progress import progress, say
    from quants.build import data_bytes, file_path, file_types, imatrix_path, quantize, raise_failures
    from quants.families import routes_otherwise
    from quants.imatrix import load_imatrix
    from quants.layout import gguf_layout, wants_imatrix
    from quants.metadata import folder_info

    types = [kind.name for kind in file_types([name.strip() for name in args.types.split(",") if name.strip()])]
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: at least one is needed")
    if args.split is not None and not args.split > 0:
        raise UsageError(f"--split {args.split}: more than nothing is needed")
    tensors, config, evaluator = checkpoint_expressions(args.model)
    name = args.name or args.model.resolve().name
    there = [path for path in (file_path(args.out, name, kind) for kind in types) if path.exists()]
    if there and not args.force:
        raise UsageError(f"{there[0]} is there already; remove it, or replace it with --force")
    layout = gguf_layout(config, tensors)
    if routes_otherwise(config):
        say(
            "llama.cpp weighs the chosen experts otherwise than config.json says (norm_topk_prob): its answers will differ "
            "from transformers' unless all experts are chosen"
        )
    info = folder_info(args.model, args.name, layout.parameters)
    imatrix = None
    if args.imatrix and args.imatrix != "auto":
        imatrix = load_imatrix(Path(args.imatrix))
    elif args.imatrix or wants_imatrix(types):
        make_imatrix(args.model, imatrix_path(args.out, name), (), args.device or "auto")
        imatrix = load_imatrix(imatrix_path(args.out, name))
    with progress("GGUF", data_bytes(layout, types, imatrix is not None)) as bar:
        files = quantize(
            config, tensors, evaluator, args.model, args.out, name, types, info, progress=bar.advance,
            threads=args.threads, imatrix=imatrix, max_bytes=int(args.split * 1e9) if args.split else LARGE_PARTS,
        )  # fmt: skip
    for file in files:
        if file.proof:
            by_twin = "" if file.proof.kind == "ran" else "all blocks checked, a twin of its first layers "
            say(f"{file.path}: {file.bytes / 1e9:.2f} GB, {by_twin}generates: {file.proof.generation.text!r}")
    raise_failures(files)
    return 0
