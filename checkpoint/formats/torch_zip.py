"""The files of torch.save: a pickle and the storages of its tensors, stored in a zip.

Read are the directory of the zip and the pickle, never the data: tensors come back as references
into the file. A `ZipFolder` compares every record with its checksum before the first byte of it is
used. Written are files whose data start at multiples of 64 bytes, as torch's own do, in one pass.
"""

import os
import struct
import threading
import zlib
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.pickle_writer import Dumped, dump
from outlast.checkpoint.formats.pickles import BYTES, TensorRef, load
from outlast.checkpoint.pool import go_on
from outlast.checkpoint.source import Tick
from outlast.cluster.errors import Misuse
from outlast.layout.run import Run

_ALIGNMENT, _ROOT, _WIDE = 64, "archive", 0xFFFFFFFF
_BLOCK = 1 << 22  # elements of a storage that are asked for at once
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # how files before torch 1.6 begin
_END, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")

Fill = Callable[[int, int], Values]  # elements [start, stop) of a storage


@dataclass(slots=True)
class Record:
    """A file inside of a zip, and whether its bytes were compared with their checksum."""

    name: str
    header: int  # where its header starts in the file that has the zip, bytes
    offset: int  # where its data start
    size: int
    crc: int
    checked: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class ZipFolder(Folder):
    """A folder that checks a record of its zips as a whole before the first of it is used."""

    def __init__(self, path: Path, follow: bool = False) -> None:
        super().__init__(path, follow)
        self._records: dict[str, list[Record]] = {}

    def expect(self, name: str, record: Record) -> None:
        """From now on, this record of the file `name` is checked."""
        insort(self._records.setdefault(name, []), record, key=_offset)

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """As in `Folder`; Corrupt, too, where a record does not match its checksum."""
        for record in self._touched(name, offset, offset + out.size):
            with record.lock:  # others that want the same record wait, and find it checked
                if not record.checked:
                    self._check(name, record)
        super().read_into(name, offset, out)

    def _touched(self, name: str, start: int, stop: int) -> Iterator[Record]:
        records = self._records.get(name, [])
        for index in range(max(bisect_right(records, start, key=_offset) - 1, 0), len(records)):
            if records[index].offset >= stop:
                return
            if records[index].offset + records[index].size > start and not records[index].checked:
                yield records[index]

    def _check(self, name: str, record: Record) -> None:
        buffer, crc, stop = np.empty(1 << 22, np.uint8), 0, record.offset + record.size
        for at in range(record.offset, stop, buffer.size):
            go_on()
            part = buffer[: stop - at]
            super().read_into(name, at, part)
            crc = zlib.crc32(part, crc)
        if crc != record.crc:
            why = f"the {record.size} bytes of {record.name} do not match their checksum"
            raise corrupt(self.path / name, record.offset, why)
        record.checked = True


def _offset(record: Record) -> int:
    return record.offset


def records(folder: Folder, name: str, base: int = 0, size: int | None = None) -> dict[str, Record]:
    """What is stored in a zip that takes the bytes [base, base + size) of a file, by name.

    Raises:
        Corrupt: it is no zip as torch writes them, compresses, or has records that overlap.
    """
    size = folder.size(name) - base if size is None else size
    where = folder.path / name
    if folder.read(name, base, min(size, len(_LEGACY))) == _LEGACY:
        why = "written by torch.save before 1.6: load it with torch, and save it again"
        raise corrupt(where, base, why)
    directory, start, count = _directory(folder, name, base, size)
    found, at, floor = [], 0, base
    for _ in range(count):
        try:
            entry, at = _entry(directory, at)
        except (ValueError, struct.error) as cause:
            raise corrupt(where, start + at, f"not an entry of a zip ({cause})") from cause
        found.append(_located(folder, name, base, entry))
    for record in sorted(found, key=_offset):
        if record.header < floor or record.offset + record.size > start:
            raise corrupt(where, record.header, f"{record.name} overlaps others")
        floor = record.offset + record.size
    if at != len(directory) or len({record.name for record in found}) != count:
        raise corrupt(where, start, "the directory of the zip is not what its end says")
    return {record.name: record for record in found}


