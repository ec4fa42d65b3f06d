"""The erasure code of a stripe: any m of its k + m units may be lost.

Parity unit `row` of a stripe is a linear combination of its data units. Row 0 is their XOR, so
m = 1 needs nothing else (REFT, arXiv 2310.12670; Gropp, Ross and Miller's layout).

>>> code = Code(k=2, m=1)
>>> a, b = np.array([1, 2], np.uint8), np.array([5, 0], np.uint8)
>>> parity, again = np.empty(2, np.uint8), np.empty(2, np.uint8)
>>> code.encode([a, b], [parity])
>>> code.decode({1: b}, {0: parity}, {0: again})
>>> again.tolist()
[1, 2]
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outlast.cluster.errors import Misuse, StateLost

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
        self, data: Mapping[int, Bytes], parity: Mapping[int, Bytes], lost: Mapping[int, Bytes]
    ) -> None:
        """Fill `lost` from what is left; all by index: 0 .. k - 1 of data, 0 .. m - 1 of parity.

        Raises:
            StateLost: fewer than k units are left.
        """
        if len(data) + len(parity) < self.k or len(lost) > self.m or 0 not in parity:
            raise StateLost(f"{len(data)} data and {len(parity)} parity units of k = {self.k}")
        for unit in lost.values():
            _xor([parity[0], *data.values()], unit)


def _xor(units: Iterable[Bytes], total: Bytes) -> None:
    """XOR of `units` into `total`, eight bytes at a time; a unit may exceed `total` by padding."""
    total[:] = 0
    for unit in units:
        size = min(unit.size, total.size)
        even = size // 8 * 8
        words = total[:even].view(np.uint64)
        np.bitwise_xor(words, unit[:even].view(np.uint64), out=words)
        np.bitwise_xor(total[even:size], unit[even:size], out=total[even:size])
