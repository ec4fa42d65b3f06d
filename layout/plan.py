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

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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

    @cached_property
    def _index(self) -> dict[int, int]:
        return {holder: index for index, holder in enumerate(self.holders)}

    @cached_property
    def _totals(self) -> tuple[list[int], list[int]]:
        sent = self.rows._replace(owner=self.source).total(len(self.holders))
        return sent.tolist(), self.rows.total(len(self.holders)).tolist()

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

    def sent(self, holder: int) -> int:
        """Elements that `holder` sends."""
        return self._totals[0][self._index[holder]] if holder in self._index else 0

    def received(self, holder: int) -> int:
        """Elements that `holder` receives."""
        return self._totals[1][self._index[holder]] if holder in self._index else 0

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
    living = [n if alive is None or h in alive else -1 for n, h in enumerate(holders)]
    have, want = (layout.restrict(holders).rows for layout in (src, dst))
    if not (have.is_plain and want.is_plain):
        return _plan_strided(src, dst, holders, living)
    want = _lacking(_changed(want, have, len(holders)), have)
    able = _touching(have, want).owned_by(np.array(living, dtype=np.int64))
    point = np.unique(np.concatenate([want.start, want.stop, able.start, able.stop]))
    if not len(want.start):
        return _collect(holders, want.owner, want.owner, want.start, want.stop)
    row, segment = spans(np.searchsorted(point, want.start), np.searchsorted(point, want.stop))
    owner, start, stop = want.owner[row], point[segment], point[segment + 1]
    copies = depth(point, able.start, able.stop)[segment]
    sender = depth(point, able.start, able.stop, able.owner)[segment]  # right for a single copy
    sender[copies == 0] = -1
    if (copies < 2).all():
        return _collect(holders, sender, owner, start, stop)
    one, many = np.flatnonzero(copies < 2), np.flatnonzero(copies > 1)
    many = many[np.argsort(copies[many], kind="stable")]  # the least choice chooses first
    forced = Rows.intervals(sender[one] + 1, start[one], stop[one]).total(len(holders) + 1)[1:]
    able_of = _choices(able, point, segment[many])
    who, where, begin, end = _share(able_of, start[many], stop[many], forced.astype(float), split)
    return _collect(
        holders,
        np.concatenate([sender[one], who]),
        np.concatenate([owner[one], owner[many][where]]),
        np.concatenate([start[one], begin]),
        np.concatenate([stop[one], end]),
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
    before = np.searchsorted(start, rows.stop) - 1  # the last that starts before the row ends
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


def _choices(able: Rows, point: Ints, segments: Ints) -> list[Ints]:
    """Who can send each of `segments`."""
    row, segment = spans(np.searchsorted(point, able.start), np.searchsorted(point, able.stop))
    keep = np.flatnonzero(np.isin(segment, segments))
    keep = keep[np.argsort(segment[keep], kind="stable")]
    edges = (np.searchsorted(segment[keep], segments, side).tolist() for side in ("left", "right"))
    return [able.owner[row[keep[a:b]]] for a, b in zip(*edges, strict=True)]


def _share(
    able_of: Sequence[Ints], start: Ints, stop: Ints, load: Floats, split: int
) -> tuple[Ints, ...]:
    """Columns (sender, item, start, stop): each item poured over its least loaded candidates."""
    parts: list[tuple[int, int, int, int]] = []
    for item, (begin, end) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        able = able_of[item]
        able = able[np.argsort(load[able], kind="stable")][: max((end - begin) // split, 1)]
        amounts = _pour(load[able], end - begin, split)
        load[able] += amounts
        edges = begin + np.cumsum([0, *amounts])
        for sender, (first, last) in zip(able.tolist(), pairwise(edges.tolist()), strict=True):
            parts.append((sender, item, first, last))
    return tuple(np.array(parts, dtype=np.int64).T)


def _pour(load: Floats, amount: int, split: int) -> Ints:
    """Multiples of `split` (the first has the rest) that lift ascending loads to one level."""
    below = np.cumsum(load) - load
    filled = max(int(np.searchsorted(load * np.arange(len(load)) - below, amount)), 1)
    level = (amount + load[:filled].sum()) / filled
    parts = np.zeros(len(load), dtype=np.int64)
    parts[:filled] = np.maximum(level - load[:filled], 0) // split * split
    parts[0] += amount - int(parts.sum())
    return parts


def _collect(holders: tuple[int, ...], sender: Ints, owner: Ints, start: Ints, stop: Ints) -> Plan:
    """The plan of plain moves, adjacent ones merged; sender -1 means that nobody has it."""
    pair = owner * (len(holders) + 1) + sender + 1  # sorted by receiver first, as `rows` will be
    joined = Rows.intervals(pair, start, stop).merged()
    owner, sender = joined.owner // (len(holders) + 1), joined.owner % (len(holders) + 1) - 1
    rows = joined._replace(owner=owner)
    return Plan(holders, sender[sender >= 0], rows.take(sender >= 0), rows.take(sender < 0))


def _plan_strided(
    src: Layout, dst: Layout, holders: tuple[int, ...], living: Sequence[int]
) -> Plan:
    """The same on whole strided runs: column shards are thousands of records, not millions."""
    sources = [(n, run) for n in living if n >= 0 for run in src.runs(holders[n])]
    start = np.array([run.start for _, run in sources], dtype=np.int64)
    stop = np.array([run.stop for _, run in sources], dtype=np.int64)
    load = [0] * len(holders)
    moves: list[tuple[int, int, Run]] = []
    for number, holder in enumerate(holders):
        for run in subtract(dst.runs(holder), src.runs(holder)):
            near = [sources[n] for n in np.flatnonzero((start < run.stop) & (stop > run.start))]
            rest: tuple[Run, ...] = (run,)
            for _, sender, theirs in sorted((load[n], n, theirs) for n, theirs in near):
                part = intersect(rest, [theirs])
                rest = subtract(rest, part)
                load[sender] += numel(part)
                moves += [(sender, number, piece) for piece in part]
            moves += [(-1, number, piece) for piece in rest]
    moves.sort(key=lambda move: (move[2].start, move[1], move[0]))
    rows = Rows.of((number, run) for _, number, run in moves)
    source = np.array([sender for sender, _, _ in moves], dtype=np.int64)
    return Plan(holders, source[source >= 0], rows.take(source >= 0), rows.take(source < 0))
