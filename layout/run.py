"""Runs: the set algebra of addresses.

A `Run` is `count` intervals of `length` elements, `stride` elements apart; count 1 is the plain
interval [start, stop). A column shard of a matrix is one strided run and not a million intervals,
and stays one: every operation below is worked out on whole runs, and only two runs of *different*
strides are expanded (the one with fewer intervals where they meet).

Invariant: functions on sequences take any runs and return a canonical tuple: sorted by start,
disjoint, adjacent runs merged. For plain runs equal sets are then equal tuples.

>>> a = [Run.of(0, 4), Run.of(4, 10), Run.of(20, 30)]
>>> canonical(a)
(Run(start=0, length=10, stride=0, count=1), Run(start=20, length=10, stride=0, count=1))
>>> b = [Run.of(8, 22)]
>>> numel(intersect(a, b)), numel(subtract(a, b)), numel(union(a, b))
(4, 16, 30)
>>> column = Run(start=3, length=2, stride=8, count=4)          # columns 3 and 4 of a 4 x 8 matrix
>>> list(column.intervals())
[(3, 5), (11, 13), (19, 21), (27, 29)]
>>> subtract([Run.of(0, 32)], [column])[1]      # what is left between them is one run, too
Run(start=5, length=6, stride=8, count=3)
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """`count` intervals of `length` elements, their starts `stride` apart, the first at `start`."""

    start: int
    length: int
    stride: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1 or self.count < 1:
            raise ValueError(f"a run needs start >= 0, length >= 1 and count >= 1: {self}")
        if self.count > 1 and self.stride < self.length:
            raise ValueError(f"the intervals of a run may not overlap: {self}")
        if self.count > 1 and self.stride == self.length:
            object.__setattr__(self, "length", self.length * self.count)
            object.__setattr__(self, "count", 1)
        if self.count == 1:
            object.__setattr__(self, "stride", 0)

    @classmethod
    def of(cls, start: int, stop: int) -> Self:
        """The plain interval [start, stop)."""
        return cls(start, stop - start)

    @property
    def stop(self) -> int:
        """End of the last interval."""
        return self.start + self.stride * (self.count - 1) + self.length

    @property
    def numel(self) -> int:
        """Elements in all intervals."""
        return self.length * self.count

    def intervals(self) -> Iterator[tuple[int, int]]:
        """The intervals (start, stop) in address order."""
        for index in range(self.count):
            first = self.start + index * self.stride
            yield first, first + self.length

    def rows(self, first: int, last: int) -> list["Run"]:
        """The run of the intervals first..last-1; nothing where there are none."""
        first, last = max(first, 0), min(last, self.count)
        if first >= last:
            return []
        return [Run(self.start + first * self.stride, self.length, self.stride, last - first)]


def numel(runs: Iterable[Run]) -> int:
    """Elements in disjoint `runs`."""
    return sum(run.numel for run in runs)


def canonical(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same set, sorted, disjoint, with adjacent runs merged; the runs may overlap."""
    ordered = sorted(runs)
    plain = _merge((run for run in ordered if run.count == 1), _joined)
    strided = [run for run in ordered if run.count > 1]
    if not strided:
        return tuple(plain)
    window = _Window(plain)
    apart: list[Run] = []
    active: list[Run] = []  # accepted pieces that may still overlap a later run
    for run in strided:
        active = [other for other in active if other.stop > run.start]
        pieces = _without(run, [*window.near(run), *active])
        apart += pieces
        active += pieces
    plain += [run for run in apart if run.count == 1]
    columns, before = [run for run in apart if run.count > 1], -1
    while len(columns) != before:  # one merge may make the next possible
        before = len(columns)
        columns.sort(key=lambda r: (r.stride, r.length, r.start % r.stride, r.start))
        merged = _merge(columns, _end_to_end)
        merged = _merge(sorted(merged, key=lambda r: (r.stride, r.count, r.start)), _side_by_side)
        plain += [run for run in merged if run.count == 1]
        columns = [run for run in merged if run.count > 1]
    return tuple(
        sorted([*_merge(sorted(plain), _joined), *(run for run in columns if run.count > 1)])
    )


def union(a: Iterable[Run], b: Iterable[Run]) -> tuple[Run, ...]:
    """Elements in `a` or `b`."""
    return canonical([*a, *b])


def intersect(a: Iterable[Run], b: Iterable[Run]) -> tuple[Run, ...]:
    """Elements in both `a` and `b`."""
    window = _Window(canonical(b))
    return canonical(
        piece for run in canonical(a) for other in window.near(run) for piece in _meet(run, other)
    )


def subtract(a: Iterable[Run], b: Iterable[Run]) -> tuple[Run, ...]:
    """Elements in `a` and not in `b`."""
    window = _Window(canonical(b))
    return canonical(piece for run in canonical(a) for piece in _without(run, window.near(run)))


def covers(a: Iterable[Run], b: Iterable[Run]) -> bool:
    """Whether `a` has every element of `b`."""
    return not subtract(b, a)


