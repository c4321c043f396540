"""What goes wrong with `moerge quantize` ends in a sentence, the right exit code, and no file that looks finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bot.cli import main
from tests.dense import recipe_text
from tests.quants.tiny import PIECES, config, write_model

SMALL = {"num_hidden_layers": 1, "vocab_size": PIECES}
# Runs the command with files of at most so many bytes: writing more is refused as on a full disk.
LIMITED = """
import resource, signal, sys
from bot.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "Tiny", config(**SMALL | {"vocab_size": 640}), "byte_level")
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--types", "Q8_0"]) == 4
    assert "llama.cpp has no name for how this tokenizer splits text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_an_unknown_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "Tiny", config(**SMALL))
    (folder / "config.json").write_text(json.dumps(config(**SMALL) | {"model_type": "gpt_neox"}))
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--types", "Q8_0"]) == 4
    assert "no GGUF can be made of a model of type 'gpt_neox'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "Tiny", config(**SMALL | {"vocab_size": PIECES - 1}))
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--types", "Q8_0"]) == 4
    assert f"the tokenizer has {PIECES} tokens, the embedding only {PIECES - 1} rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    folder, out = write_model(tmp_path / "Tiny", config(**SMALL)), tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, str(1 << 20), "quantize", str(folder), str(out), "--types", "BF16"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 4
    assert "Tiny-BF16.gguf: cannot be written (File too large)" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not out.exists()


def test_a_run_that_is_killed_leaves_no_finished_name_and_the_next_one_ends_it(tmp_path: Path) -> None:
    large = config(**SMALL | {"num_hidden_layers": 3, "num_local_experts": 8})
    folder, out = write_model(tmp_path / "Tiny", large), tmp_path / "out"
    command = [sys.executable, "-m", "bot", "quantize", str(folder), str(out), "--types", "Q4_K_M"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(out.glob(".Tiny.partial/*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("*.gguf"))
    assert main(command[3:]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["Tiny-Q4_K_M.gguf"]


def test_a_file_that_does_not_pass_its_proof_is_left_out_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quants import kernels

    folder, out = write_model(tmp_path / "Tiny", config(**SMALL)), tmp_path / "out"
    encode = kernels.encode

    def damaged(rows: kernels.Array, kind: str, *importance: object) -> kernels.Array:
        encoded = encode(rows, kind)
        if kind == "Q8_0":
            encoded[1::34] = 0x7C  # every block's scale becomes infinite, or not a number
        return encoded

    monkeypatch.setattr("quants.writer.encode", damaged)
    assert main(["quantize", str(folder), str(out), "--types", "Q8_0,Q5_0"]) == 4
    assert "Tiny-Q8_0.gguf" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["Tiny-Q5_0.gguf"]


@pytest.mark.parametrize("command", ["build", "quantize"])
@pytest.mark.parametrize(
    ("tokenizer", "rows", "why"),
    [
        ("byte_level", 640, "llama.cpp has no name for how"),
        ("byte_fallback", PIECES - 1, f"has {PIECES} tokens, the embedding only"),
    ],
)
def test_a_recipe_whose_base_has_a_tokenizer_that_gguf_cannot_have_ends_before_the_calibration(
    command: str, tokenizer: str, rows: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def calibrate(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("bot.gates.make_gates", calibrate)
    monkeypatch.setattr("bot.pipeline.make_gates", calibrate)
    dense = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": rows}
    base = write_model(tmp_path / "base", config(**dense), tokenizer)
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(recipe_text(base, [base, base], release={"quants": ["Q8_0"]}))
    assert (
        main(["build", str(recipe), "--out", str(out)] if command == "build" else ["quantize", str(recipe), str(out)])
        == 4
    )
    assert why in capsys.readouterr().err
    assert not list(out.glob("**/*.gguf"))
