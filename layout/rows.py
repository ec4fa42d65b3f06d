"""Runs of many holders as numpy columns, so that millions of them cost milliseconds.

Invariant: the columns have one length, and rows are sorted by (start, owner). `owner` is an index
into a list of holders that the user of the columns keeps.

>>> rows = Rows.of([(1, Run.of(4, 8)), (0, Run(0, 1, 2, 3))])
>>> rows.owner.tolist(), rows.stop.tolist(), rows.numel.tolist()
([0, 1], [5, 8], [3, 4])
>>> rows.plain().start.tolist()
[0, 2, 4, 4]
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from outlast.layout.run import Run

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Index = NDArray[Any]


class Rows(NamedTuple):
    """Columns int64 [rows]: whose run it is, and the four fields of the `Run`."""

    owner: Ints
    start: Ints
    length: Ints
    stride: Ints
    repeats: Ints

    @classmethod
    def of(cls, runs: Iterable[tuple[int, Run]]) -> "Rows":
        """Columns of (owner, run) pairs in any order."""
        table = np.array(
            [(o, r.start, r.length, r.stride, r.count) for o, r in runs], dtype=np.int64
        )
        return cls(*np.ascontiguousarray(table.reshape(-1, 5).T)).ordered()

    @classmethod
    def intervals(cls, owner: Ints, start: Ints, stop: Ints) -> "Rows":
        """Columns of the plain intervals [start, stop) in any order; empty ones are left out."""
        keep = np.flatnonzero(stop > start)
        if len(keep) < len(start):
            owner, start, stop = owner[keep], start[keep], stop[keep]
        zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        constant = [np.broadcast_to(column, start.shape) for column in (zero, one)]
        return cls(owner, start, stop - start, *constant).ordered()

    @property
    def stop(self) -> Ints:
        """End of each row's last interval."""
        if self.is_plain:
            return self.start + self.length
        return self.start + self.stride * (self.repeats - 1) + self.length

    @property
    def numel(self) -> Ints:
        """Elements of each row."""
        return self.length if self.is_plain else self.length * self.repeats

    @property
    def is_plain(self) -> bool:
        """Whether every row is one interval."""
        return self.repeats.strides == (0,) or not bool((self.repeats > 1).any())

    def take(self, index: Index) -> "Rows":
        """The rows at `index`, a mask or ascending positions."""
        if self.repeats.strides == (0,):  # broadcast columns of plain rows stay free of charge
            return Rows.intervals(self.owner[index], self.start[index], self.stop[index])
        return Rows(*(column[index] for column in self))

    def owned_by(self, table: Ints) -> "Rows":
        """The rows whose owner has a new number in `table`, renumbered; -1 there drops the row.

        `table` maps in ascending order, so that the rows stay sorted.
        """
        owner = table[self.owner]
        if (table >= 0).all():
            return self._replace(owner=owner)
        keep = np.flatnonzero(owner >= 0)
        return self._replace(owner=owner).take(keep)

    def ordered(self) -> "Rows":
        """Sorted by (start, owner)."""
        step = np.diff(self.start)
        if (step > 0).all():
            return self
        order = np.lexsort((self.owner, self.start))
        plain = self.repeats.strides == (0,)
        return Rows(*(c if plain and n > 2 else c[order] for n, c in enumerate(self)))

    def plain(self) -> "Rows":
        """The same sets with every strided run expanded into its intervals."""
        if self.is_plain:
            return self
        row = np.repeat(np.arange(len(self.repeats)), self.repeats)
        index = np.arange(len(row)) - np.repeat(
            np.cumsum(self.repeats) - self.repeats, self.repeats
        )
        start = self.start[row] + index * self.stride[row]
        return Rows.intervals(self.owner[row], start, start + self.length[row])

    def merged(self) -> "Rows":
        """Adjacent rows of one owner made one; rows are plain and disjoint for each owner."""
        rows = self
        alone = bool((rows.start[1:] >= rows.stop[:-1]).all())
        if not alone:  # replicas: neighbours of one owner are not consecutive
            order = np.argsort(rows.owner, kind="stable")
            rows = Rows(*(column[order] for column in rows))
        stop = rows.stop
        fresh = np.ones(len(stop), dtype=bool)
        fresh[1:] = (rows.owner[1:] != rows.owner[:-1]) | (rows.start[1:] != stop[:-1])
        if fresh.all():
            return self
        first = np.flatnonzero(fresh)
        last = np.append(first[1:], len(fresh)) - 1
        return Rows.intervals(rows.owner[first], rows.start[first], stop[last])

    def total(self, owners: int) -> Ints:
        """Elements of each of `owners` owners; exact below 2**53."""
        return np.bincount(self.owner, self.numel, minlength=owners).astype(np.int64)

    def runs(self) -> Iterator[Run]:
        """The rows as runs."""
        columns = (column.tolist() for column in self[1:])
        return (Run(*fields) for fields in zip(*columns, strict=True))


def depth(points: Ints, start: Ints, stop: Ints, weight: Ints | None = None) -> Ints:
    """Sum of the weights (1 each) of the intervals over every segment [points[i], points[i+1]).

    `points` is sorted and holds every start and stop.
    """
    steps = np.zeros(len(points), dtype=np.float64)
    for sign, edge in ((1, start), (-1, stop)):
        at = np.searchsorted(points, edge)
        steps += sign * np.bincount(at, weight, minlength=len(points))
    return np.cumsum(steps.astype(np.int64))[:-1]


def spans(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """All pairs (i, j) with first[i] <= j < last[i], as two columns sorted by i."""
    size = last - first
    i = np.repeat(np.arange(len(size)), size)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(size) - size, size) + first[i]
