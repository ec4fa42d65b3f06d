"""The state of one worker in two slots of memory that outlives the worker.

The memory is a memfd that the node's agent creates and keeps, so a worker that dies leaves it
whole. It is laid out by address: element `a` of role `r` always lies at `base(half, r) + a *
itemsize`, whoever owns it. The file is as long as the whole model and sparse, so that only owned
runs cost memory, runs change hands without moving what stays, and a reader needs no table to
find an element.

[Note: two halves] A step is written into the half that does not hold the previous step, and
becomes real by one commit marker: an odd sequence number while the half is written, the next
even one when it is whole, together with a record (step, generation, runs, checksums) that
carries its own checksum. A worker killed at any instant leaves the other half committed. Parity
units of other workers live in two halves of their own, by the same rule."""

import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from outlast.checkpoint.records import ParityRecord, Role, SlotRecord, StateShape, pack_runs
from outlast.cluster.errors import Corrupt, Misuse
from outlast.layout.run import Run

Bytes = NDArray[np.uint8]
T = TypeVar("T")

_PAGE = 4096
_RECORD_BYTES = 4 << 20  # sparse: only what a record needs is ever touched
_MARKER = struct.Struct("<QQQ")  # sequence, length of the record, checksum of the record
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14: map and touch in one call
HALVES = (0, 1)


class _Marked:
    """A commit marker and its record in one region of the mapping."""

    def __init__(self, region: memoryview) -> None:
        self._region = region

    def begin(self) -> None:
        """Make the half invalid before its first byte changes."""
        sequence, _, _ = _MARKER.unpack_from(self._region)
        struct.pack_into("<Q", self._region, 0, sequence | 1)

    def commit(self, fields: dict[str, object]) -> None:
        """Publish the half with its record; the marker is written last."""
        body = json.dumps(fields, separators=(",", ":")).encode()
        if len(body) > len(self._region) - _MARKER.size:
            raise Misuse("the layout is too fragmented for its record: use larger grains")
        self._region[_MARKER.size : _MARKER.size + len(body)] = body
        sequence, _, _ = _MARKER.unpack_from(self._region)
        checksum = xxhash.xxh3_64_intdigest(body)
        struct.pack_into("<QQ", self._region, 8, len(body), checksum)
        struct.pack_into("<Q", self._region, 0, (sequence | 1) + 1)

    def read(self, parse: Callable[[dict[str, Any]], T]) -> T | None:
        """The record if the half is committed and its record is whole.

        Raises:
            Corrupt: a checksum can be forged; what it covers still has to be a record.
        """
        sequence, length, checksum = _MARKER.unpack_from(self._region)
        if sequence == 0 or sequence & 1 or length > len(self._region) - _MARKER.size:
            return None
        body = bytes(self._region[_MARKER.size : _MARKER.size + length])
        if xxhash.xxh3_64_intdigest(body) != checksum:
            return None
        try:
            return parse(json.loads(body))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
            raise Corrupt(f"no record, but {body[:16]!r}: {cause}") from cause


def memory_bytes(shape: StateShape) -> int:
    """Length of the sparse file: two halves of state, two of parity at its largest, the records."""
    half = sum(_pages(shape.numel * role.itemsize) for role in shape.roles)
    return 4 * _RECORD_BYTES + 4 * half


