"""Layouts: who holds which addresses, and how ownership changes.

A `Layout` maps holders to sets of runs. A holder is a worker, a node's memory, a file. Invariant:
for each holder the runs are canonical (sorted, disjoint, adjacent ones merged), so equal plain
layouts compare equal. Holders are listed in ascending order; functions that *deal* follow the order
of the holders given to them.

Every cut they make falls on unit.start + i * grain (`Space.cuts`), the same for every world size,
so that sums per grain have the same bits wherever the cuts are. After a loss `fill_hole` moves the
lost runs alone, where an even re-split would move a quarter of the state; `rebalance` evens out
later.

>>> from outlast.layout.space import Space, Tensor
>>> space = Space.of([Tensor("a", (8,), "float32"), Tensor("b", (8,), "float32")], unit_of=str)
>>> layout = deal(space, [7, 8], grain=2)
>>> layout.runs(7)
(Run(start=0, length=4, stride=0, count=1), Run(start=12, length=4, stride=0, count=1))
>>> layout.is_partition(16), layout.restrict([7]).missing(16) == layout.runs(8)
(True, True)
>>> three = rebalance(layout, [7, 8, 9], space, grain=2)
>>> [three.numel(holder) for holder in three.holders]
[6, 6, 4]
>>> fill_hole(three, [7, 9], space, grain=2).numel(9)
8
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from outlast.layout.rows import Ints, Rows
from outlast.layout.run import Run, canonical
from outlast.layout.space import Space, chains


@dataclass(frozen=True, eq=False)
class Layout:
    """holder -> sorted disjoint runs; build it with `Layout.of` or one of the functions below.

    `rows` are the runs of all holders, sorted by start; their owner is an index into `holders`
    (ascending).
    """

    holders: tuple[int, ...]
    rows: Rows

    @classmethod
    def of(cls, runs: Mapping[int, Iterable[Run]]) -> Self:
        """The layout of a mapping from holder to its runs, overlapping or not, in any order."""
        holders = tuple(sorted(runs))
        pairs = ((index, run) for index, h in enumerate(holders) for run in canonical(runs[h]))
        return cls(holders, Rows.of(pairs))

    @cached_property
    def _by_owner(self) -> tuple[Ints, Ints]:
        """Row numbers ordered by owner, and where each owner's begin."""
        order = np.argsort(self.rows.owner, kind="stable")
        return order, np.searchsorted(self.rows.owner[order], np.arange(len(self.holders) + 1))

    @cached_property
    def _numels(self) -> Ints:
        return self.rows.total(len(self.holders))

    @cached_property
    def _index(self) -> dict[int, int]:
        return {holder: index for index, holder in enumerate(self.holders)}

    def rows_of(self, holder: int) -> Ints:
        """Positions in `rows` of the runs of `holder`, by address."""
        order, first = self._by_owner
        index = self._index.get(holder)
        return order[:0] if index is None else order[first[index] : first[index + 1]]

    def runs(self, holder: int) -> tuple[Run, ...]:
        """The runs of `holder`; nothing for a stranger."""
        return tuple(self.rows.take(self.rows_of(holder)).runs())

    def numel(self, holder: int) -> int:
        """Elements of `holder`; 0 for a stranger."""
        index = self._index.get(holder)
        return 0 if index is None else int(self._numels[index])

    def restrict(self, holders: Iterable[int]) -> "Layout":
        """The layout of exactly these holders; those it does not know hold nothing."""
        chosen = tuple(sorted(set(holders)))
        rank = {holder: index for index, holder in enumerate(chosen)}
        table = np.array([rank.get(holder, -1) for holder in self.holders], dtype=np.int64)
        return Layout(chosen, self.rows.owned_by(table))

    def gaps(self, numel: int) -> tuple[Ints, Ints]:
        """Starts and stops of what nobody holds of [0, numel)."""
        rows = self.rows.plain()
        reach = np.maximum.accumulate(np.concatenate([[0], rows.stop]))
        start, stop = np.minimum(reach, numel), np.minimum(np.append(rows.start, numel), numel)
        keep = stop > start
        return start[keep], stop[keep]

    def missing(self, numel: int) -> tuple[Run, ...]:
        """What nobody holds of [0, numel)."""
        start, stop = self.gaps(numel)
        return tuple(map(Run.of, start.tolist(), stop.tolist()))

    def covers(self, numel: int) -> bool:
        """Whether every address of [0, numel) has a holder."""
        return not len(self.gaps(numel)[0])

    def is_partition(self, numel: int) -> bool:
        """Whether every address of [0, numel) has exactly one holder and no other address any."""
        return self.covers(numel) and int(self._numels.sum()) == numel

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        pairs = zip(self.rows, other.rows, strict=True)
        return self.holders == other.holders and all(np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # a big value, not a key

    def as_json(self) -> dict[str, Any]:
        """{str(holder): [[start, length] or [start, length, stride, count], ...]}."""
        return {
            str(holder): [
                [run.start, run.length] + [run.stride, run.count] * (run.count > 1)
                for run in self.runs(holder)
            ]
            for holder in self.holders
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Sequence[Sequence[int]]]) -> Self:
        """The layout that `as_json` described; ValueError for impossible runs."""
        return cls.of(
            {int(holder): [Run(*map(int, r)) for r in runs] for holder, runs in plain.items()}
        )


