"""`moerge quantize`: GGUF files of a checkpoint on this machine, each loaded in llama.cpp before it counts."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    parser.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")
    parser.epilog = "file types:\n" + "\n".join(f"  {kind.name:8}{kind.when}" for kind in FILE_TYPES.values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    from merge.errors import UsageError
    from merge.evaluate import checkpoint_expressions
    from merge.progress import progress, say
    from quants.build import data_bytes, file_path, file_types, quantize
    from quants.layout import gguf_layout
    from quants.metadata import folder_info

    types = [kind.name for kind in file_types([name.strip() for name in args.types.split(",") if name.strip()])]
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: at least one is needed")
    tensors, config, evaluator = checkpoint_expressions(args.model)
    name = args.name or args.model.resolve().name
    there = [path for path in (file_path(args.out, name, kind) for kind in types) if path.exists()]
    if there and not args.force:
        raise UsageError(f"{there[0]} is there already; remove it, or replace it with --force")
    layout = gguf_layout(config, tensors)
    info = folder_info(args.model, args.name, layout.parameters)
    with progress("GGUF", data_bytes(layout, types)) as bar:
        files = quantize(
            config, tensors, evaluator, args.model, args.out, name, types, info,
            progress=bar.advance, threads=args.threads,
        )  # fmt: skip
    for file in files:
        say(f"{file.path}: {file.bytes / 1e9:.2f} GB, generates: {file.proof.text!r}" if file.proof else str(file.path))
    return 0
