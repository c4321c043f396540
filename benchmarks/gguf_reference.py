"""What llama.cpp's converter and quantiser make of the tiny models in tests/quants: keys, tensor types and bytes.

    python -m benchmarks.gguf_reference LLAMA_CPP LLAMA_QUANTIZE

LLAMA_CPP is a source tree of llama.cpp (for convert_hf_to_gguf.py), LLAMA_QUANTIZE the program built from it. Writes
tests/quants/reference.json, which the tests compare with. The converter needs sentencepiece installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from tests.quants.tiny import CASES, TYPES_ONLY, write_model

REFERENCE = Path(__file__).parents[1] / "tests" / "quants" / "reference.json"


def describe(path: Path, with_bytes: bool = True) -> dict[str, Any]:
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
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape}"
        if with_bytes:
            tensors[tensor.name] += " " + hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16]
    return {"keys": keys, "tensors": tensors} if with_bytes else {"tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("llama_quantize", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name, (config, tokenizer, types) in CASES.items():
        found[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(Path(scratch) / "tiny", config, tokenizer)
            for file_type in dict.fromkeys(("BF16", *types)):
                out = Path(scratch) / f"{file_type}.gguf"
                if file_type in ("F32", "F16", "BF16"):
                    script = str(args.llama_cpp / "convert_hf_to_gguf.py")
                    command = [sys.executable, script, str(folder), "--outfile", str(out)]
                    command += ["--outtype", file_type.lower()]
                else:
                    command = [str(args.llama_quantize), str(out.with_name("BF16.gguf")), str(out), file_type]
                finished = subprocess.run(command, capture_output=True, text=True, check=False)
                if finished.returncode:
                    sys.exit(f"{name} {file_type}: {finished.stderr[-2000:]}")
                if file_type in types:
                    found[name][file_type] = describe(out, name not in TYPES_ONLY)
        print(name, flush=True)
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    REFERENCE.write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
