"""Where the entries of a zip file lie, read strictly: it comes from strangers and is never unpacked.

Only what torch.save writes is taken: entries stored as they are, one after the other, and a central directory that ends the
file. Whatever two zip readers could read in two ways (a comment that hides another directory, names twice, headers that
disagree, entries that overlap) is refused.
Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (sections 4.3 and 4.5.3)
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from merge.errors import SourceError

# A checkpoint's shard has some hundreds of entries of about 100 bytes.
MAX_ENTRIES = 200_000
MAX_DIRECTORY = 32_000_000

_END = struct.Struct("<4s4H2LH")  # end of central directory: disks, entries, size and offset of the directory, comment
_LOCATOR = struct.Struct("<4sLQL")  # zip64: where the next one is
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
# Sizes after the data instead of before it; names in UTF-8. Any other bit (encryption, patches) changes what bytes mean.
_ALLOWED_FLAGS = 0x0008 | 0x0800
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RandomAccess:
    """A file as a place to read ranges of: `read(start, stop)` gives those bytes, here or on the Hub."""

    name: str
    size: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as the central directory tells it: offset of its local header, bytes of its data."""

    name: str
    header: int
    size: int


def zip_entries(file: RandomAccess) -> dict[str, Entry]:
    """The entries of a zip file by name, from its central directory alone. Raises SourceError."""
    start, size, count = _directory(file)
    raw = file.read(start, start + size)
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        if len(raw) - position < _CENTRAL.size:
            raise _bad(file, "its directory ends too early")
        fields = _CENTRAL.unpack_from(raw, position)
        signature, _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length, comment, disk = fields[
            :14
        ]
        header = fields[16]
        name_start = position + _CENTRAL.size
        position = name_start + name_length + extra_length + comment
        if signature != b"PK\x01\x02" or position > len(raw):
            raise _bad(file, "its directory is damaged")
        name = _name(raw[name_start : name_start + name_length], file)
        if name in entries:
            raise _bad(file, f"entry {name!r} stands in it twice")
        if method != 0:
            raise _bad(file, f"entry {name!r} is compressed, which torch never does")
        if flags & ~_ALLOWED_FLAGS or comment or disk not in (0, _FULL16):
            raise _bad(file, f"entry {name!r} is encrypted or of a kind torch never writes")
        wide = _wide(raw[name_start + name_length : position], (unpacked, packed, header), file)
        unpacked, packed, header = wide
        if packed != unpacked or header + _LOCAL.size + name_length + unpacked > start:
            raise _bad(file, f"entry {name!r} does not fit where it claims to lie")
        entries[name] = Entry(name, header, unpacked)
    if position != size:
        raise _bad(file, "its directory holds more than its entries")
    for entry, following in itertools.pairwise(_in_order(entries)):
        if entry.header + _LOCAL.size + len(entry.name) + entry.size > following.header:
            raise _bad(file, f"entries {entry.name!r} and {following.name!r} overlap")
    return entries


def data_start(file: RandomAccess, entry: Entry) -> int:
    """Offset of the first byte of an entry's data, from its local header. Raises SourceError where that disagrees with the
    central directory."""
    raw = file.read(entry.header, entry.header + _LOCAL.size)
    signature, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack(raw)
    start: int = entry.header + _LOCAL.size + name_length + extra_length
    if signature != b"PK\x03\x04" or method != 0 or flags & ~_ALLOWED_FLAGS or start + entry.size > file.size:
        raise _bad(file, f"entry {entry.name!r} is not where its directory says")
    rest = file.read(entry.header + _LOCAL.size, start)
    if rest[:name_length] != entry.name.encode():
        raise _bad(file, f"entry {entry.name!r} has another name in its own header")
    sizes_follow = flags & 0x0008 and (packed, unpacked) == (0, 0)
    if not sizes_follow:
        sizes = _wide(rest[name_length:], (unpacked, packed), file)
        if sizes != (entry.size, entry.size):
            raise _bad(file, f"entry {entry.name!r} has another size in its own header")
    return start


def data_starts(file: RandomAccess, entries: dict[str, Entry]) -> dict[str, int]:
    """`data_start` of every entry by name; none may reach into the next."""
    ordered = _in_order(entries)
    starts = {entry.name: data_start(file, entry) for entry in ordered}
    for entry, following in itertools.pairwise(ordered):
        if starts[entry.name] + entry.size > following.header:
            raise _bad(file, f"entries {entry.name!r} and {following.name!r} overlap")
    return starts


def _in_order(entries: dict[str, Entry]) -> list[Entry]:
    return sorted(entries.values(), key=lambda entry: entry.header)


def _directory(file: RandomAccess) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the central directory."""
    if file.size < _END.size:
        raise _bad(file, "it is too short")
    end = file.size - _END.size
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack(file.read(end, file.size))
    if signature != b"PK\x05\x06" or comment:
        raise _bad(file, "its end is not that of a zip file; the file is truncated or damaged")
    locator = end - _LOCATOR.size
    if locator >= _END64.size and (raw := file.read(locator, end)).startswith(b"PK\x06\x07"):
        _, _, end64, _ = _LOCATOR.unpack(raw)
        if end64 != locator - _END64.size:
            raise _bad(file, "its two directories disagree")
        fields = _END64.unpack(file.read(end64, locator))
        signature64, _, _, _, disk64, first64, here64, count64, size64, start64 = fields
        narrow = ((count, count64, _FULL16), (size, size64, _FULL32), (start, start64, _FULL32))
        if signature64 != b"PK\x06\x06" or any(old not in (new, full) for old, new, full in narrow):
            raise _bad(file, "its two directories disagree")
        disk, first_disk, here, count, size, start, end = disk64, first64, here64, count64, size64, start64, end64
    if (disk, first_disk, here) != (0, 0, count) or start + size != end:
        raise _bad(file, "its directory is not where its end says; the file is truncated or damaged")
    if count > MAX_ENTRIES or size > MAX_DIRECTORY:
        raise _bad(file, f"it claims {count} entries, more than any checkpoint has")
    return start, size, count


def _wide(extra: bytes, values: tuple[int, ...], file: RandomAccess) -> tuple[int, ...]:
    """`values` with those that do not fit 32 bits taken from the zip64 field of `extra`."""
    wide: Iterator[tuple[int]] = iter(())
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4 + length
        if kind == 1:
            wide = struct.iter_unpack("<Q", extra[position - length : position - length % 8])
    try:
        return tuple(next(wide)[0] if value == _FULL32 else value for value in values)
    except (StopIteration, RuntimeError, struct.error):
        raise _bad(file, "a size of an entry is missing") from None


def _name(raw: bytes, file: RandomAccess) -> str:
    """A plain relative path in ASCII: letters a reader could fold, dots it could resolve or a NUL it could stop at are
    refused."""
    name = raw.decode("ascii", errors="replace")
    plain = name.isprintable() and "\ufffd" not in name and not set(name) & set('\\:"<>|?*')
    if not plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise _bad(file, f"the name of an entry, {name[:100]!r}, is none that torch gives")
    return name


def _bad(file: RandomAccess, problem: str) -> SourceError:
    return SourceError(f"{file.name}: not a checkpoint of torch's: {problem}")
