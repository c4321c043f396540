"""A PyTorch pickle checkpoint (`pytorch_model*.bin`) read without unpickling.

A pickle is a program; loading one with Python's `pickle` runs it. Here its opcodes are interpreted by a machine that knows
only what describes tensors: dictionaries, lists, tuples, numbers, texts, torch's storages and the calls that make a tensor
of one. Every other opcode and every other global is an error, so there is nothing that a file could make run. The tensors
are then found by their offsets, as those of a safetensors file are: no tensor's bytes pass through here.

Two layouts exist: a zip file (torch 1.6 and later) with `data.pkl` and each storage as an entry of its own, and before that
one stream of five pickles followed by the storages.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
Zip layout: https://docs.pytorch.org/docs/stable/notes/serialization.html#serialized-file-format-for-torch-save
Stream layout: `_legacy_save` in https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge.dtypes import SIZES
from merge.errors import SourceError
from merge.tensors import TensorInfo
from merge.zip_layout import RandomAccess, data_start, data_starts, zip_entries

# A tensor takes about 200 bytes and 30 opcodes of a pickle: these are far above the largest checkpoint.
MAX_PICKLE = 32_000_000
MAX_OPCODES = 2_000_000
# The first read of a stream whose pickles' length is not known beforehand.
FIRST_READ = 256 * 1024

# What a storage class means, in safetensors' names.
STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
ORDERED_DICT = "collections.OrderedDict"
TENSOR_V1 = "torch._utils._rebuild_tensor"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
GLOBALS = frozenset({ORDERED_DICT, TENSOR_V1, TENSOR, PARAMETER, *(f"torch.{name}" for name in STORAGES)})

# The first two pickles of the stream layout.
MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001

OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}

_MARK: Final = object()


class _Refused(Exception):
    """Something in a pickle that no tensor needs; the message continues "its pickle ..."."""


class _MoreNeeded(Exception):
    """The pickle goes on behind the bytes at hand."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name of GLOBALS. Never looked up, never called."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """`offset` in elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_pickle_file(path: Path, name: str) -> dict[str, TensorInfo]:
    """The tensors of a pickle checkpoint's file on this machine. `name` is shown in messages. Raises SourceError."""
    try:
        with path.open("rb") as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return read_pickle(RandomAccess(name, path.stat().st_size, read), exact=True)
    except OSError as error:
        raise SourceError(f"{name}: cannot be read ({error.strerror})") from None


def read_pickle(file: RandomAccess, *, exact: bool) -> dict[str, TensorInfo]:
    """The tensors of a pickle checkpoint's file, by name; `TensorInfo.file` is the name of the file as shown.

    `exact=False` reads no more than the descriptions, in a handful of ranges: `start` is None then, because in a zip file it
    stands in a header of each storage. Raises SourceError where the file holds anything but a plain dictionary of tensors.
    """
    if file.size < 4:
        raise SourceError(f"{file.name}: not a PyTorch checkpoint (shorter than four bytes)")
    try:
        found = _read_zip(file, exact) if file.read(0, 4) == b"PK\x03\x04" else _read_stream(file, exact)
    except _Refused as error:
        raise SourceError(f"{file.name}: its pickle {error}; it is not read any further") from None
    except _MoreNeeded:
        raise SourceError(f"{file.name}: its pickle ends too early; the file is truncated or damaged") from None
    return found


def _read_zip(file: RandomAccess, exact: bool) -> dict[str, TensorInfo]:
    entries = zip_entries(file)
    folders = {name.split("/")[0] for name in entries}
    if len(folders) != 1:
        raise SourceError(f"{file.name}: not a checkpoint of torch's: its entries lie in {len(folders)} folders")
    folder = folders.pop()
    if any(name == f"{folder}/constants.pkl" or name.startswith(f"{folder}/code/") for name in entries):
        raise SourceError(f"{file.name}: a TorchScript program, not a checkpoint")
    description = entries.get(f"{folder}/data.pkl")
    if description is None:
        raise SourceError(f"{file.name}: not a checkpoint of torch's: no data.pkl in it")
    if description.size > MAX_PICKLE:
        raise SourceError(f"{file.name}: its data.pkl has {description.size} bytes, more than any checkpoint's")
    order = entries.get(f"{folder}/byteorder")
    if order is not None:
        start = data_start(file, order)
        if order.size != 6 or file.read(start, start + order.size) != b"little":
            raise SourceError(f"{file.name}: its numbers are big-endian, which is not read")
    starts = data_starts(file, entries) if exact else {}
    start = data_start(file, description)
    machine = _Machine(file.read(start, start + description.size), stream=False)
    value = machine.load()
    if machine.position != description.size:
        raise _Refused("goes on behind its end")
    for storage in machine.storages.values():
        entry = entries.get(f"{folder}/data/{storage.key}")
        if entry is None or entry.size != storage.nbytes:
            there = "is not there" if entry is None else f"has {entry.size} bytes"
            raise SourceError(
                f"{file.name}: storage {storage.key} {there}, its pickle says {storage.nbytes}; "
                "the file is truncated or damaged"
            )
    return {
        name: _info(tensor, file.name, starts.get(f"{folder}/data/{tensor.storage.key}"))
        for name, tensor in _state_dict(value)
    }


