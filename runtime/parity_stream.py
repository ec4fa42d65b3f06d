"""Parity of a step, chunk by chunk: no rank ever holds more than a few chunks of its peers' state.

[Note: rounds] Round r handles chunk r of every unit of every stripe. The data of a stripe go to its
encoder, the holder of parity row 0, in one all-to-all for all stripes; it encodes, keeps row 0, and
ships rows 1 to m - 1 to their holders in a second one. The data of round r + 1 travel while r is
encoded, the rows of r while the data of r + 1 arrive. All ranks post the same sequence: data 0,
data 1, rows 0, data 2, rows 1, ... For each stripe that it encodes a rank buffers k chunks that
leave (gloo sends from one vector), 2k that arrive, and m - 1 rows each way.

A rank sends (k + m - 1) / k times its state that way; data to every holder of parity would be m."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import xxhash
from torch import Tensor

from outlast.checkpoint.code import Code
from outlast.layout.stripe import ALIGN, Piece, Stripe
from outlast.runtime.collectives import Communicator, Pending
from outlast.runtime.device_code import DeviceCode

CHUNK = 4 << 20  # bytes of a unit in a round

Slots = Sequence[tuple[int, int]]  # (rank, bytes) of vectors, in the same order at both ends


class Stream:
    """The snapshot stream of a rank: the bytes of `parts` end to end."""

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self._parts = [part.view(torch.uint8) for part in parts if part.numel()]
        self._starts = list(accumulate((part.numel() for part in self._parts), initial=0))

    def cut(self, start: int, stop: int) -> Iterator[Tensor]:
        """uint8 views of the bytes [start, stop)."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            part, first = self._parts[index], self._starts[index]
            end = min(stop, first + part.numel())
            yield part[start - first : end - first]
            start, index = end, index + 1


@dataclass(frozen=True, slots=True)
class Unit:
    """Parity unit `row` of a stripe that this rank holds, at `offset` of its parity half."""

    stripe: Stripe
    row: int
    offset: int


class Swap:
    """An all-to-all of vectors: those for one rank arrive there in the order in which they left.

    Args:
        leaving: slots of `sent`, views into the buffer `input` that are filled before `post`.
        arriving: slots of what `wait` returns, views into the buffer `output`.
    """

    def __init__(
        self, side: Communicator, leaving: Slots, arriving: Slots, input: Tensor, output: Tensor
    ) -> None:
        self._side = side
        self._pending: Pending | None = None
        self._sizes = _totals(leaving, side.size), _totals(arriving, side.size)
        self._input, self._output = input[: sum(self._sizes[0])], output[: sum(self._sizes[1])]
        self.sent = _views(leaving, self._sizes[0], input)
        self._received = _views(arriving, self._sizes[1], output)

    def post(self) -> "Swap":
        """Start it."""
        sent, received = self._sizes
        self._pending = self._side.exchange(self._output, self._input, received, sent)
        return self

    def wait(self) -> list[Tensor]:
        """What arrived; nothing if it was never posted."""
        if self._pending is not None:
            self._pending.wait()
        return self._received


def _totals(slots: Slots, size: int) -> list[int]:
    """Bytes per rank."""
    return [sum(count for rank, count in slots if rank == peer) for peer in range(size)]


def _views(slots: Slots, totals: Sequence[int], buffer: Tensor) -> list[Tensor]:
    """The vectors of `slots` in a buffer that is ordered by rank."""
    at = list(accumulate(totals, initial=0))
    found = []
    for rank, count in slots:
        found.append(buffer[at[rank] : at[rank] + count])
        at[rank] += count
    return found