def _directory(folder: Folder, name: str, base: int, size: int) -> tuple[bytes, int, int]:
    """The directory of a zip, where it starts, and its number of entries."""
    where, end = folder.path / name, base + size - _END.size
    none = corrupt(where, base, "not a zip file")
    if size < _END.size:
        raise none
    magic, *_, count, length, start, comment = _END.unpack(folder.read(name, end, _END.size))
    if magic != b"PK\x05\x06" or comment:
        raise none
    wide = min(_END64.size + 20, size - _END.size)
    tail = folder.read(name, end - wide, wide)
    if tail[_END64.size :].startswith(b"PK\x06\x07"):
        end -= wide
        magic, *_, count, length, start = _END64.unpack_from(tail)
        if magic != b"PK\x06\x06":
            raise none
    if base + start + length != end or count * _ENTRY.size > length or length > BYTES:
        raise corrupt(where, end, "the directory of the zip is not where its end says")
    return folder.read(name, base + start, length), base + start, count


def _entry(directory: bytes, at: int) -> tuple[Record, int]:
    """The entry at a place of the directory, and where the next one is."""
    magic, _, _, flags, method, _, _, crc, *sizes = _ENTRY.unpack_from(directory, at)
    packed, size, length, extras, comment, _, _, _, header = sizes
    at += _ENTRY.size
    label, extra = directory[at : at + length], directory[at + length : at + length + extras]
    while len(extra) >= 4 and (packed, size, header).count(_WIDE):
        kind, inside = struct.unpack_from("<2H", extra)
        if kind == 1:  # what does not fit into 32 bits, in this order
            numbers = iter(struct.unpack(f"<{inside // 8}Q", extra[4 : 4 + inside // 8 * 8]))
            size, packed, header = (
                next(numbers, n) if n == _WIDE else n for n in (size, packed, header)
            )
            break
        extra = extra[4 + inside :]
    if magic != b"PK\x01\x02" or method or packed != size or flags & 1:
        raise ValueError("it may neither be compressed nor encrypted")
    return Record(label.decode("ascii"), header, 0, size, crc), at + length + extras + comment


def _located(folder: Folder, name: str, base: int, record: Record) -> Record:
    """The same record, with the place of its data, which only its own header tells."""
    record.header += base
    head = folder.read(name, record.header, _LOCAL.size + len(record.name))
    magic, *_, length, extras = _LOCAL.unpack_from(head)
    if magic != b"PK\x03\x04" or head[_LOCAL.size :][:length] != record.name.encode():
        raise corrupt(folder.path / name, record.header, f"no record {record.name} starts here")
    record.offset = record.header + _LOCAL.size + length + extras
    return record


def read(folder: Folder, name: str, base: int = 0, size: int | None = None) -> Any:
    """The object in a file of torch.save, or in the bytes [base, base + size) of one.

    Raises:
        Corrupt: it is not such a file, or not whole; see `pickles.load`.
    """
    found, where = records(folder, name, base, size), folder.path / name
    pickled = [record for label, record in found.items() if label.endswith("/data.pkl")]
    if len(pickled) != 1 or pickled[0].size > BYTES:
        raise corrupt(where, base, "not a file of torch.save")
    root = pickled[0].name.removesuffix("data.pkl")
    order = found.get(f"{root}byteorder")
    if isinstance(folder, ZipFolder):
        for record in found.values():
            folder.expect(name, record)
    if order and folder.read(name, order.offset, min(order.size, 9)) != b"little":
        raise corrupt(where, order.offset, "written by a big-endian machine")

    def storage(key: str, size: int) -> tuple[str, int]:
        record = found.get(f"{root}data/{key}")
        if record is None or record.size != size:
            raise corrupt(where, base, f"no storage {key[:99]!r} of {size} bytes")
        return name, record.offset

    data = folder.read(name, pickled[0].offset, pickled[0].size)
    if zlib.crc32(data) != pickled[0].crc:
        raise corrupt(where, pickled[0].offset, "the pickle does not match its checksum")
    return load(data, where, storage, pickled[0].offset)


def values(folder: Folder, ref: TensorRef) -> Values:
    """All elements of a small contiguous tensor, as a vector: of a counter, of a scale.

    Raises:
        Corrupt: it is not small, not contiguous, or its bytes do not match.
    """
    if ref.numel > _BLOCK:
        raise corrupt(folder.path / ref.file, ref.offset, f"{ref.numel} elements where few belong")
    out = np.empty(ref.numel, dtype_of(ref.dtype))
    if ref.numel:
        piece = ref.piece(Run.of(0, ref.numel))
        folder.read_into(piece.file, piece.offset, out.view(np.uint8))
    return out


def write(
    path: Path, value: Any, storages: Mapping[str, Fill], tick: Tick = lambda size: None
) -> None:
    """Write the file that torch.load reads: `value`, with the storages of its tensors by key.

    Args:
        storages: each is asked for its elements once, in order, 16 MiB or so at a time.
        tick: told the bytes of storages that are written.
    """
    with path.open("wb") as file:
        append(file, value, storages, tick)


def append(
    file: BinaryIO, value: Any, storages: Mapping[str, Fill], tick: Tick = lambda size: None
) -> None:
    """The same at the end of a file that has others before it, as in a shard of torch's DCP."""
    dumped, base = dump(value), file.tell()
    blocks = {f"data/{key}": _blocks(dumped, key, fill, tick) for key, fill in storages.items()}
    directory, records = b"", _labelled(dumped)
    for label, (size, data) in records.items():
        name, at, crc = f"{_ROOT}/{label}".encode(), file.tell() - base, 0
        padding = _padding(at, name)
        # As torch does it: sizes of 64 bits always, and padding as a field of its own.
        extra = struct.pack("<2H2Q2sH", 1, 16, size, size, b"FB", padding) + b"Z" * padding
        sizes = (_WIDE, _WIDE, len(name))
        file.write(_LOCAL.pack(b"PK\3\4", 45, 0, 0, 0, 0, 0, *sizes, len(extra)) + name + extra)
        for part in (data,) if data is not None else blocks[label]:
            crc = zlib.crc32(part, crc)
            file.write(part)
        file.seek(base + at + 14)  # of the checksum, which is known only now
        file.write(struct.pack("<I", crc))
        file.seek(0, os.SEEK_END)
        rest = (*sizes, 28, 0, 0, 0, 0, _WIDE)
        directory += _ENTRY.pack(b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, *rest) + name
        directory += struct.pack("<2H3Q", 1, 24, size, size, at)
    start, count = file.tell() - base, len(records)
    end = start + len(directory)
    file.write(directory)
    file.write(_END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start))
    file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    few = min(count, 0xFFFF)
    file.write(_END.pack(b"PK\5\6", 0, 0, few, few, min(len(directory), _WIDE), _WIDE, 0))


def length(value: Any) -> int:
    """Bytes that `write` or `append` would write."""
    at, directory = 0, 0
    for label, (size, _) in _labelled(dump(value)).items():
        name = f"{_ROOT}/{label}".encode()
        at += _LOCAL.size + len(name) + 24 + _padding(at, name) + size
        directory += _ENTRY.size + len(name) + 28
    return at + directory + _END64.size + 20 + _END.size


def _labelled(dumped: Dumped) -> dict[str, tuple[int, bytes | None]]:
    """Size and content of every record, in order; None for that of a storage."""
    small: dict[str, bytes] = {
        "data.pkl": dumped.data, ".format_version": b"1", ".storage_alignment": b"64",
        "byteorder": b"little", "version": b"3\n",
    }  # fmt: skip
    found: dict[str, tuple[int, bytes | None]] = {k: (len(v), v) for k, v in small.items()}
    for key, (dtype, extent) in dumped.storages.items():
        found[f"data/{key}"] = extent * dtype_of(dtype).itemsize, None
    return found


def _padding(at: int, name: bytes) -> int:
    """Bytes that bring the data of a record that starts at `at` to a multiple of the alignment."""
    return -(at + _LOCAL.size + len(name) + 24) % _ALIGNMENT


def _blocks(dumped: Dumped, key: str, fill: Fill, tick: Tick) -> Iterator[memoryview]:
    """The bytes of a storage, block by block."""
    dtype, extent = dumped.storages[key]
    for start in range(0, extent, _BLOCK):
        stop = min(start + _BLOCK, extent)
        values = fill(start, stop)
        if values.dtype != dtype_of(dtype) or values.shape != (stop - start,):
            raise Misuse(f"storage {key}: {values.dtype} {values.shape}, not {dtype}")
        yield memoryview(np.ascontiguousarray(values).view(np.uint8))
        tick(values.nbytes)