def _read_stream(file: RandomAccess, exact: bool) -> dict[str, TensorInfo]:
    length = min(FIRST_READ, file.size)
    while True:
        machine = _Machine(file.read(0, length), stream=True)
        try:
            if machine.load() != MAGIC:
                raise SourceError(f"{file.name}: neither a zip file nor a stream that torch.save writes")
            value, keys = _stream_pickles(machine)
            break
        except _MoreNeeded:
            if length == file.size or length >= MAX_PICKLE:
                raise
            length = min(4 * length, file.size, MAX_PICKLE)
    # Storages in the order of `keys`, each behind its number of elements (int64).
    starts: dict[str, int] = {}
    position = machine.position
    for key in keys:
        storage = machine.storages[key]
        if exact and file.read(position, position + 8) != struct.pack("<q", storage.numel):
            raise SourceError(f"{file.name}: storage {key} has another size than its pickle says; the file is damaged")
        starts[key] = position + 8
        position += 8 + storage.nbytes
    if position != file.size:
        raise SourceError(
            f"{file.name}: has {file.size} bytes, its pickle describes {position}; the file is truncated or damaged"
        )
    return {
        name: _info(tensor, file.name, starts[tensor.storage.key] if exact else None)
        for name, tensor in _state_dict(value)
    }


def _stream_pickles(machine: _Machine) -> tuple[Any, list[str]]:
    """What follows the magic number: version, system, the object, and the storages' keys in the order of their bytes."""
    if machine.load() != STREAM_VERSION:
        raise _Refused("is of a version of the stream that is not known")
    system = machine.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _Refused("is not of a little-endian machine")
    value = machine.load()
    keys = machine.load()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise _Refused("has no list of its storages")
    if len(set(keys)) != len(keys) or set(keys) != machine.storages.keys():
        raise _Refused("lists other storages than its tensors have")
    return value, keys