def deal(
    space: Space, holders: Sequence[int], grain: int, weights: Sequence[float] | None = None
) -> Layout:
    """Every unit dealt over all holders in contiguous pieces, in the order given, which turns by
    one from unit to unit.

    Blocks of a chain (`space.chains`) are cut alike. So where holders that follow each other, and
    the last and the first, are on different nodes, equal offsets of neighbouring blocks are, too:
    one lost node leaves the neighbours of whatever it held.

    Shares follow `weights` (even without). What a unit leaves a holder owing is made good in the
    next, so totals stay within about a grain of the share, and one more per chain; a holder of
    weight 0 gets nothing. With weights blocks are dealt as other units are.
    """
    _check(holders, grain)
    count = len(holders)
    share = np.ones(count, dtype=np.int64)
    chained = {index for chain in chains(space) for index in chain}
    if weights is not None:
        ratio = np.asarray(weights, dtype=np.float64)
        if len(ratio) != count or (ratio < 0).any() or not ratio.sum() > 0:
            raise ValueError("weights need one number >= 0 per holder, not all 0")
        share, chained = np.rint(ratio / ratio.max() * 2**20).astype(np.int64), set()
    whole, credit = int(share.sum()), np.zeros(count, dtype=np.int64)
    starts, stops, owners = [], [], []
    for index in sorted(range(len(space.units)), key=lambda index: index not in chained):
        unit = space.units[index]
        grains = -(-unit.numel // grain)
        turn = (np.arange(count) - index) % count  # whose the pieces are, in address order
        due = grains * share + credit  # in grains / whole, so that nothing is ever rounded
        if index in chained:  # extra grains apart, so that they even out as the order turns
            given = np.empty(count, dtype=np.int64)
            given[turn] = np.diff(np.arange(count + 1) * grains // count)
        else:
            given = _apportion(due, whole, grains)
        credit = due - given * whole
        edge = unit.start + np.minimum(np.cumsum(given[turn]) * grain, unit.numel)
        starts.append(np.append(unit.start, edge[:-1]))
        stops.append(edge)
        owners.append(_ranks(holders)[turn])
    empty = np.zeros(0, dtype=np.int64)
    columns = (np.concatenate([empty, *column]) for column in (owners, starts, stops))
    return Layout(tuple(sorted(holders)), Rows.intervals(*columns).merged())


def replicate(space: Space, holders: Sequence[int]) -> Layout:
    """Every holder holds everything."""
    return Layout.of({holder: [Run(0, space.numel)] if space.numel else [] for holder in holders})


def fill_hole(layout: Layout, holders: Sequence[int], space: Space, grain: int) -> Layout:
    """What none of `holders` holds is dealt to them; they keep what they have.

    Those who hold least get most, until totals are as even as grains allow; each gets one
    contiguous stretch of what is missing, and nothing else moves. New holders start empty.
    """
    _check(holders, grain)
    kept = layout.restrict(holders)
    start, stop = kept.gaps(space.numel)
    if not len(start):
        return kept
    held = np.array([kept.numel(holder) for holder in holders], dtype=np.int64)
    quota = _level(held, int((stop - start).sum()), grain)
    at = _cut(start, stop, np.cumsum(quota)[:-1], space, grain)
    edge = np.concatenate([[0], np.cumsum(stop - start)])
    cut = np.unique(np.concatenate([edge, at]))[:-1]
    length = np.diff(np.append(cut, edge[-1]))
    piece = np.searchsorted(edge, cut, side="right") - 1
    begin = start[piece] + cut - edge[piece]
    owner = _ranks(holders)[np.searchsorted(at, cut, side="right")]
    return _with(kept, Rows.intervals(owner, begin, begin + length))


def rebalance(layout: Layout, holders: Sequence[int], space: Space, grain: int) -> Layout:
    """Even shares for `holders`, moving only what the overfull and the leaving have too much.

    `layout` is a partition of the space (ValueError otherwise). Shares end within a grain of the
    mean where units are whole grains, within about two where they have tails; a layout that is
    there already is returned as it is. Each donor gives one contiguous stretch of its own
    addresses, and the stretches of different donors lie apart, so that one unit does not end up
    with one holder.
    """
    _check(holders, grain)
    if not layout.is_partition(space.numel):
        raise ValueError("only a partition of the space can be rebalanced")
    held = np.array([layout.numel(holder) for holder in holders], dtype=np.int64)
    mean = space.numel / len(holders)
    if int(held.sum()) == space.numel and (np.abs(held - mean) <= grain).all():
        return layout.restrict(holders)
    base = space.numel // len(holders) // grain * grain
    target = np.full(len(holders), base)
    extra = (space.numel - base * len(holders)) // grain
    target[np.argsort(-held, kind="stable")[:extra]] += grain  # who has most keeps most
    surplus = dict(zip(holders, (held - target).tolist(), strict=True))
    for holder in layout.holders:
        surplus.setdefault(holder, layout.numel(holder))
    plain = Layout(layout.holders, layout.rows.plain())
    return fill_hole(_release(plain, surplus, space, grain), holders, space, grain)


def settle(
    claims: Sequence[tuple[int, int, Iterable[Run]]],
    holders: Sequence[int],
    space: Space,
    grain: int,
) -> Layout:
    """One partition out of claims (generation, holder, runs) that may overlap and leave holes.

    Each address goes to the live claimant of the highest generation, of equals to the earlier in
    `holders`; then holes are filled and shares evened. Equal claims give equal layouts on every
    caller.
    """
    _check(holders, grain)
    rank = {holder: index for index, holder in enumerate(holders)}
    live = [(generation, -rank[h], canonical(runs)) for generation, h, runs in claims if h in rank]
    live.sort(key=lambda claim: claim[:2])  # painted in this order: the strongest claim comes last
    rows = Rows.of((n, run) for n, claim in enumerate(live) for run in claim[2]).plain()
    point = np.unique(np.concatenate([rows.start, rows.stop, [0]]))
    owner = np.full(len(point) - 1, -1)
    order = np.argsort(rows.owner, kind="stable")
    edges = [np.searchsorted(point, edge[order]).tolist() for edge in (rows.start, rows.stop)]
    position = _ranks(holders).tolist()
    for first, last, claim in zip(*edges, rows.owner[order].tolist(), strict=True):
        owner[first:last] = position[-live[claim][1]]
    held = np.flatnonzero(owner >= 0)
    won = Rows.intervals(owner[held], point[held], point[held + 1]).merged()
    whole = fill_hole(Layout(tuple(sorted(holders)), won), holders, space, grain)
    return rebalance(whole, holders, space, grain)


def _check(holders: Sequence[int], grain: int) -> None:
    if not holders or len(set(holders)) != len(holders) or grain < 1:
        raise ValueError("dealing needs distinct holders, at least one, and a grain >= 1")


def _ranks(holders: Sequence[int]) -> Ints:
    """Position of each holder in ascending order."""
    return np.argsort(np.argsort(np.array(holders, dtype=np.int64)))


def _apportion(due: Ints, whole: int, grains: int) -> Ints:
    """Numbers >= 0 that sum to `grains`, each next to due / whole; largest remainders round up."""
    given = np.maximum(due // whole, 0)
    rest = grains - int(given.sum())
    if rest > 0:
        given[np.argsort(given * whole - due, kind="stable")[:rest]] += 1
    while rest < 0:  # earlier over-payment was more than this unit can offset
        payers = np.flatnonzero(given)
        order = payers[np.argsort((due - given * whole)[payers], kind="stable")[:-rest]]
        given[order] -= 1
        rest += len(order)
    return given


def _level(held: Ints, amount: int, grain: int) -> Ints:
    """Parts of `amount`, in grains (one has the rest), that raise the lowest to one level."""
    order = np.argsort(held, kind="stable")
    low = held[order]
    below = np.cumsum(low) - low
    receivers = max(int(np.searchsorted(low * np.arange(len(low)) - below, amount)), 1)
    level = (amount + int(low[:receivers].sum())) // receivers
    want = level - low[:receivers]
    part = want // grain * grain
    extra, rest = divmod(amount - int(part.sum()), grain)
    up = np.argsort(part - want, kind="stable")
    part[up[:extra]] += grain
    if rest:
        part[up[extra]] += rest
    quota = np.zeros_like(held)
    quota[order[:receivers]] = part
    return quota


def _cut(start: Ints, stop: Ints, at: Ints, space: Space, grain: int) -> Ints:
    """Positions on the line of the intervals laid end to end, moved to the nearest allowed cuts."""
    edge = np.concatenate([[0], np.cumsum(stop - start)])
    piece = np.minimum(np.searchsorted(edge, at, side="right") - 1, len(start) - 1)
    address = start[piece] + at - edge[piece]
    cut = np.clip(space.snap(address, grain), start[piece], stop[piece])
    return np.where(np.isin(at, edge), at, edge[piece] + cut - start[piece])


def _with(layout: Layout, more: Rows) -> Layout:
    """`layout` and the plain rows `more` of the same holders, which are disjoint from it."""
    at = np.searchsorted(layout.rows.start, more.start)
    rows = Rows(*(np.insert(a, at, b) for a, b in zip(layout.rows, more, strict=True)))
    if rows.is_plain:
        return Layout(layout.holders, rows.merged())
    mixed = Layout(layout.holders, rows)
    return Layout.of({holder: mixed.runs(holder) for holder in mixed.holders})


def _release(layout: Layout, surplus: Mapping[int, int], space: Space, grain: int) -> Layout:
    """`layout` (plain) without a stretch of about `surplus` elements of each who has too much."""
    rows = layout.rows
    low, high = np.zeros_like(rows.start), np.zeros_like(rows.start)  # [low, high) of each row goes
    donors = [holder for holder, amount in surplus.items() if amount > 0]
    owed = 0  # what snapping to cuts left over so far
    for number, donor in enumerate(donors):
        mine = layout.rows_of(donor)
        start, stop, held = rows.start[mine], rows.stop[mine], layout.numel(donor)
        amount = surplus[donor]
        if amount < held:
            want = min(max(amount + owed, 0), held)
            begin = min(number * held // len(donors), held - want)
            at = _cut(start, stop, np.array([begin, begin + want]), space, grain)
        else:
            at = np.array([0, held])
        owed += amount - int(at[1] - at[0])
        edge = np.cumsum(stop - start) - (stop - start)
        low[mine], high[mine] = (np.clip(p - edge, 0, stop - start) for p in at)
    owner = np.concatenate([rows.owner, rows.owner])
    start = np.concatenate([rows.start, rows.start + high])
    stop = np.concatenate([rows.start + low, rows.stop])
    return Layout(layout.holders, Rows.intervals(owner, start, stop))
