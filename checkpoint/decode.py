"""How parity gives back what no memory holds any more.

A stripe is decoded stretch by stretch: where the set of its lost units changes, another stretch
begins, since the code works byte by byte. So a corrupt run costs a stripe one unit where it lies
and nothing elsewhere, and any m losses per byte are made good, whichever units they hit. The rank
that decodes a stretch is the one that this moves the fewest bytes for.

>>> shape = StateShape("m", 256, (Role("param", "float32", 4),))
>>> cover = _Cover([[Run.of(0, 96)], [Run.of(64, 128)]])
>>> list(cover.pieces(Run.of(32, 256)))
[(32, 96, 0), (96, 128, 1), (128, 256, -1)]
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from outlast.checkpoint.protection import record_stripes
from outlast.checkpoint.records import Lineage, ParityRecord, Report, StateShape
from outlast.checkpoint.stream import stream_parts
from outlast.layout.layout import Layout
from outlast.layout.run import Run, subtract
from outlast.layout.stripe import Stripe


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of data unit `unit`, `at` bytes from its start; rank `src` reads them from its slot
    `source`."""

    unit: int
    at: int
    role: str
    run: Run
    src: int
    source: int


@dataclass(frozen=True, slots=True)
class Output:
    """Elements of a rebuilt data unit, `at` bytes from its start, for rank `dst`."""

    unit: int
    at: int
    role: str
    run: Run
    dst: int