def _state_dict(value: Any) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of a plain state dict."""
    if type(value) is not dict:
        raise _Refused("does not hold a dictionary of tensors")
    for name, tensor in value.items():
        if type(tensor) is not _Tensor:
            raise _Refused(f"holds something else than a tensor under {name[:100]!r}")
        yield name, tensor


def _info(tensor: _Tensor, file: str, start: int | None) -> TensorInfo:
    dtype = tensor.storage.dtype
    return TensorInfo(dtype, tensor.shape, file, None if start is None else start + tensor.offset * SIZES[dtype])


class _Machine:
    """The interpreter. `data` may hold several pickles; `load` reads the next one, and `position` is behind it then.

    Its dictionaries have texts as keys only (Python seeds the hash of texts, not that of numbers), no step takes longer for a
    value made earlier, and nothing compares, hashes or prints a nested one: a pickle costs what its bytes cost.
    """

    def __init__(self, data: bytes, *, stream: bool) -> None:
        self.data = data
        self.position = 0
        self.storages: dict[str, _Storage] = {}
        self._stream = stream
        self._opcodes = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def load(self) -> Any:
        """The value of the pickle that begins at `position`. Raises _Refused, _MoreNeeded."""
        self._stack, self._memo = [], []
        while True:
            code = self._take(1)[0]
            self._opcodes += 1
            if self._opcodes > MAX_OPCODES:
                raise _Refused("has more opcodes than any checkpoint's")
            if code == 0x2E:  # STOP
                value = self._pop()
                if self._stack:
                    raise _Refused("ends with values left over")
                return value
            step = _STEPS.get(code)
            if step is None:
                raise _Refused(f"has the opcode {OPCODE_NAMES.get(code, hex(code))}, which no tensor needs")
            step(self)

    # ------------------------------------------------------------------------------------------------ bytes and the stack

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise _MoreNeeded
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 200)
        if end < 0:
            if len(self.data) - self.position >= 200:
                raise _Refused("names a global of more than 200 letters")
            raise _MoreNeeded
        line = self._take(end + 1 - self.position)[:-1]
        return line.decode("ascii", errors="backslashreplace")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _Refused("takes a value where there is none")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _Refused("takes a value where there is none")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        raise _Refused("takes values where there are none")

    # ----------------------------------------------------------------------------------------------------------- opcodes

    def _protocol(self) -> None:
        if self._take(1)[0] not in (2, 3, 4, 5):
            raise _Refused("is of a protocol that torch.save does not write")

    def _frame(self) -> None:
        self._take(8)  # a hint for buffering, nothing else

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _long(self) -> None:
        raw = self._take(self._take(1)[0])
        if len(raw) > 16:
            raise _Refused("has a number larger than any size")
        self._push(int.from_bytes(raw, "little", signed=True))

    def _text(self, length_layout: str) -> None:
        length = self._number(length_layout)
        if length > 10_000:
            raise _Refused(f"has a text of {length} bytes")
        try:
            self._push(self._take(length).decode())
        except UnicodeDecodeError:
            raise _Refused("has a text that is not UTF-8") from None

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _remember(self, index: int) -> None:
        if index != len(self._memo):  # every pickler numbers them one after the other
            raise _Refused("remembers a value under a number out of turn")
        self._memo.append(self._top())

    def _recall(self, index: int) -> None:
        if index >= len(self._memo):
            raise _Refused("recalls a value that it never had")
        self._push(self._memo[index])

    def _global(self, module: Any, name: Any) -> None:
        wanted = f"{module}.{name}" if type(module) is str and type(name) is str else "something without a name"
        if wanted not in GLOBALS:
            raise _Refused(f"asks for {wanted[:200]!r}, which no tensor needs")
        self._push(_Global(wanted))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _items(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(values) % 2:
            raise _Refused("sets items of something that has none")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str:
                raise _Refused("has a dictionary key that is no text")
            if key in target:
                raise _Refused(f"has the entry {key[:100]!r} twice")
            target[key] = value

    def _one_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._items([key, value])

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise _Refused("appends to something that is no list")
        target.extend(values)

    def _build(self) -> None:
        # A state dict carries the versions of its modules as an attribute, `_metadata`; it says nothing about tensors.
        state, target = self._pop(), self._top()
        if type(state) is not dict or len(state) != 1 or "_metadata" not in state or type(target) is not dict:
            raise _Refused("sets attributes of something that has none")

    def _persistent(self) -> None:
        """A storage: ("storage", class, key, device, number of elements), and in the stream layout what it is a view of."""
        value = self._pop()
        if type(value) is not tuple or len(value) != (6 if self._stream else 5) or value[0] != "storage":
            raise _Refused("refers to something that is not a storage")
        _, kind, key, _, numel = value[:5]
        if self._stream and value[5] is not None:
            raise _Refused("has a storage that is a view of another")
        if (
            type(kind) is not _Global
            or not kind.name.startswith("torch.")
            or kind.name in (TENSOR, TENSOR_V1, PARAMETER)
        ):
            raise _Refused("has a storage of no known type")
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,20}", key, re.ASCII):
            raise _Refused("has a storage whose key is not a number")
        storage = _Storage(STORAGES[kind.name.removeprefix("torch.")], key, _size(numel))
        # The same bytes under two types or sizes: torch.save refuses to write that.
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused(f"describes storage {key} in two ways")
        self._push(storage)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("calls something that cannot be called")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                self._push({})
            case "torch._utils._rebuild_tensor", (storage, offset, shape, stride):
                self._push(_tensor(storage, offset, shape, stride))
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, _, hooks):
                _no_hooks(hooks)
                self._push(_tensor(storage, offset, shape, stride))
            case "torch._utils._rebuild_parameter", (tensor, _, hooks) if type(tensor) is _Tensor:
                _no_hooks(hooks)
                self._push(tensor)
            case _:
                raise _Refused(f"calls {function.name} in a way that torch.save does not")


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine._protocol,
    0x95: _Machine._frame,
    ord("("): lambda m: m._push(_MARK),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    ord("J"): lambda m: m._push(m._number("<i")),
    0x8A: _Machine._long,
    ord("G"): lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    ord("X"): lambda m: m._text("<I"),
    0x8C: lambda m: m._text("<B"),
    ord(")"): lambda m: m._push(()),
    ord("]"): lambda m: m._push([]),
    ord("}"): lambda m: m._push({}),
    ord("t"): lambda m: m._push(tuple(m._since_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("a"): lambda m: m._append([m._pop()]),
    ord("e"): lambda m: m._append(m._since_mark()),
    ord("s"): _Machine._one_item,
    ord("u"): lambda m: m._items(m._since_mark()),
    ord("q"): lambda m: m._remember(m._number("<B")),
    ord("r"): lambda m: m._remember(m._number("<I")),
    0x94: lambda m: m._remember(len(m._memo)),
    ord("h"): lambda m: m._recall(m._number("<B")),
    ord("j"): lambda m: m._recall(m._number("<I")),
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: _Machine._stack_global,
    ord("Q"): _Machine._persistent,
    ord("R"): _Machine._reduce,
    ord("b"): _Machine._build,
}


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> _Tensor:
    """A tensor whose elements lie in the storage one after the other in row-major order."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise _Refused("makes a tensor of something else than a storage")
    if len(shape) != len(stride) or len(shape) > 64:
        raise _Refused("has a tensor whose shape and strides disagree")
    sizes = tuple(_size(size) for size in shape)
    strides = tuple(_size(step) for step in stride)
    elements = math.prod(sizes)
    if _size(offset) + elements > storage.numel:
        raise _Refused("has a tensor that reaches beyond its storage")
    step = 1
    for size, found in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and elements and found != step:
            raise _Refused("has a tensor that is transposed or cut out of another: save it with .contiguous()")
        step *= size
    return _Tensor(storage, offset, sizes)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise _Refused("has a size or offset that is no whole number")
    return value


def _no_hooks(hooks: Any) -> None:
    if type(hooks) is not dict or hooks:
        raise _Refused("has a tensor with hooks")
