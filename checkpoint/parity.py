"""The erasure code over the snapshot streams of a stripe, and where a stream's bytes lie in the
map.

A worker's *stream* is its state in a fixed order: role by role, run by run. Stripes cut streams
into units of equal length; parity unit `row` of a stripe is a linear combination of its data
units. Row 0 is their XOR, so m = 1 needs nothing else (REFT, arXiv 2310.12670; Gropp, Ross and
Miller's layout).

>>> code = Code(k=2, m=1)
>>> a, b = np.array([1, 2], np.uint8), np.array([5, 0], np.uint8)
>>> parity, again = np.empty(2, np.uint8), np.empty(2, np.uint8)
>>> code.encode([a, b], [parity])
>>> code.decode([b], {0: parity}, [again])
>>> again.tolist()
[1, 2]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.records import StateShape
from outlast.cluster.errors import Misuse, StateLost
from outlast.layout.run import Run

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Code:
    """Systematic code of `k` data and `m` parity units of equal length in bytes."""

    k: int
    m: int

    def __post_init__(self) -> None:
        if self.m != 1:
            raise Misuse(f"only one parity unit per stripe is available, not m = {self.m}")

    def encode(self, data: Sequence[Bytes], parity: Sequence[Bytes]) -> None:
        """Fill the `m` parity units from `k` data units; shorter data units count as zero padded.
        assert len(data) == self.k and len(parity) == self.m"""
        _xor(data, parity[0])

    def decode(
        self, data: Sequence[Bytes], parity: Mapping[int, Bytes], lost: Sequence[Bytes]
    ) -> None:
        """Fill the `lost` data units from the data units that are left and parity units by row.

        Raises:
            StateLost: fewer than k units are left.
        """
        if len(data) + len(parity) < self.k or len(lost) > self.m or 0 not in parity:
            raise StateLost(f"{len(data)} data and {len(parity)} parity units of k = {self.k}")
        for unit in lost:
            _xor([parity[0], *data], unit)


def _xor(units: Sequence[Bytes], total: Bytes) -> None:
    """XOR of `units` into `total`, eight bytes at a time; a unit may exceed `total` by padding."""
    total[:] = 0
    for unit in units:
        size = min(unit.size, total.size)
        even = size // 8 * 8
        words = total[:even].view(np.uint64)
        np.bitwise_xor(words, unit[:even].view(np.uint64), out=words)
        np.bitwise_xor(total[even:size], unit[even:size], out=total[even:size])


def stream_bytes(shape: StateShape, runs: Sequence[Run]) -> int:
    """Length of the stream of a worker that owns `runs`."""
    return shape.element_bytes * sum(run.numel for run in runs)


def stream_parts(
    shape: StateShape, runs: Sequence[Run], start: int, stop: int
) -> Iterator[tuple[str, Run]]:
    """(role, run) of the bytes [start, stop) of a stream; cuts fall on element borders."""
    at = 0
    for role in shape.roles:
        for run in runs:
            size = run.numel * role.itemsize
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                first, last = (low - at) // role.itemsize, (high - at) // role.itemsize
                yield role.name, Run.of(run.start + first, run.start + last)
            at += size
