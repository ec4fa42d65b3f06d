"""Plans: which transfers turn one layout into another.

`plan(src, dst)` serves resharding, loading, saving, converting and recovery alike: whoever has an
address sends it to whoever lacks it. Invariants: a holder never receives what it already holds,
receives each lacking element once, and only from a live holder that has it; what no live holder has
is in `missing`, per receiver. Where several could send, the least loaded does; large pieces are
split among them.

A plan is numpy columns like a layout, so that millions of runs cost well under a second; `Move`
objects are made while iterating. All callers with equal layouts get the same moves in the same
order.

>>> from outlast.layout.layout import Layout
>>> before = Layout.of({1: [Run.of(0, 6)], 2: [Run.of(6, 12)]})
>>> after = Layout.of({1: [Run.of(0, 4)], 2: [Run.of(8, 12)], 3: [Run.of(4, 8)]})
>>> moves = plan(before, after)
>>> [(move.src, move.dst, move.run.start, move.run.stop) for move in moves]
[(1, 3, 4, 6), (2, 3, 6, 8)]
>>> moves.numel, moves.sent(2), moves.received(3)
(4, 2, 4)
>>> plan(before, after, alive=[1, 3]).missing
((3, (Run(start=6, length=2, stride=0, count=1),)),)
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from outlast.layout.layout import Layout
from outlast.layout.rows import Floats, Ints, Rows, depth, spans
from outlast.layout.run import Run, intersect, numel, subtract

SPLIT = 1 << 16  # elements: a smaller message gains nothing from a second link


@dataclass(frozen=True, slots=True, order=True)
class Move:
    """Holder `src` sends the elements of `run` to holder `dst`."""

    src: int
    dst: int
    run: Run


@dataclass(frozen=True, eq=False)
class Plan:
    """Moves as columns: the owners of `rows` receive, `source` send; both index `holders`."""

    holders: tuple[int, ...]
    source: Ints
    rows: Rows
    lost: Rows

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Move]:
        return self._moves(np.arange(len(self)))

    def _moves(self, index: Ints) -> Iterator[Move]:
        rows = self.rows.take(index)
        pairs = zip(self.source[index].tolist(), rows.owner.tolist(), rows.runs(), strict=True)
        return (Move(self.holders[src], self.holders[dst], run) for src, dst, run in pairs)

    @property
    def numel(self) -> int:
        """Elements moved, counted once for each receiver."""
        return int(self.rows.numel.sum())

    @cached_property
    def _sent(self) -> Ints:
        return self.rows._replace(owner=self.source).total(len(self.holders))

    @cached_property
    def _received(self) -> Ints:
        return self.rows.total(len(self.holders))

    @cached_property
    def _index(self) -> dict[int, int]:
        return {holder: index for index, holder in enumerate(self.holders)}

    def sent(self, holder: int) -> int:
        """Elements that `holder` sends."""
        return int(self._sent[self._index[holder]]) if holder in self._index else 0

    def received(self, holder: int) -> int:
        """Elements that `holder` receives."""
        return int(self._received[self._index[holder]]) if holder in self._index else 0

    def moves_from(self, holder: int) -> list[Move]:
        """The moves that `holder` sends, in the plan's order."""
        return list(self._moves(np.flatnonzero(self.source == self._index.get(holder, -1))))

    def moves_to(self, holder: int) -> list[Move]:
        """The moves that `holder` receives, in the plan's order."""
        return list(self._moves(np.flatnonzero(self.rows.owner == self._index.get(holder, -1))))

    @cached_property
    def missing(self) -> tuple[tuple[int, tuple[Run, ...]], ...]:
        """(holder, runs) of what a receiver lacks and no live holder has."""
        lost: dict[int, list[Run]] = {}
        for owner, run in zip(self.lost.owner.tolist(), self.lost.runs(), strict=True):
            lost.setdefault(self.holders[owner], []).append(run)
        return tuple((holder, tuple(runs)) for holder, runs in sorted(lost.items()))