@dataclass(frozen=True, slots=True)
class Row:
    """Parity unit `row` of a stripe, in parity source `source` of rank `src`."""

    row: int
    src: int
    source: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Rank `decoder` rebuilds bytes [begin, end) of the `lost` data units of a stripe.

    Args:
        k, m: data and parity units of the stripe.
        inputs: all data units that are left, by unit and offset; where one ends early, zeros
            follow.
        parity: one row per lost unit.
        outputs: what of the lost units goes where, by unit and offset.
    """

    decoder: int
    stripe: int
    k: int
    m: int
    begin: int
    end: int
    inputs: tuple[Part, ...]
    parity: tuple[Row, ...]
    lost: tuple[int, ...]
    outputs: tuple[Output, ...]

    def moved(self, shape: StateShape) -> Iterator[tuple[int, int, int]]:
        """(src, dst, bytes) of every message."""
        width = shape.widths
        for part in self.inputs:
            yield part.src, self.decoder, part.run.numel * width[part.role]
        for row in self.parity:
            yield row.src, self.decoder, self.end - self.begin
        for output in self.outputs:
            yield self.decoder, output.dst, output.run.numel * width[output.role]


def windows(decode: Decode, shape: StateShape, size: int) -> Iterator[Decode]:
    """The same in windows of at most `size` bytes of each unit, a multiple of the widest role."""
    edges = [*range(decode.begin, decode.end, size), decode.end]
    inputs = _by_window(decode.inputs, edges, shape.widths)
    outputs = _by_window(decode.outputs, edges, shape.widths)
    for (begin, end), left, gone in zip(pairwise(edges), inputs, outputs, strict=True):
        if gone:
            yield replace(decode, begin=begin, end=end, inputs=tuple(left), outputs=tuple(gone))


Stretch = TypeVar("Stretch", Part, Output)


def _by_window(
    parts: Iterable[Stretch], edges: Sequence[int], width: Mapping[str, int]
) -> list[list[Stretch]]:
    """`parts` cut at `edges`, which are element borders, by window."""
    found: list[list[Stretch]] = [[] for _ in pairwise(edges)]
    for part in parts:
        size = width[part.role]
        stop = part.at + part.run.numel * size
        at, index = part.at, bisect_right(edges, part.at) - 1
        if 0 <= index < len(found) and stop <= edges[index + 1]:
            found[index].append(part)
            continue
        if index < 0:
            at, index = edges[0], 0
        while at < stop and index < len(found):
            end = min(stop, edges[index + 1])
            first = part.run.start + (at - part.at) // size
            run = Run.of(first, first + (end - at) // size)
            found[index].append(replace(part, at=at, run=run))
            at, index = end, index + 1
    return found


def decodes(
    shape: StateShape,
    reports: Sequence[Report],
    step: int,
    missing: Mapping[int, Sequence[Run]],
    lineage: Lineage = (),
) -> tuple[Decode, ...]:
    """What the parity of `step` can give back of `missing`, that of newer generations first.

    Args:
        missing: rank -> runs that it needs and no slot holds; disjoint.
        lineage: what parity that is older than an averaging of this step counts as lost.
    """
    records: dict[int, ParityRecord] = {}
    rows: dict[tuple[int, int], dict[int, list[Row]]] = {}  # (generation, stripe) -> row -> where
    for report in reports:
        for index, source in enumerate(report.parity):
            record = source.record
            if record.step == step:
                records[record.generation] = record
                for unit in record.units:
                    known = rows.setdefault((record.generation, unit.stripe), {})
                    known.setdefault(unit.row, []).append(Row(unit.row, report.rank, index))
    work = _Decoding(shape, reports, step, missing)
    for generation in sorted(records, reverse=True):
        record = records[generation]
        averaged = (a for a in lineage if a.step == step and a.generation > generation)
        work.look(without=[run for averaging in averaged for run in averaging.runs])
        layout = Layout.from_json(record.layout)
        runs = {holder: layout.runs(holder) for holder in layout.holders}
        lacking = {holder for holder in runs if work.lacks(runs[holder])}
        for stripe in record_stripes(shape, record):
            if any(piece.holder in lacking for piece in stripe.data):
                work.decode(stripe, runs, rows.get((generation, stripe.index), {}))
    return tuple(work.made)


class _Decoding:
    """The decodes of one step as they are found."""

    def __init__(
        self,
        shape: StateShape,
        reports: Sequence[Report],
        step: int,
        missing: Mapping[int, Sequence[Run]],
    ) -> None:
        self.made: list[Decode] = []
        self._shape, self._widths = shape, shape.widths
        self._ranks = list(missing)
        slots = [(r.rank, n, slot) for r in reports for n, slot in enumerate(r.slots)]
        # Of several slots that hold an element the first is read: rather that of a live worker.
        self._slots = sorted((s for s in slots if s[2].step == step), key=lambda s: not s[2].own)
        self._held = _Cover([slot.held for _, _, slot in self._slots])
        self._without: list[Run] = []
        wanted = [missing[rank] for rank in self._ranks]
        self._wanted = {role.name: _Cover(wanted) for role in shape.roles}
        self._load: Counter[int] = Counter()  # rank -> bytes that it receives

    def look(self, without: list[Run]) -> None:
        """From now on count these runs as lost, whoever holds them."""
        if without != self._without:
            self._without = without
            self._held = _Cover([subtract(slot.held, without) for _, _, slot in self._slots])

    def lacks(self, runs: Iterable[Run]) -> bool:
        """Whether some of `runs` is in no slot."""
        return any(index < 0 for run in runs for _, _, index in self._held.pieces(run))

    def decode(
        self,
        stripe: Stripe,
        runs: Mapping[int, Sequence[Run]],
        rows: Mapping[int, Sequence[Row]],
    ) -> None:
        """Add the decodes of one stripe of the streams `runs`, of which parity `rows` are left."""
        inputs: list[Part] = []
        outputs: list[Output] = []
        gaps: list[tuple[int, int, int]] = []  # (begin, end, unit)
        for unit, piece in enumerate(stripe.data):
            at = 0
            for role, run in stream_parts(self._shape, runs[piece.holder], piece.start, piece.stop):
                width = self._widths[role]
                for start, stop, index in self._held.pieces(run):
                    end = at + (stop - start) * width
                    if index >= 0:
                        where = self._slots[index][:2]
                        inputs.append(Part(unit, at, role, Run.of(start, stop), *where))
                    else:
                        if gaps and gaps[-1][1:] == (at, unit):
                            gaps[-1] = (gaps[-1][0], end, unit)
                        else:
                            gaps.append((at, end, unit))
                        outputs += self._outputs(unit, at, role, Run.of(start, stop))
                    at = end
        if outputs and rows:
            self._add(stripe, inputs, outputs, gaps, rows)

    def _outputs(self, unit: int, at: int, role: str, gap: Run) -> Iterator[Output]:
        """Who wants what of a gap that lies `at` bytes from the start of its unit."""
        width = self._widths[role]
        for start, stop, index in self._wanted[role].pieces(gap):
            if index >= 0:
                offset = at + (start - gap.start) * width
                yield Output(unit, offset, role, Run.of(start, stop), self._ranks[index])

    def _add(
        self,
        stripe: Stripe,
        inputs: Sequence[Part],
        outputs: Sequence[Output],
        gaps: Sequence[tuple[int, int, int]],
        rows: Mapping[int, Sequence[Row]],
    ) -> None:
        """One decode per stretch of constant losses, where enough parity is left."""
        # Multiples of the widest role are element borders of every unit.
        word = max(self._widths.values())
        holes = [(begin // word * word, -(-end // word) * word, unit) for begin, end, unit in gaps]
        edges = sorted({edge for begin, end, _ in holes for edge in (begin, end)})
        left = _by_window(inputs, edges, self._widths)
        gone = _by_window(outputs, edges, self._widths)
        for index, (begin, end) in enumerate(pairwise(edges)):
            units = {unit for first, last, unit in holes if first <= begin < last}
            if gone[index] and len(units) <= len(rows):
                sound = tuple(part for part in left[index] if part.unit not in units)
                draft = Decode(
                    decoder=-1, stripe=stripe.index, k=len(stripe.data), m=len(stripe.parity),
                    begin=begin, end=end, inputs=sound, parity=(),
                    lost=tuple(sorted(units)), outputs=tuple(gone[index]),
                )  # fmt: skip
                self._place(draft, rows)

    def _place(self, draft: Decode, rows: Mapping[int, Sequence[Row]]) -> None:
        """Choose who decodes and with which rows: the fewest bytes move; of equals, the rank that
        has received the fewest so far."""
        local: Counter[int] = Counter()
        for src, dst, moved in draft.moved(self._shape):
            local[src] += moved
            local[dst] += moved
        del local[draft.decoder]  # nobody yet
        size, count = draft.end - draft.begin, len(draft.lost)
        here = Counter(rank for at in rows.values() for rank in {row.src for row in at})
        for rank, number in here.items():
            local[rank] += size * min(number, count)
        decoder = min(local, key=lambda rank: (-local[rank], self._load[rank], rank))
        choice = [min(at, key=lambda row: (row.src != decoder, row.src)) for at in rows.values()]
        choice.sort(key=lambda row: (row.src != decoder, row.row))
        decode = replace(draft, decoder=decoder, parity=tuple(choice[:count]))
        for src, dst, moved in decode.moved(self._shape):
            self._load[dst] += moved * (src != dst)
        for output in decode.outputs:
            self._wanted[output.role].forget(output.run)
        self.made.append(decode)


class _Cover:
    """Who of several has an address: the first that does."""

    def __init__(self, held: Sequence[Iterable[Run]]) -> None:
        pairs = [
            (pair, index) for index, runs in enumerate(held) for run in runs
            for pair in run.intervals()
        ]  # fmt: skip
        self._points = sorted({edge for pair, _ in pairs for edge in pair})
        place = {edge: index for index, edge in enumerate(self._points)}
        self._owner = [-1] * len(self._points)
        for (start, stop), index in reversed(pairs):
            first, last = place[start], place[stop]
            self._owner[first:last] = [index] * (last - first)

    def forget(self, run: Run) -> None:
        """From now on nobody has a plain run."""
        first, last = self._edge(run.start), self._edge(run.stop)
        self._owner[first:last] = [-1] * (last - first)

    def _edge(self, point: int) -> int:
        index = bisect_left(self._points, point)
        if self._points[index : index + 1] != [point]:
            self._owner.insert(index, self._owner[index - 1] if index else -1)
            self._points.insert(index, point)
        return index

    def pieces(self, run: Run) -> Iterator[tuple[int, int, int]]:
        """(start, stop, index) of a plain run in order, -1 where nobody has it."""
        start, place = run.start, bisect_right(self._points, run.start) - 1
        owner = self._owner[place] if place >= 0 else -1
        for index in range(place + 1, bisect_left(self._points, run.stop)):
            if self._owner[index] != owner:
                yield start, self._points[index], owner
                start, owner = self._points[index], self._owner[index]
        yield start, run.stop, owner