class _Window:
    """Finds the runs of a sorted sequence whose span meets that of a given run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._starts = [run.start for run in runs]
        self._reach = list(accumulate((run.stop for run in runs), max))  # strided spans may nest

    def near(self, run: Run) -> list[Run]:
        first, last = bisect_right(self._reach, run.start), bisect_left(self._starts, run.stop)
        return [other for other in self._runs[first:last] if other.stop > run.start]


def _merge(runs: Iterable[Run], join: Callable[[Run, Run], Run | None]) -> list[Run]:
    """`runs` with every two neighbours joined that `join` can make one of."""
    merged: list[Run] = []
    for run in runs:
        both = join(merged[-1], run) if merged else None
        if both:
            merged[-1] = both
        else:
            merged.append(run)
    return merged


def _joined(a: Run, b: Run) -> Run | None:
    """Plain runs, `a` before `b`, that overlap or touch."""
    return Run.of(a.start, max(a.stop, b.stop)) if b.start <= a.stop else None


def _end_to_end(a: Run, b: Run) -> Run | None:
    """Strided runs of which `b` continues `a` downwards."""
    same = (a.stride, a.length, a.start + a.count * a.stride) == (b.stride, b.length, b.start)
    return Run(a.start, a.length, a.stride, a.count + b.count) if same else None


def _side_by_side(a: Run, b: Run) -> Run | None:
    """Strided runs whose intervals touch one by one; the full width becomes plain."""
    same = (a.stride, a.count, a.start + a.length) == (b.stride, b.count, b.start)
    return Run(a.start, a.length + b.length, a.stride, a.count) if same else None


def _without(run: Run, others: Iterable[Run]) -> list[Run]:
    pieces = [run]
    for other in others:
        pieces = [rest for piece in pieces for rest in _minus(piece, other)]
    return pieces


def _clip(run: Run, start: int, stop: int) -> list[Run]:
    """The part of `run` inside [start, stop): whole intervals as one run, cut ones beside it."""
    if run.count == 1:
        low, high = max(run.start, start), min(run.stop, stop)
        return [Run.of(low, high)] if low < high else []
    first = max(
        -((run.start - start) // run.stride), 0
    )  # first interval that starts at or after start
    last = min(
        (stop - run.start - run.length) // run.stride + 1, run.count
    )  # first that ends after stop
    whole = run.rows(first, last)
    ends = {first - 1, last} if first <= last else {last}  # both cuts may fall into one interval
    cut = [
        piece
        for index in ends
        for edge in run.rows(index, index + 1)
        if index >= 0
        for piece in _clip(edge, start, stop)
    ]
    return whole + cut


def _overlaps(a: Run, b: Run) -> list[tuple[int, int, int, int]]:
    """Where runs of one stride meet: offsets [low, high) in the intervals [first, last) of `a`.

    Interval i of `a` meets interval i + k of `b` the same way for every i, and for two values of k
    at most.
    """
    shift = a.start - b.start
    found = []
    for k in {shift // a.stride, shift // a.stride + 1}:
        offset = k * a.stride - shift
        low, high = max(0, offset), min(a.length, offset + b.length)
        first, last = max(0, -k), min(a.count, b.count - k)
        if low < high and first < last:
            found.append((low, high, first, last))
    return sorted(found)


def _meet(a: Run, b: Run) -> list[Run]:
    if b.count == 1:
        return _clip(a, b.start, b.stop)
    if a.count == 1:
        return _clip(b, a.start, a.stop)
    if a.stride == b.stride:
        return [
            piece
            for low, high, first, last in _overlaps(a, b)
            for piece in Run(a.start + low, high - low, a.stride, a.count).rows(first, last)
        ]
    few, many = sorted((a, b), key=lambda run: run.count)
    return [piece for start, stop in few.intervals() for piece in _clip(many, start, stop)]


def _minus(a: Run, b: Run) -> list[Run]:
    if b.start >= a.stop or b.stop <= a.start or not _meet(a, b):
        return [a]  # in one piece, also where b lies between its intervals
    if b.count == 1:
        return _clip(a, 0, b.start) + _clip(a, b.stop, a.stop)
    if a.count > 1 and a.stride == b.stride:
        return _minus_aligned(a, b)
    if a.count > 1 and a.count < b.count:
        return [piece for start, stop in a.intervals() for piece in _minus(Run.of(start, stop), b)]
    if a.count > 1:
        return _without(a, (Run.of(start, stop) for start, stop in b.intervals()))
    gaps = Run(b.start + b.length, b.stride - b.length, b.stride, b.count - 1)
    return [*_clip(a, 0, b.start), *_clip(gaps, a.start, a.stop), *_clip(a, b.stop, a.stop)]


def _minus_aligned(a: Run, b: Run) -> list[Run]:
    """Same stride: from one end of an overlap to the next, all intervals lose the same parts."""
    holes = _overlaps(a, b)
    edges = sorted({0, a.count, *(row for hole in holes for row in hole[2:])})
    pieces = []
    for first, last in pairwise(edges):
        position = 0
        for low, high, begin, end in [*holes, (a.length, a.length, first, last)]:
            if begin <= first < end:
                if position < low:
                    pieces += Run(a.start + position, low - position, a.stride, a.count).rows(
                        first, last
                    )
                position = high
    return pieces