def parity_region(size: int) -> tuple[int, int]:
    """Where both halves of parity begin and end in a file of `size` bytes: as long as the state."""
    return 4 * _RECORD_BYTES + (size - 4 * _RECORD_BYTES) // 2, size


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class _Region:
    """The mapped memfd and how its pages come and go."""

    def __init__(self, fd: int, size: int) -> None:
        if os.fstat(fd).st_size < size:
            raise Corrupt(f"state memory has {os.fstat(fd).st_size} bytes, expected {size}")
        self._fd = os.dup(fd)
        self.map = mmap.mmap(self._fd, size)
        self.bytes: Bytes = np.frombuffer(self.map, dtype=np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def marked(self, index: int) -> _Marked:
        """Marker and record number `index`."""
        begin = index * _RECORD_BYTES
        return _Marked(memoryview(self.map)[begin : begin + _RECORD_BYTES])

    def allocate(self, begin: int, end: int) -> None:
        """Allocate and touch the pages of [begin, end); Misuse if the node has too little."""
        begin -= begin % _PAGE
        length = _pages(end - begin)
        try:
            os.posix_fallocate(self._fd, begin, length)
        except OSError as cause:
            raise Misuse(
                f"no memory for {length / 2**20:.1f} MiB of snapshot on this node "
                f"({cause.strerror}): free memory, raise the limit of the job, or use more nodes "
                "or ZeRO 1 or 2"
            ) from cause
        try:
            self.map.madvise(_POPULATE_WRITE, begin, length)
        except OSError:
            return  # an older kernel: the first step takes the page faults instead

    def release(self, begin: int, end: int) -> None:
        """Give back the whole pages inside [begin, end)."""
        first, last = _pages(begin), end // _PAGE * _PAGE
        if last > first:
            self.map.madvise(mmap.MADV_REMOVE, first, last - first)


class ParityMemory:
    """Two halves of parity units of other workers."""

    def __init__(self, region: _Region, base: int, size: int) -> None:
        self._region, self._size = region, size
        self._base = (base, base + size)
        self._marks = (region.marked(2), region.marked(3))

    def reserve(self, size: int) -> None:
        """Allocate `size` bytes in both halves."""
        for base in self._base if size else ():
            self._region.allocate(base, base + size)

    def array(self, half: int, size: int) -> Bytes:
        """uint8 [size] view of a half."""
        assert size <= self._size, "parity is never larger than the state"
        return self._region.bytes[self._base[half] : self._base[half] + size]

    def begin(self, half: int) -> None:
        """See [Note: two halves]."""
        self._marks[half].begin()

    def commit(self, half: int, record: ParityRecord) -> None:
        """Publish a half."""
        self._marks[half].commit(record.as_json())

    def record(self, half: int) -> ParityRecord | None:
        """Record of a committed half, or None; Corrupt if it is no record or lies about its
        size."""
        record = self._marks[half].read(ParityRecord.from_json)
        for unit in record.units if record else ():
            if not 0 <= unit.offset <= unit.offset + unit.length <= self._size:
                raise Corrupt(f"parity unit at {unit.offset} of {unit.length} bytes is outside")
        return record

    def _age(self, half: int) -> tuple[int, int]:
        try:
            record = self.record(half)
        except Corrupt:
            return -1, -1  # what nobody can read may go first
        return (record.step, record.generation) if record else (-1, -1)

    def spare(self, keep: tuple[int, int] | None) -> int:
        """Half for new parity: not the one of (step, generation) `keep`, else the older one."""
        order = [self._age(half) for half in HALVES]
        return min(HALVES, key=lambda half: (order[half] == keep, order[half]))


class StateMemory:
    """Both halves of state of one worker, and of `parity`, mapped from the memfd `fd`.

    Args:
        fd: file of `memory_bytes(shape)` bytes; the caller keeps or closes it, the mapping stays.
        shape: what a slot holds; the same on all workers of a job.
    Raises:
        Corrupt: the file is too short.
    """

    def __init__(self, fd: int, shape: StateShape) -> None:
        self.shape = shape
        self._region = _Region(fd, memory_bytes(shape))
        self._marks = (self._region.marked(0), self._region.marked(1))
        self._base: dict[tuple[int, str], int] = {}
        offset = 4 * _RECORD_BYTES
        for half in HALVES:
            for role in shape.roles:
                self._base[half, role.name] = offset
                offset += _pages(shape.numel * role.itemsize)
        self.parity = ParityMemory(self._region, offset, (memory_bytes(shape) - offset) // 2)

    def array(self, half: int, role: Role) -> Bytes:
        """uint8 [numel * itemsize] of one role, the whole address space, sparse."""
        base = self._base[half, role.name]
        return self._region.bytes[base : base + self.shape.numel * role.itemsize]

    def run_bytes(self, half: int, role: Role, run: Run) -> Bytes:
        """uint8 view of one plain run of one role."""
        return self.array(half, role)[run.start * role.itemsize : run.stop * role.itemsize]

    def reserve(self, runs: Iterable[Run]) -> None:
        """Allocate and touch the pages of `runs` in both halves, so that no step pays for it.

        Raises:
            Misuse: the node has not enough memory.
        """
        plain = list(runs)
        for (_, name), base in self._base.items():
            itemsize = self.shape.role(name).itemsize
            for run in plain:
                self._region.allocate(base + run.start * itemsize, base + run.stop * itemsize)

    def trim(self, runs: tuple[Run, ...]) -> None:
        """Give back the whole pages of both halves that lie outside `runs`."""
        for (_, name), base in self._base.items():
            itemsize = self.shape.role(name).itemsize
            edges = [0, *(x for pair in pack_runs(runs) for x in pair), self.shape.numel]
            for begin, end in zip(edges[::2], edges[1::2], strict=True):
                self._region.release(base + begin * itemsize, base + end * itemsize)

    def begin(self, half: int) -> None:
        """See [Note: two halves]; called before the first byte of a half changes."""
        self._marks[half].begin()

    def commit(self, half: int, record: SlotRecord) -> None:
        """Publish a half of state."""
        self._marks[half].commit(record.as_json())

    def record(self, half: int) -> SlotRecord | None:
        """Record of a committed half, or None; Corrupt if it is no record or lies about its
        size."""
        record = self._marks[half].read(SlotRecord.from_json)
        for run in record.owned + record.held if record else ():
            if not 0 <= run.start <= run.stop <= self.shape.numel:
                raise Corrupt(f"{run} is outside of {self.shape.numel} elements")
        return record

    def sums(
        self, half: int, runs: Iterable[Run], roles: Sequence[Role] | None = None
    ) -> dict[str, list[int]]:
        """Checksums of `runs` per role, of all or of these, in order."""
        plain = list(runs)
        return {
            role.name: [checksum(self.run_bytes(half, role, run)) for run in plain]
            for role in (self.shape.roles if roles is None else roles)
        }

    def torn(self, half: int, record: SlotRecord) -> list[tuple[str, Run]]:
        """(role, run) of `record` whose bytes do not match their checksum."""
        return [
            (role.name, run)
            for role in self.shape.roles
            for run, expected in zip(record.held, record.sums[role.name], strict=True)
            if checksum(self.run_bytes(half, role, run)) != expected
        ]


def checksum(data: Bytes | bytes) -> int:
    """xxh3-64 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type]
