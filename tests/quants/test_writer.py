"""Nothing half-written looks finished, and bad numbers do not get into a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from merge.errors import DestinationError, SourceError
from merge.evaluate import checkpoint_expressions
from quants.build import quantize
from quants.kernels import encode
from quants.metadata import ModelInfo
from quants.rows import row_count, rows
from tests.quants.tiny import PIECES, config, write_model

WRITE_UNDER_A_LIMIT = """
import resource, signal, sys
from pathlib import Path
from merge.errors import DestinationError
from merge.evaluate import checkpoint_expressions
from quants.build import quantize
from quants.metadata import ModelInfo
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
tensors, config, evaluator = checkpoint_expressions(folder)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    quantize(config, tensors, evaluator, folder, out, "Tiny", ["Q8_0", "BF16"], ModelInfo("Tiny"))
except DestinationError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    out = tmp_path / "out"
    finished = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(folder), str(out)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "cannot be written (File too large)" in finished.stdout
    assert not list(out.iterdir())


def test_an_interrupted_pass_leaves_no_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(vocab_size=PIECES))
    tensors, found, evaluator = checkpoint_expressions(folder)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            found, tensors, evaluator, folder, tmp_path / "out", "Tiny", ["Q4_K_M"], ModelInfo("Tiny"),
            progress=interrupt,
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_an_unwritable_folder_is_a_sentence(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    tensors, found, evaluator = checkpoint_expressions(folder)
    (tmp_path / "Tiny-BF16.gguf").mkdir()
    with pytest.raises(DestinationError, match=r"Tiny-BF16\.gguf: cannot be written"):
        quantize(found, tensors, evaluator, folder, tmp_path, "Tiny", ["BF16"], ModelInfo("Tiny"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_numbers_that_a_type_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tensors, found, evaluator = checkpoint_expressions(folder)
    with pytest.raises(SourceError, match=r"blk\.0\.attn_v\.weight cannot be stored: .*F16"):
        quantize(found, tensors, evaluator, folder, tmp_path / "out", "Tiny", ["F16"], ModelInfo("Tiny"))
    assert not list((tmp_path / "out").iterdir())


def test_rows_are_the_same_however_they_are_cut(tmp_path: Path) -> None:
    from quants.layout import gguf_layout

    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    tensors, found, evaluator = checkpoint_expressions(folder)
    for tensor in gguf_layout(found, tensors).tensors:
        count = row_count(tensor.expr)
        whole = rows(evaluator, tensor.expr, 0, count)
        assert whole.shape == (count, tensor.expr.shape[-1])
        for step in (7, 45, count):
            cut = [rows(evaluator, tensor.expr, start, min(start + step, count)) for start in range(0, count, step)]
            assert np.array_equal(np.concatenate(cut), whole), tensor.name


@pytest.mark.parametrize("buffer_bytes", [4096, 12288])
def test_files_are_the_same_however_they_are_buffered(
    buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "Tiny", config(num_hidden_layers=1, vocab_size=PIECES))
    tensors, found, evaluator = checkpoint_expressions(folder)

    def made(name: str) -> list[bytes]:
        files = quantize(
            found, tensors, evaluator, folder, tmp_path / name, "Tiny", ["Q8_0", "BF16"], ModelInfo("Tiny"),
            prove=False, max_bytes=400_000,
        )  # fmt: skip
        assert all(len(file.parts) > 1 for file in files)
        return [part.path.read_bytes() for file in files for part in file.parts]

    usual = made("usual")
    monkeypatch.setattr("merge.large_file.BUFFER_BYTES", buffer_bytes)
    assert made("small") == usual


def test_a_block_is_the_same_alone_and_among_others() -> None:
    values = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    for kind in ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"):
        together = encode(values, kind)
        apart = b"".join(encode(values[start : start + 5], kind).tobytes() for start in range(0, 64, 5))
        assert together.tobytes() == apart
