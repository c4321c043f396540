"""The merged checkpoint: byte for byte what its sources say, whole or not there, and the model it promises."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bot.cli import main
from merge.errors import DestinationError, SourceError
from merge.evaluate import TORCH_DTYPES, Evaluator, open_files
from merge.plan import MergePlan
from merge.stored import rounded
from merge.writer import is_cut_off, write_checkpoint
from tests.dense import planned, recipe_text, save_dense

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def gates_for(plan: MergePlan) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    experts, hidden = len(plan.gated), plan.config["hidden_size"]
    return {n: torch.randn(experts, hidden, generator=generator) for n in range(plan.config["num_hidden_layers"])}


def merged(text: str, folder: Path, out: Path, **options: Any) -> MergePlan:
    plan = planned(text, folder)
    evaluator = Evaluator(open_files(plan.sources), gates_for(plan))
    write_checkpoint(plan, plan.sources[plan.base], evaluator, out, gates_key="test", **options)
    return plan


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [save_dense(tmp_path / f"m{seed}", seed=seed) for seed in range(3)]


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_every_tensor_equals_its_source_byte_for_byte(models: list[Path], tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    merged(recipe_text(models[0], models, dtype="bfloat16"), tmp_path, out, shard_bytes=shard_bytes)
    result = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    sources = [load_file(model / "model.safetensors") for model in models]
    expected = {name: value for name, value in sources[0].items() if ".mlp." not in name}
    for layer in range(3):
        for expert, source in enumerate(sources):
            for dense, sparse in PARTS.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{sparse}.weight"
                expected[name] = source[f"model.layers.{layer}.mlp.{dense}.weight"]
    routers = {name for name in result if name.endswith("block_sparse_moe.gate.weight")}
    assert result.keys() - routers == expected.keys()
    assert len(routers) == 3
    for name, value in expected.items():
        assert result[name].dtype == value.dtype
        assert torch.equal(result[name].view(torch.uint8), value.view(torch.uint8)), name
    assert (len(list(out.glob("*.safetensors"))) == 1) == (shard_bytes == 10**9)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_transformers_loads_the_checkpoint_with_no_key_missing_or_unexpected(
    models: list[Path], tmp_path: Path, shard_bytes: int
) -> None:
    out = tmp_path / "out"
    merged(recipe_text(models[0], models), tmp_path, out, shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == planned(recipe_text(models[0], models), tmp_path).parameters.total
    )
    assert AutoTokenizer.from_pretrained(out)("the capital").input_ids
    assert (out / "generation_config.json").read_bytes() == (models[0] / "generation_config.json").read_bytes()


IDENTITY = {
    "grouped queries": ("llama", {}),
    "one key head a query": ("llama", {"num_key_value_heads": 4}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                           "original_max_position_embeddings": 64}}),
    "llama 3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "sliding window": ("mistral", {"sliding_window": 8}),
    "other epsilon": ("mistral", {"rms_norm_eps": 1e-3}),
}  # fmt: skip


@pytest.mark.parametrize("case", IDENTITY)
@pytest.mark.parametrize("experts", [2, 5])
def test_experts_equal_to_the_base_give_the_dense_models_logits(tmp_path: Path, case: str, experts: int) -> None:
    model_type, changes = IDENTITY[case]
    base = save_dense(tmp_path / "base", model_type=model_type, dtype=torch.float32, **changes)
    merged(recipe_text(base, [base] * experts, dtype="float32"), tmp_path, tmp_path / "out")
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert dense.abs().max() > 0.1
    assert torch.allclose(dense, sparse, atol=1e-4, rtol=0)


def test_scale_and_noise_have_mergekits_meaning(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base", dtype=torch.float32)
    text = recipe_text(base, [base, base], dtype="float32")
    text = text.replace(f"source_model: {base}", f"source_model: {base}\n  noise_scale: 0.01\n  residual_scale: 0.5", 1)
    merged(text, tmp_path, tmp_path / "out")
    source, result = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for dense, sparse in PARTS.items():
        x = source[f"model.layers.1.mlp.{dense}.weight"]
        y = result[f"model.layers.1.block_sparse_moe.experts.0.{sparse}.weight"]
        noise = y / (0.5 if dense == "down_proj" else 1.0) - x
        assert abs(noise.std().item() - 0.01) < 0.0005
        assert abs(noise.mean().item()) < 0.0005
    merged(text, tmp_path, tmp_path / "again")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_slice_of_noise_is_the_same_as_the_whole(tmp_path: Path) -> None:
    from merge.expr import Noise, Read

    base = save_dense(tmp_path / "base", vocab_size=20_000)
    plan = planned(recipe_text(base, [base, base]), tmp_path)
    embedding = next(t.expr for t in plan.tensors if t.name == "model.embed_tokens.weight")
    assert isinstance(embedding, Read)
    evaluator = Evaluator(open_files(plan.sources))
    noisy = Noise(embedding, 0.1, "seed")  # more elements than one block of noise
    whole = evaluator.tensor(noisy).reshape(-1)
    parts = torch.cat(list(evaluator.slices(noisy, max_bytes=300_002)))
    assert whole.numel() > 1 << 20
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cast_rounds_as_torch_does(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    base = save_dense(tmp_path / "base", dtype=stored)
    merged(recipe_text(base, [base, base], dtype=dtype), tmp_path, tmp_path / "out")
    source, result = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight"):
        assert torch.equal(result[name], source[name].to(getattr(torch, dtype)))


def test_an_existing_folder_is_not_touched(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(DestinationError, match="exists already"):
        merged(recipe_text(models[0], models), tmp_path, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(models: list[Path], tmp_path: Path) -> None:
    plan = planned(recipe_text(models[0], models), tmp_path)
    evaluator = Evaluator(open_files(plan.sources), gates_for(plan))
    os.truncate(models[2] / "model.safetensors", 100_000)
    with pytest.raises(SourceError, match="truncated or was changed"):
        write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="k")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence_and_nothing_that_looks_whole(models: list[Path], tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from pathlib import Path; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from tests.merge.test_writer import merged; "
        "from tests.dense import recipe_text; from merge.errors import MoergeError\n"
        "try: merged(Path(sys.argv[1]).read_text(), Path(sys.argv[2]), Path(sys.argv[2], 'out'))\n"
        "except MoergeError as error: print(error); sys.exit(error.exit_code)"
    )
    (tmp_path / "r.yaml").write_text(recipe_text(models[0], models))
    command = [sys.executable, "-c", script, str(tmp_path / "r.yaml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "cannot be written (File too large)" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("model*.safetensors"))


def test_a_disk_without_room_is_said_before_anything_is_copied(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("merge.writer.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DestinationError, match=r"GB are to be written, and 0\.0 GB are free"):
        merged(recipe_text(models[0], models), tmp_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [".moerge-merge"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # copied, and evaluated
def test_a_source_that_shrinks_under_the_merge_is_a_sentence_and_not_a_signal(
    models: list[Path], tmp_path: Path, dtype: str
) -> None:
    plan, cut = planned(recipe_text(models[0], models, dtype=dtype), tmp_path), []
    evaluator = Evaluator(open_files(plan.sources), gates_for(plan))

    def shrink(count: int) -> None:
        if not cut:
            evaluator.files[str(models[2])].fill(memoryview(bytearray(2)), "model.norm.weight", 0)  # open already
            os.truncate(models[2] / "model.safetensors", 4096)
            cut.append(count)

    with pytest.raises(SourceError, match="truncated or was changed"):
        write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="k", advance=shrink)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [".moerge-merge"]


def test_a_source_that_is_rewritten_meanwhile_spoils_no_result(models: list[Path], tmp_path: Path) -> None:
    plan, done = planned(recipe_text(models[0], models), tmp_path), []
    evaluator = Evaluator(open_files(plan.sources), gates_for(plan))

    def rewrite(count: int) -> None:
        done.append(count)
        if len(done) == 40:  # every source has been read from by now
            with (models[1] / "model.safetensors").open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\x00" * 8)

    with pytest.raises(SourceError, match="was changed while it was being read"):
        write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="k", advance=rewrite)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("model*"))


@pytest.mark.parametrize("failing", ["os.fsync", "os.pwrite"])
def test_a_disk_that_fails_late_is_a_destination_error(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = planned(recipe_text(models[0], models), tmp_path)
    evaluator = Evaluator(open_files(plan.sources), gates_for(plan))
    monkeypatch.setattr("merge.large_file.BUFFER_BYTES", 4096)
    write, calls = os.pwrite, []

    def fail_late(target: int, data: memoryview, start: int) -> int:
        calls.append(start)
        return fail() if len(calls) == 30 else write(target, data, start)

    monkeypatch.setattr(f"merge.large_file.{failing}", fail if failing == "os.fsync" else fail_late)
    with pytest.raises(DestinationError, match=r"cannot be written \(No space left on device\)"):
        write_checkpoint(plan, plan.sources[plan.base], evaluator, tmp_path / "out", gates_key="k")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("model*"))


def test_a_merge_killed_between_its_name_and_its_end_is_finished_by_the_next(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, killed = recipe_text(models[0], models), KeyboardInterrupt()
    merged(text, tmp_path, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("merge.writer.sync_folder", lambda folder: None)
        unlink = Path.unlink

        def die(path: Path, missing_ok: bool = False) -> None:
            if path == tmp_path / "out/.moerge-merge":
                raise killed
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", die)
        merged(text, tmp_path, tmp_path / "out")
    assert is_cut_off(tmp_path / "out")
    merged(text, tmp_path, tmp_path / "out")
    assert not is_cut_off(tmp_path / "out")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_gates_are_rounded_as_torch_rounds(dtype: str) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    halves = (
        torch.arange(1, 2**12).to(torch.int32).mul(0x8000).view(torch.float32)
    )  # between two BF16 numbers, or on one
    values = torch.cat([values, halves[halves.isfinite()], -halves[halves.isfinite()]])
    expected = values.to(TORCH_DTYPES[dtype])
    assert rounded(values.numpy(), dtype).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("refused", ["when it is opened", "when it is written"])
@pytest.mark.parametrize("buffer_bytes", [4096, 12288, 4 << 20])
def test_where_no_file_goes_past_the_page_cache_the_bytes_are_the_same(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, buffer_bytes: int
) -> None:
    text = recipe_text(models[0], models)
    merged(text, tmp_path, tmp_path / "out")
    opened, write = os.open, os.pwrite

    def refuse_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *args, **options)

    def refuse_write(target: int, data: memoryview, start: int) -> int:
        if fcntl.fcntl(target, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(target, data, start)

    if refused == "when it is opened":
        monkeypatch.setattr("merge.large_file.os.open", refuse_open)
    else:
        monkeypatch.setattr("merge.large_file.os.pwrite", refuse_write)
    monkeypatch.setattr("merge.large_file.BUFFER_BYTES", buffer_bytes)
    merged(text, tmp_path, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_merge_of_copies_and_random_gates_never_imports_torch(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe_text(models[0], models, dtype="bfloat16"))
    script = (
        "import sys; from bot.cli import main; code = main(['merge', *sys.argv[1:]]); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "r.yaml"), str(tmp_path / "out")], check=True)
    assert len(load_file(tmp_path / "out/model.safetensors")) > 10


@pytest.mark.parametrize(("threads", "buffers", "buffer_bytes"), [(1, 2, 4096), (2, 3, 1 << 20), (5, 9, 12288)])
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, buffers: int, buffer_bytes: int
) -> None:
    base = save_dense(tmp_path / "base", dtype=torch.float32, hidden_size=256, intermediate_size=1024)
    text = recipe_text(base, [base, base], dtype="bfloat16")
    text = text.replace(f"source_model: {base}", f"source_model: {base}\n  noise_scale: 0.01", 1)
    before = torch.get_num_threads()
    merged(text, tmp_path, tmp_path / "out")
    monkeypatch.setattr("merge.large_file.BUFFERS", buffers)
    monkeypatch.setattr("merge.large_file.BUFFER_BYTES", buffer_bytes)
    try:
        torch.set_num_threads(threads)
        merged(text, tmp_path, tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def truncated(folder: Path, out: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return out


def without_a_shard(folder: Path, out: Path) -> Path:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def not_writable(folder: Path, out: Path) -> Path:
    return Path("/sys/moerge-out")  # not even root may make a folder there


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, "does not fit its bytes; the file is truncated or damaged"),
        (without_a_shard, "the index names model-00002-of-00002.safetensors, which is not there"),
        (not_writable, "/sys/moerge-out.gates: cannot be written ("),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_read_or_written_ends_the_command_with_one_sentence_and_code_4(
    spoil: Callable[[Path, Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_dense(tmp_path / "base")
    (tmp_path / "r.yaml").write_text(recipe_text(base, [base, base]))
    out = spoil(base, tmp_path / "out")
    assert main(["merge", str(tmp_path / "r.yaml"), str(out)]) == 4
    printed = capsys.readouterr()
    assert said in printed.err + printed.out
    assert "Traceback" not in printed.err
    assert not list(out.parent.glob(f"{out.name}*"))


def test_a_killed_merge_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    models = [save_dense(tmp_path / f"m{n}", seed=n, hidden_size=256, intermediate_size=1024) for n in range(3)]
    text = recipe_text(models[0], models)
    merged(text, tmp_path, tmp_path / "whole", shard_bytes=2_000_000)
    (tmp_path / "r.yaml").write_text(text)
    script = (
        "import sys, time; from pathlib import Path; from tests.merge.test_writer import merged\n"
        "merged(Path(sys.argv[1]).read_text(), Path(sys.argv[2]), Path(sys.argv[2], 'out'), shard_bytes=2_000_000,"
        " advance=lambda count: time.sleep(0.02))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "r.yaml"), str(tmp_path)]
    process = subprocess.Popen(command)
    partial = tmp_path / "out.partial"
    try:
        deadline = time.monotonic() + 60
        while len(list(partial.glob("model-*.safetensors"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*.safetensors")}
    assert len(finished) >= 2
    assert not (tmp_path / "out").exists()
    merged(text, tmp_path, tmp_path / "out", shard_bytes=2_000_000)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    for name, when in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == when
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_a_partial_folder_of_another_merge_is_not_used(models: list[Path], tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"other")
    (partial / ".moerge-merge").write_text("something else")
    merged(recipe_text(models[0], models), tmp_path, tmp_path / "out")
    assert len(load_file(tmp_path / "out/model.safetensors")) > 10


def test_a_folder_of_somebody_else_s_is_not_taken_for_a_partial_one(models: list[Path], tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"out\.partial: is not a merge's"):
        merged(recipe_text(models[0], models), tmp_path, tmp_path / "out")
    assert (partial / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_memory_stays_flat_when_the_model_grows(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from merge.writer import write_checkpoint; "
        "from merge.evaluate import Evaluator, open_files; from tests.dense import planned\n"
        "import torch; plan = planned(Path(sys.argv[1]).read_text(), Path(sys.argv[2])); "
        "gates = {n: torch.zeros(4, plan.config['hidden_size']) for n in range(plan.config['num_hidden_layers'])}\n"
        "def anon(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "before = anon(); peak = [0]\n"
        "write_checkpoint(plan, plan.sources[plan.base], Evaluator(open_files(plan.sources), gates),"
        " Path(sys.argv[2], 'out'), gates_key='k', advance=lambda count: peak.append(anon()))\n"
        "print(max(peak) - before)"
    )
    grown = {}
    for layers in (2, 20):
        folder = tmp_path / str(layers)
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
        base = save_dense(folder / "base", dtype=torch.float32, **sizes)
        (folder / "r.yaml").write_text(recipe_text(base, [base] * 4, dtype="bfloat16"))
        command = [sys.executable, "-c", script, str(folder / "r.yaml"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[layers] = int(done.stdout) * 1024
        shutil.rmtree(folder)
    # The large model's F32 sources are 330 MB; what is held at once is a slice and its cast.
    assert grown[20] < 120e6, grown
    assert grown[20] < grown[2] + 60e6, grown