class ParityStream:
    """The rounds of one generation on one rank, see [Note: rounds].

    Args:
        stripes: all of the generation, the same on every rank.
        ranks: holder -> rank.
        me: this holder.
        chunk: bytes, a multiple of 64.
    """

    def __init__(
        self, stripes: Sequence[Stripe], ranks: Mapping[int, int], me: int, chunk: int = CHUNK
    ) -> None:
        self._ranks, self._chunk = ranks, chunk
        self.units: list[Unit] = []
        self.bytes = 0  # of all units
        for stripe in stripes:
            if me in stripe.parity:
                self.units.append(Unit(stripe, stripe.parity.index(me), self.bytes))
                self.bytes += stripe.length
        self._encoded = [unit for unit in self.units if unit.row == 0]
        self._taken = [unit for unit in self.units if unit.row > 0]
        self._given = [(s.parity[0], p) for s in stripes for p in s.data if p.holder == me]
        self.rounds = -(-max((stripe.length for stripe in stripes), default=0) // chunk)
        self._ships = any(len(stripe.parity) > 1 for stripe in stripes)
        self._buffers: dict[str, Tensor] = {}

    def post(self, side: Communicator, stream: Stream) -> Swap:
        """The data of round 0 on their way: what `run` begins with."""
        return self._data(side, stream, 0)

    def run(self, side: Communicator, stream: Stream, home: Tensor, data: Swap) -> list[int]:
        """Exchange and encode one step; every rank of the generation calls this.

        Args:
            side: a group that nothing else uses meanwhile.
            home: uint8 [bytes] of host memory; receives `units`.
            data: what `post` returned.
        Returns:
            xxh3-64 of each unit.
        Raises:
            GenerationChanged, PeerLost: `home` is not whole and never will be.
        """
        sums = {unit.offset: xxhash.xxh3_64() for unit in self.units}

        def keep(units: Iterable[Unit], index: int, rows: Iterable[Tensor]) -> None:
            for unit, row in zip(units, rows, strict=True):
                part = self._part(home, unit, index)
                if part.data_ptr() != row.data_ptr():
                    part.copy_(row)
                sums[unit.offset].update(part.numpy().data)

        rows: Swap | None = None
        for index in range(self.rounds):
            units = data.wait()
            if index + 1 < self.rounds:
                data = self._data(side, stream, index + 1)
            if rows is not None:
                keep(self._taken, index - 1, rows.wait())
            rows = self._rows(side, index)
            keep(self._encoded, index, self._encode(home, index, units, rows.sent))
            if self._ships:
                rows.post()
        if rows is not None:
            keep(self._taken, self.rounds - 1, rows.wait())
        return [digest.intdigest() for digest in sums.values()]

    def _data(self, side: Communicator, stream: Stream, index: int) -> Swap:
        """Send this rank's data of a round; the encoder receives them stripe by stripe."""
        size = self._left
        leaving = [(self._ranks[to], _aligned(size(_bytes(p), index))) for to, p in self._given]
        arriving = [
            (self._ranks[piece.holder], _aligned(size(_bytes(piece), index)))
            for unit in self._encoded
            for piece in unit.stripe.data
        ]
        input = self._buffer("data leaving", leaving, side.device)
        output = self._buffer(f"data arriving {index % 2}", arriving, side.device)
        swap = Swap(side, leaving, arriving, input, output)
        for (_, piece), vector in zip(self._given, swap.sent, strict=True):
            start, count = piece.start + index * self._chunk, size(_bytes(piece), index)
            if count:
                torch.cat(list(stream.cut(start, start + count)), out=vector[:count])
            vector[count:].zero_()
        return swap.post()

    def _rows(self, side: Communicator, index: int) -> Swap:
        """Rows 1 to m - 1 of a round, from encoders to holders; not posted yet."""
        leaving = [
            (self._ranks[holder], self._left(unit.stripe.length, index))
            for unit in self._encoded
            for holder in unit.stripe.parity[1:]
        ]
        arriving = [
            (self._ranks[unit.stripe.parity[0]], self._left(unit.stripe.length, index))
            for unit in self._taken
        ]
        input = self._buffer("rows leaving", leaving, side.device)
        output = self._buffer("rows arriving", arriving, side.device)
        return Swap(side, leaving, arriving, input, output)

    def _encode(
        self, home: Tensor, index: int, units: Sequence[Tensor], shipped: Sequence[Tensor]
    ) -> list[Tensor]:
        """Fill the rows that are shipped; returns the first row of every stripe."""
        data, others, found = iter(units), iter(shipped), []
        for unit in self._encoded:
            stripe, first = unit.stripe, self._part(home, unit, index)
            inputs = [next(data) for _ in stripe.data]
            if inputs[0].device != first.device:
                first = torch.empty_like(first, device=inputs[0].device)
            rows = [first, *(next(others) for _ in stripe.parity[1:])]
            if first.numel():
                _encode(inputs, rows)
            found.append(first)
        return found

    def _left(self, size: int, index: int) -> int:
        """Bytes of a round of a unit or piece of `size` bytes."""
        return max(0, min(self._chunk, size - index * self._chunk))

    def _part(self, home: Tensor, unit: Unit, index: int) -> Tensor:
        begin = unit.offset + index * self._chunk
        return home[begin : begin + self._left(unit.stripe.length, index)]

    def _buffer(self, name: str, slots: Slots, device: torch.device) -> Tensor:
        """A buffer that the first round, the largest, has sized."""
        if name not in self._buffers:
            size = sum(count for _, count in slots)
            self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffers[name]


def _encode(inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Where they are: from a device only parity comes down."""
    if rows[0].is_cuda:
        DeviceCode(len(inputs), len(rows)).encode(inputs, rows)
    else:
        data, parity = ([unit.numpy() for unit in units] for units in (inputs, rows))
        Code(len(inputs), len(rows)).encode(data, parity)


def _bytes(piece: Piece) -> int:
    return piece.stop - piece.start


def _aligned(size: int) -> int:
    """Vectors are padded with zeros to whole cache lines, as the code likes its units."""
    return -(-size // ALIGN) * ALIGN