def plan(src: Layout, dst: Layout, alive: Container[int] | None = None, split: int = SPLIT) -> Plan:
    """The moves that give every holder of `dst` what it lacks, from live holders of `src`.

    Args:
        src: may hold an element several times (replicas) or not at all.
        alive: those who can send; all by default. A holder always keeps what it has itself.
        split: a lacking piece is divided among its senders in parts of at least so many elements.
    """
    holders = tuple(sorted({*src.holders, *dst.holders}))
    number = {holder: index for index, holder in enumerate(holders)}
    have, want = (
        layout.rows.owned_by(np.array([number[h] for h in layout.holders], dtype=np.int64))
        for layout in (src, dst)
    )
    living = np.array(
        [n if alive is None or h in alive else -1 for n, h in enumerate(holders)], dtype=np.int64
    )
    if not (have.is_plain and want.is_plain):
        return _plan_strided(src, dst, holders, living)
    want = _lacking(_changed(want, have, len(holders)), have)
    able = _touching(have, want).owned_by(living)
    point = np.unique(np.concatenate([want.start, want.stop, able.start, able.stop]))
    if not len(want.start):
        return _collect(holders, want.owner, want.owner, want.start, want.stop)
    row, segment = spans(np.searchsorted(point, want.start), np.searchsorted(point, want.stop))
    copies = depth(point, able.start, able.stop)[segment]
    sender = depth(point, able.start, able.stop, able.owner)[
        segment
    ]  # right where there is one copy
    sender[copies == 0] = -1
    owner, start, stop = want.owner[row], point[segment], point[segment + 1]
    several = np.flatnonzero(copies > 1)
    if not len(several):
        return _collect(holders, sender, owner, start, stop)
    once = np.flatnonzero(copies == 1)
    forced = np.bincount(sender[once], (stop - start)[once], minlength=len(holders)).astype(float)
    several = several[np.argsort(copies[several], kind="stable")]  # the least choice chooses first
    shares = _share(
        _Choice(able, point, segment[several]), start[several], stop[several], forced, split
    )
    single = np.flatnonzero(copies <= 1)
    who, where, begin, end = (np.array(column, dtype=np.int64) for column in shares)
    return _collect(
        holders,
        np.concatenate([sender[single], who]),
        np.concatenate([owner[single], owner[several][where]]),
        np.concatenate([start[single], begin]),
        np.concatenate([stop[single], end]),
    )


def _changed(want: Rows, have: Rows, holders: int) -> Rows:
    """`want` without the rows that lie in one of `have` with the same owner and start: most."""
    key = [rows.start * holders + rows.owner for rows in (have, want)]
    if not len(key[0]):
        return want
    at = np.minimum(np.searchsorted(key[0], key[1]), len(key[0]) - 1)
    return want.take(np.flatnonzero((key[0][at] != key[1]) | (have.length[at] < want.length)))


def _touching(rows: Rows, others: Rows) -> Rows:
    """The rows that share an address with any of `others`."""
    start = others.start
    if not len(start):
        return rows.take(np.zeros(0, dtype=np.int64))
    reach = np.maximum.accumulate(others.stop)
    before = (
        np.searchsorted(start, rows.stop) - 1
    )  # the last of the others that starts before the row ends
    return rows.take(np.flatnonzero((before >= 0) & (reach[before] > rows.start)))


def _lacking(want: Rows, have: Rows) -> Rows:
    """What each owner wants and does not have: one subtraction, the owners laid end to end."""
    have = _touching(have, want)
    if not len(have.start):
        return want
    span = int(max(want.stop.max(), have.stop.max())) + 1
    lines = [(r.owner * span + r.start, r.owner * span + r.stop) for r in (want, have)]
    point = np.unique(np.concatenate([edge for line in lines for edge in line]))
    wanted, had = (depth(point, *line) for line in lines)
    lack = np.concatenate([[False], (wanted > 0) & (had == 0), [False]])
    start, stop = point[lack[1:] & ~lack[:-1]], point[~lack[1:] & lack[:-1]]
    owner = start // span
    return Rows.intervals(owner, start - owner * span, stop - owner * span)


