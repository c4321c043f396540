"""What a GGUF file begins with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from merge.expr import Read
from quants.header import header
from quants.layout import GgufTensor


def test_a_header_is_the_one_that_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "peer", "llama")
    for kind, value in (("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1),
                        ("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("float32", 0.1), ("float64", 0.1),
                        ("bool", True), ("string", "grüße"), ("array", [1, -1]), ("array", [0.5]), ("array", [True, False]),
                        ("array", ["a", "", "ß"])):  # fmt: skip
        getattr(writer, f"add_{kind}")(f"test.{len(writer.kv_data[0])}", value)
    writer.add_token_list([b"\xff", b"a"])
    tensors = [
        GgufTensor("a.weight", Read("m", "a", "BF16", (3, 33))),
        GgufTensor("b.weight", Read("m", "b", "BF16", (2, 3, 32))),
        GgufTensor("c.weight", Read("m", "c", "F32", (5,))),
    ]
    types = {"a.weight": "BF16", "b.weight": "Q8_0", "c.weight": "F32"}
    for tensor, nbytes in zip(tensors, (3 * 33 * 2, 2 * 3 * 34, 5 * 4), strict=True):
        kind = gguf.GGMLQuantizationType[types[tensor.name]]
        shape = tensor.expr.shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    peer = (tmp_path / "peer").read_bytes()
    assert header(writer.kv_data[0], tensors, types) == peer + bytes(-len(peer) % 32)
