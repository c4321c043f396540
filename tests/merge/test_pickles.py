"""Pickle checkpoints: the same tensors as torch reads, found without unpickling."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merge.checkpoint import open_folder
from merge.errors import RecipeError, SourceError
from merge.evaluate import Files
from merge.pickles import read_pickle, read_pickle_file
from merge.zip_layout import RandomAccess
from tests.dense import planned, recipe_text, save_dense
from tests.merge.test_writer import merged

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def as_pickle(folder: Path, *, legacy: bool = False, shards: int = 1) -> Path:
    """Turn a safetensors checkpoint into the pickle one that transformers wrote before."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    files = [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(1, shards + 1)]
    if shards == 1:
        files = ["pytorch_model.bin"]
    else:
        weight_map = {name: files[index % shards] for index, name in enumerate(names)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, file in enumerate(files):
        state = OrderedDict((name, weights[name]) for name in names[number::shards])
        state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        torch.save(state, folder / file, _use_new_zipfile_serialization=not legacy)
    return folder


def assert_same_as_torch(path: Path, **options: Any) -> None:
    raw, found = path.read_bytes(), read_pickle_file(path, "x.bin")
    expected = torch.load(path, weights_only=True, **options)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape), name
        assert info.start is not None
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw[info.start : info.start + info.nbytes] == data, name


# --------------------------------------------------------------------------------------------------- what torch.save writes


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_tensor_is_where_torch_reads_it(tmp_path: Path, legacy: bool, protocol: int) -> None:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = OrderedDict()
    for dtype in FLOATS:
        state[str(dtype)] = torch.randn(5, 7, generator=generator).to(dtype)
    for dtype in INTEGERS:
        state[str(dtype)] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    state["parameter"] = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
    state["tied"] = state["parameter"]
    state["rows"] = state["parameter"].detach()[1:3]
    state["scalar"], state["empty"] = torch.tensor(1.5), torch.empty(0, 4)
    state["färbe.weight"] = torch.ones(1)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    if protocol == 2:
        assert_same_as_torch(path)
    else:  # torch's own restricted reader takes protocol 2 only
        twin = tmp_path / "twin.bin"
        torch.save(state, twin)
        ours, theirs = read_pickle_file(path, "x"), read_pickle_file(twin, "x")
        assert [(n, i.dtype, i.shape) for n, i in ours.items()] == [(n, i.dtype, i.shape) for n, i in theirs.items()]
        raw = path.read_bytes()
        for name, tensor in state.items():
            start = ours[name].start
            assert start is not None
            if tensor.numel():
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw[start : start + len(data)] == data


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=6),
    legacy=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_any_shapes_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], legacy: bool, dtype: torch.dtype
) -> None:
    state = {f"layer.{n}.weight": torch.randn(shape).to(dtype) for n, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("any") / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert_same_as_torch(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_pickles_equals_the_merge_of_their_safetensors_twins(
    tmp_path: Path, legacy: bool, dtype: torch.dtype, shards: int
) -> None:
    outputs = []
    for kind in ("safetensors", "pickle"):
        models = [save_dense(tmp_path / f"{kind}{n}", seed=n, dtype=dtype, num_hidden_layers=2) for n in range(2)]
        if kind == "pickle":
            models = [as_pickle(model, legacy=legacy, shards=shards) for model in models]
        merged(recipe_text(models[0], models), tmp_path, tmp_path / f"out-{kind}")
        outputs.append((tmp_path / f"out-{kind}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_pickles_can_be_cast_and_altered_though_the_stream_does_not_align_them(tmp_path: Path) -> None:
    twin = save_dense(tmp_path / "twin", dtype=torch.float32)
    model = as_pickle(save_dense(tmp_path / "model", dtype=torch.float32), legacy=True)
    opened = open_folder(model)
    assert opened.tensors is not None
    assert any(info.start is not None and info.start % 4 for info in opened.tensors.values())
    files, expected = Files(opened), load_file(twin / "model.safetensors")
    for name, info in opened.tensors.items():
        assert torch.equal(files.flat(name, 0, info.elements), expected[name].reshape(-1))
    for folder in (twin, model):
        merged(recipe_text(folder, [folder, folder], dtype="bfloat16"), tmp_path, tmp_path / f"out-{folder.name}")
    assert (tmp_path / "out-twin/model.safetensors").read_bytes() == (
        tmp_path / "out-model/model.safetensors"
    ).read_bytes()


def test_where_both_are_there_safetensors_win(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    tensors = open_folder(model).tensors or {}
    assert {info.file for info in tensors.values()} == {"model.safetensors"}


def test_a_folder_that_changed_has_another_fingerprint(tmp_path: Path) -> None:
    model = as_pickle(save_dense(tmp_path / "model"))
    before = open_folder(model).fingerprint
    assert open_folder(model).fingerprint == before
    state = torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.save(dict(state), model / "pytorch_model.bin")
    assert open_folder(model).fingerprint != before


def test_shards_without_an_index_are_a_finding(tmp_path: Path) -> None:
    model = as_pickle(save_dense(tmp_path / "model"), shards=2)
    (model / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(RecipeError, match=r"without their pytorch_model\.bin\.index\.json"):
        planned(recipe_text(model, [model, model]), tmp_path)


def test_a_preview_of_a_pickle_reads_its_descriptions_only(tmp_path: Path) -> None:
    for legacy in (False, True):
        model = as_pickle(save_dense(tmp_path / f"{legacy}", hidden_size=256, vocab_size=4096), legacy=legacy)
        raw, asked = (model / "pytorch_model.bin").read_bytes(), [0]

        def read(start: int, stop: int, raw: bytes = raw, asked: list[int] = asked) -> bytes:
            asked[0] += stop - start
            return raw[start:stop]

        found = read_pickle(RandomAccess("x", len(raw), read), exact=False)
        whole = read_pickle_file(model / "pytorch_model.bin", "x")
        assert {n: (i.dtype, i.shape) for n, i in found.items()} == {n: (i.dtype, i.shape) for n, i in whole.items()}
        assert asked[0] < 300_000 < len(raw)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("make", [lambda x: x.t(), lambda x: x[:, 1:3], lambda x: x[::2], lambda x: x[0].expand(3, 6)])
def test_a_tensor_that_is_no_plain_run_of_bytes_is_refused(tmp_path: Path, legacy: bool, make: Any) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": make(torch.randn(4, 6))}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SourceError, match=r"x\.bin: .*contiguous"):
        read_pickle_file(path, "x.bin")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"state_dict": {"w": torch.ones(1)}}, "something else than a tensor under 'state_dict'"),
        ({"w": torch.ones(1), "epoch": 3}, "something else than a tensor under 'epoch'"),
        ([torch.ones(1)], "does not hold a dictionary"),
        (torch.ones(1), "does not hold a dictionary"),
        ({"w": torch.ones(2, 2).to_sparse()}, "asks for"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "asks for 'torch.ComplexFloatStorage'"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "asks for"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "asks for|in a way"),
        ({1: torch.ones(1)}, "dictionary key"),
        (torch.nn.Linear(2, 2), "asks for"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(SourceError, match=said) as error:
        read_pickle_file(tmp_path / "x.bin", "lab/model/x.bin")
    assert str(error.value).startswith("lab/model/x.bin: ")