class _Choice:
    """Who can send each segment that has several copies."""

    def __init__(self, able: Rows, point: Ints, segments: Ints) -> None:
        row, segment = spans(np.searchsorted(point, able.start), np.searchsorted(point, able.stop))
        wanted = np.zeros(len(point), dtype=bool)
        wanted[segments] = True
        keep = np.flatnonzero(wanted[segment])
        keep = keep[np.argsort(segment[keep], kind="stable")]
        self._owner = able.owner[row[keep]]
        self._first = np.searchsorted(segment[keep], segments).tolist()
        self._last = np.searchsorted(segment[keep], segments, side="right").tolist()

    def __getitem__(self, item: int) -> Ints:
        return self._owner[self._first[item] : self._last[item]]


def _share(choice: _Choice, start: Ints, stop: Ints, load: Floats, split: int) -> list[list[int]]:
    """Columns (sender, item, start, stop): each item poured over its least loaded candidates."""
    columns: list[list[int]] = [[], [], [], []]
    for item, (begin, end) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        able = choice[item]
        able = able[np.argsort(load[able], kind="stable")][: max((end - begin) // split, 1)]
        for sender, amount in zip(
            able.tolist(), _pour(load[able], end - begin, split), strict=True
        ):
            if amount:
                for column, value in zip(
                    columns, (sender, item, begin, begin + amount), strict=True
                ):
                    column.append(value)
                load[sender] += amount
                begin += amount
    return columns


def _pour(load: Floats, amount: int, split: int) -> list[int]:
    """Multiples of `split` (the first has the rest) that lift ascending loads to one level."""
    below = np.cumsum(load) - load
    filled = max(int(np.searchsorted(load * np.arange(len(load)) - below, amount)), 1)
    level = (amount + load[:filled].sum()) / filled
    parts = np.zeros(len(load), dtype=np.int64)
    parts[:filled] = np.maximum(level - load[:filled], 0) // split * split
    parts[0] += amount - int(parts.sum())
    return [int(part) for part in parts]


def _collect(holders: tuple[int, ...], sender: Ints, owner: Ints, start: Ints, stop: Ints) -> Plan:
    """The plan of plain moves, adjacent ones merged; sender -1 means that nobody has it."""
    pair = (sender + 1) * len(holders) + owner
    joined = Rows.intervals(pair, start, stop).merged()
    sender, owner = joined.owner // len(holders) - 1, joined.owner % len(holders)
    rows = joined._replace(owner=owner)
    return Plan(holders, sender[sender >= 0], rows.take(sender >= 0), rows.take(sender < 0))


def _plan_strided(src: Layout, dst: Layout, holders: tuple[int, ...], living: Ints) -> Plan:
    """The same on whole strided runs: column shards are thousands of records, not millions."""
    sources = [
        (run.start, run.stop, holder, run)
        for holder, number in zip(holders, living, strict=True)
        if number >= 0
        for run in src.runs(holder)
    ]
    start, stop = (np.array([source[n] for source in sources], dtype=np.int64) for n in (0, 1))
    load = dict.fromkeys(holders, 0)
    moves: list[Move] = []
    lost: list[tuple[int, Run]] = []
    for number, holder in enumerate(holders):
        for run in subtract(dst.runs(holder), src.runs(holder)):
            near = np.flatnonzero((start < run.stop) & (stop > run.start)).tolist()
            rest: tuple[Run, ...] = (run,)
            for _, _, sender, theirs in sorted((sources[n] for n in near), key=_by_load(load)):
                part = intersect(rest, [theirs])
                rest = subtract(rest, part) if part else rest
                load[sender] += numel(part)
                moves += [Move(sender, holder, piece) for piece in part]
            lost += [(number, piece) for piece in rest]
    moves.sort(key=lambda move: (move.run.start, move.dst, move.src))
    index = {holder: number for number, holder in enumerate(holders)}
    source = np.array([index[move.src] for move in moves], dtype=np.int64)
    return Plan(holders, source, Rows.of((index[m.dst], m.run) for m in moves), Rows.of(lost))


def _by_load(load: dict[int, int]) -> Callable[[tuple[int, int, int, Run]], tuple[int, int]]:
    return lambda source: (load[source[2]], source[2])
