"""The erasure code of a stripe: any m of its k + m units may be lost.

Parity unit `row` of a stripe is a linear combination of its data units, see `field`. Row 0 is
their XOR as long as m <= 3, so m = 1 is the code of RAID 5 (REFT, arXiv 2310.12670; Gropp, Ross
and Miller's layout), and it works byte by byte: a window of a stripe is itself a stripe.

>>> code = Code(k=2, m=2)
>>> a, b = np.array([1, 2], np.uint8), np.array([5], np.uint8)
>>> parity = [np.empty(2, np.uint8), np.empty(2, np.uint8)]
>>> code.encode([a, b], parity)
>>> c, d = np.empty(2, np.uint8), np.empty(2, np.uint8)
>>> code.decode({}, dict(enumerate(parity)), {0: c, 1: d})
>>> c.tolist(), d.tolist()
([1, 2], [5, 0])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.field import UNITS_MAX, Rows, decoding_rows, parity_rows
from outlast.checkpoint.isal import backend
from outlast.cluster.errors import Misuse, StateLost

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Code:
    """Systematic code of `k` data and `m` parity units of equal length in bytes.

    Units are one-dimensional, contiguous and of uint8. A unit that is shorter than another counts
    as padded with zeros, which are neither stored nor copied. Inputs and outputs may not overlap.

    Raises:
        Misuse: no such code: k or m is below 1 or they are more than 255 together.
    """

    k: int
    m: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.m < 1 or self.k + self.m > UNITS_MAX:
            raise Misuse(
                f"no code of k = {self.k} data and m = {self.m} parity units: take at least one of "
                f"each and at most {UNITS_MAX} together"
            )

    def encode(self, data: Sequence[Any], parity: Sequence[Any]) -> None:
        """Fill the `m` parity units, rows 0 to m - 1, from the `k` data units."""
        assert len(data) == self.k, f"{len(data)} data units of {self.k}"
        assert len(parity) == self.m, f"{len(parity)} parity units of {self.m}"
        self._fill(parity_rows(self.k, self.m), data, parity)

    def decode(
        self, data: Mapping[int, Any], parity: Mapping[int, Any], lost: Mapping[int, Any]
    ) -> None:
        """Fill data units from what is left of the stripe; a result may stop early.

        Args:
            data: data units that are left, by index from 0 to k - 1.
            parity: parity units that are left, by row from 0 to m - 1.
            lost: the data units to fill, by index; others may be gone as well.
        Raises:
            StateLost: fewer than k units are left.
        """
        gone = [index for index in range(self.k) if index not in data]
        assert set(lost) <= set(gone), f"units {sorted(lost)} of {gone}"
        if len(gone) > len(parity):
            raise StateLost(
                f"{len(data)} data and {len(parity)} parity units are left of a stripe that needs "
                f"{self.k}"
            )
        rows = sorted(parity)[: len(gone)]  # the lowest: row 0 alone is the cheapest
        solved = dict(
            zip(gone, decoding_rows(self.k, self.m, frozenset(gone), tuple(rows)), strict=True)
        )
        inputs = [data[index] for index in sorted(data)] + [parity[row] for row in rows]
        wanted = sorted(lost)
        # Data may end early, parity never does: what it lacks would count as zeros.
        whole = max((len(unit) for unit in lost.values()), default=0)
        assert all(len(parity[row]) >= whole for row in rows), "parity is shorter than its stripe"
        self._fill(tuple(solved[i] for i in wanted), inputs, [lost[i] for i in wanted])

    def _fill(self, rows: Rows, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """`_combine` where the arrays end at different places: between two ends, all that are
        there at all are whole."""
        ends = {0, *(len(unit) for unit in outputs)}
        longest = max(ends)
        ends |= {len(unit) for unit in inputs if len(unit) < longest}
        for start, stop in pairwise(sorted(ends)):
            here = [j for j, unit in enumerate(inputs) if len(unit) >= stop]
            fill = [i for i, unit in enumerate(outputs) if len(unit) >= stop]
            part = tuple(tuple(rows[i][j] for j in here) for i in fill)
            results = [outputs[i][start:stop] for i in fill]
            if here:
                self._combine(part, [inputs[j][start:stop] for j in here], results)
            else:
                for result in results:
                    result[:] = 0

    def _combine(self, rows: Rows, inputs: list[Any], outputs: list[Any]) -> None:
        if all(row == (1,) for row in rows):  # copies
            for output in outputs:
                output[:] = inputs[0]
        else:
            backend().combine(rows, inputs, outputs)
