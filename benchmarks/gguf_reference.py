"""What llama.cpp's converter and quantiser make of the tiny models in tests/quants: keys, tensor types and bytes.

    python -m benchmarks.gguf_reference [--peer FOLDER] [CASE...]
    python -m benchmarks.gguf_reference smollm2        a real model, into tests/quants/smollm2.json
    python -m benchmarks.gguf_reference tokenizer      a real SentencePiece model, into tests/data/tokenizers

The peer is llama.cpp as benchmarks/llama_cpp.py has it. Writes tests/quants/reference.json, which the tests compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from benchmarks.llama_cpp import Peer, add_peer_option, peer
from tests.quants.cases import CASES, PRE_TOKENIZER, SPLIT, SPLIT_BYTES, TYPES_ONLY, write_imatrix
from tests.quants.tiny import write_model

REFERENCE = Path(__file__).parents[1] / "tests" / "quants" / "reference.json"


# Gives the converter a name for the hand-made tokenizer, for which it has none.
NAMED = "from conversion import base; base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}; "
# The converter reads Hunyuan-MoE's tokenizer through code from its repository, which a merge of dense models has not: theirs is
# an ordinary one.
ORDINARY = "from conversion import hunyuan; hunyuan.HunYuanMoEModel.set_vocab = base.TextModel._set_vocab_gpt2; "
# A line of the quantiser's dry run.
_CHOSEN = re.compile(r"\]\s+(\S+)\s+- \[.*-> .*\((\S+)\)")


def describe(path: Path) -> dict[str, Any]:
    """Keys with their values, and of each tensor its type, shape and the first 64 bits of its sha256."""
    reader = GGUFReader(path)
    keys = {
        name: [[kind.name for kind in field.types], field.contents()]
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {}
    for tensor in reader.tensors:
        shape = "x".join(map(str, reversed(tensor.shape.tolist())))
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16]
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {digest}"
    return {"keys": keys, "tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_option(parser)
    parser.add_argument("cases", nargs="*", help="only these, the others as they are recorded")
    args = parser.parse_args()
    tools = peer(args.peer.resolve())
    for name, record_it in (("smollm2", record_smollm2), ("tokenizer", record_tokenizer)):
        if args.cases == [name]:
            record_it(tools)
            return
    found: dict[str, dict[str, Any]] = json.loads(REFERENCE.read_text()) if args.cases else {}
    for name in args.cases or (*CASES, "split"):
        with tempfile.TemporaryDirectory() as scratch:
            if name == "split":
                found[name] = {"parts": record_split(Path(scratch), tools)}
            else:
                found[name] = record(name, Path(scratch), tools)
        print(name, flush=True)
        text = json.dumps(
            {name: found[name] for name in (*CASES, "split") if name in found},
            ensure_ascii=False,
            separators=(",", ":"),
        )
        REFERENCE.write_text(text.replace('},"', '},\n"') + "\n")


def record(name: str, scratch: Path, tools: Peer) -> dict[str, Any]:
    """What the peer makes of one case, by file type: a description, or for the deep models the types that differ from
    the most frequent one."""
    config, tokenizer, types = CASES[name]
    folder = write_model(scratch / "tiny", config, tokenizer)
    if any("+" in kind for kind in types):
        write_imatrix(scratch / "imatrix.gguf", config)
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(("BF16", *types)):
        file_type, _, imatrix = kind.partition("+")
        out = scratch / f"{kind}.gguf"
        if file_type in ("F32", "F16", "BF16"):
            python, flag, run = tools.converter
            if tokenizer == "byte_level":
                named = NAMED.format(pre=PRE_TOKENIZER) + (ORDINARY if name == "hunyuan_v1_moe" else "")
                run = run.replace("runpy.run_path", named + "runpy.run_path")
            command = [python, flag, run, str(folder), "--outfile", str(out), "--outtype", file_type.lower()]
        else:
            command = [str(tools.quantise), *(["--imatrix", "imatrix.gguf"] if imatrix else [])]
            command += ["--dry-run"] if name in TYPES_ONLY else []
            command += ["BF16.gguf", *([] if name in TYPES_ONLY else [str(out)]), file_type]
        finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if finished.returncode:
            sys.exit(f"{name} {kind}: {finished.stderr[-2000:]}")
        if kind in types:
            found[kind] = chosen(finished.stdout + finished.stderr) if name in TYPES_ONLY else describe(out)
    return found


def record_tokenizer(tools: Peer) -> None:
    """What the peer makes of a real SentencePiece tokenizer, and how the sentencepiece package reads text with it."""
    from tests.quants import real_tokenizer
    from tests.quants.smollm2 import summary

    with tempfile.TemporaryDirectory() as scratch:
        folder, converted = real_tokenizer.write_mistral(Path(scratch) / "Tiny"), Path(scratch) / "BF16.gguf"
        subprocess.run([*tools.converter, str(folder), "--outfile", str(converted), "--outtype", "bf16"], check=True)
        keys = summary(converted)["keys"]
        read = "import sys, json; sys.path.append(sys.argv[1]); import sentencepiece as s; "
        read += "m = s.SentencePieceProcessor(sys.argv[2]); print(json.dumps([m.encode(t) for t in json.loads(sys.argv[3])]))"
        arguments = [str(tools.packages), str(folder / "tokenizer.model"), json.dumps(real_tokenizer.TEXTS)]
        ids = json.loads(
            subprocess.run([sys.executable, "-c", read, *arguments], check=True, capture_output=True).stdout
        )
    real_tokenizer.REFERENCE.write_text(json.dumps({"keys": keys, "ids": ids}) + "\n")


def record_smollm2(tools: Peer) -> None:
    """What the peer makes of a mixture of a real model (tests/quants/smollm2.py): takes some minutes."""
    from demo.models import make_models
    from tests.quants import smollm2

    base = make_models(REFERENCE.parents[2] / "build" / "demo" / "models" / "moerge-demo")[smollm2.BASE]
    kinds = (*smollm2.PLAIN, *(f"{name}+imatrix" for name in smollm2.WEIGHED))
    found: dict[str, Any] = {}
    for model, layers in (("first", smollm2.FIRST_LAYERS), ("whole", None)):
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = Path(scratch) / "Mixture", Path(scratch) / "out.gguf"
            write_imatrix(Path(scratch) / "imatrix.gguf", smollm2.write_mixture(base, folder, layers))
            for kind in ("BF16", *kinds):
                name, _, imatrix = kind.partition("+")
                dry = model == "whole" and name not in smollm2.WHOLE
                if name in ("F32", "F16", "BF16"):
                    out = Path(scratch) / f"{name}.gguf"
                    command = [*tools.converter, str(folder), "--outfile", str(out), "--outtype", name.lower()]
                else:
                    out = Path(scratch) / "out.gguf"
                    command = [str(tools.quantise), *(["--imatrix", "imatrix.gguf"] if imatrix else [])]
                    command += [*(["--dry-run"] if dry else []), "BF16.gguf", *([] if dry else [str(out)]), name]
                if dry and name in ("F32", "F16"):
                    continue
                done = subprocess.run(command, check=True, cwd=scratch, capture_output=True, text=True)
                found[f"{model} {kind}"] = chosen(done.stdout + done.stderr) if dry else smollm2.summary(out)
                print(model, kind, flush=True)
    lines = (
        f"{json.dumps(name)}:{json.dumps(of, ensure_ascii=False, separators=(',', ':'))}" for name, of in found.items()
    )
    smollm2.REFERENCE.write_text("{" + ",\n".join(lines) + "}\n")


def record_split(scratch: Path, tools: Peer) -> list[dict[str, Any]]:
    """What llama-gguf-split makes of a file: name, size, keys and tensors of each part."""
    from bot.quants import open_model
    from quants.build import quantize
    from quants.metadata import ModelInfo

    model = open_model(write_model(scratch / "Tiny", SPLIT))
    (whole,) = quantize(
        model.config, model.tensors, model.contents, model.folder, scratch / "whole", "Tiny", ["BF16"],
        ModelInfo("Tiny"), prove=False,
    )  # fmt: skip
    size = f"{SPLIT_BYTES // 1_000_000}M"
    command = [str(tools.split), "--split", "--split-max-size", size, str(whole.path), str(scratch / "Tiny-BF16")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [describe_part(path) for path in sorted(scratch.glob("Tiny-BF16-*.gguf"))]


def describe_part(path: Path) -> dict[str, Any]:
    """Of a part of a split file its name, its size, the names of its tensors and keys, and what it says of the splitting."""
    found = describe(path)
    split = {key: value for key, value in found["keys"].items() if key.startswith("split.")}
    return {"name": path.name, "bytes": path.stat().st_size, "keys": sorted(found["keys"]), "split": split} | {
        "tensors": list(found["tensors"])
    }


def chosen(log: str) -> dict[str, Any]:
    """From the log of a dry run the type of each tensor that is quantised, the names by type."""
    types: dict[str, list[str]] = {}
    for tensor, kind in _CHOSEN.findall(log):
        types.setdefault(kind.upper(), []).append(tensor)
    most = max(types, key=lambda kind: len(types[kind]))
    return {"most": most, "others": {kind: names for kind, names in types.items() if kind != most}}


if __name__ == "__main__":
    main()
