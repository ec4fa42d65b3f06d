"""Parity of every step, exchanged while the next step computes.

After step s is gathered, every rank sends the pieces of its stream to the encoders of their
stripes, one all-to-all that runs beside forward and backward. `finish` encodes and commits the
parity. No rank starts the next update before it has finished, and the exchange of norms that
precedes every update tells it that all others have, too: so there is always one step that every
loss within the code can be restored to."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from outlast.checkpoint.ladder import layout_stripes
from outlast.checkpoint.memory import checksum
from outlast.checkpoint.parity import Code, stream_parts
from outlast.checkpoint.records import ParityRecord, ParityUnit
from outlast.layout.layout import Layout
from outlast.layout.stripe import Piece, Stripe
from outlast.runtime.collectives import Communicator, Pending
from outlast.runtime.shard_state import ShardState


class Redundancy:
    """Parity of one generation.

    Args:
        layout: who owns what in this generation; replicated layouts need no parity.
        holders: in rank order.
        domains: failure domain of every holder.
    """

    def __init__(
        self,
        state: ShardState,
        communicator: Communicator,
        layout: Layout,
        holders: Sequence[int],
        domains: Mapping[int, str],
    ) -> None:
        self._state, self._communicator, self._layout = state, communicator, layout
        self._domains = {holder: domains[holder] for holder in holders}
        self._rank_of = {holder: rank for rank, holder in enumerate(holders)}
        self._me = holders[communicator.rank]
        self._stripes: tuple[Stripe, ...] = ()
        if len(set(self._domains.values())) > 1 and layout.is_partition(state.space.numel):
            self._stripes = layout_stripes(state.memory.shape, layout, self._domains)
        self._mine = [stripe for stripe in self._stripes if stripe.parity[0] == self._me]
        self._flight: tuple[Tensor, list[int], Pending] | None = None
        self._due = False
        self.keep: tuple[int, int] | None = None  # parity that must not be overwritten
        self.bytes = sum(stripe.length for stripe in self._mine)
        state.memory.parity.reserve(self.bytes)

    def schedule(self) -> None:
        """The newest step is due for parity."""
        self._due = bool(self._stripes)

    def start(self) -> None:
        """Begin the exchange if one is due; every rank calls this at the same place of the step."""
        if not self._due:
            return
        self._due = False
        self._state.seal()
        size = self._communicator.size
        outgoing: list[list[Tensor]] = [[] for _ in range(size)]
        for stripe in self._stripes:
            for piece in stripe.data:
                if piece.holder == self._me:
                    outgoing[self._rank_of[stripe.parity[0]]] += self._bytes(piece)
        sent = [sum(part.numel() for part in parts) for parts in outgoing]
        received = [0] * size
        for stripe in self._mine:
            for piece in stripe.data:
                received[self._rank_of[piece.holder]] += piece.stop - piece.start
        device = self._communicator.device
        flat = [part for parts in outgoing for part in parts]
        input = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
        output = torch.empty(sum(received), dtype=torch.uint8, device=device)
        pending = self._communicator.exchange(output, input, received, sent)
        self._flight = (output, received, pending)

    def _bytes(self, piece: Piece) -> list[Tensor]:
        runs = self._layout.runs(piece.holder)
        parts = stream_parts(self._state.memory.shape, runs, piece.start, piece.stop)
        return [self._state.part(role, run).view(torch.uint8) for role, run in parts]

    def finish(self) -> None:
        """Wait for the exchange, encode and commit; afterwards every older parity is superseded."""
        self.start()
        if self._flight is None:
            return
        output, received, pending = self._flight
        pending.wait()
        self._flight = None
        memory, step = self._state.memory.parity, self._state.step
        half = memory.spare(self.keep)
        memory.begin(half)
        home = memory.array(half, self.bytes)
        rows = iter(torch.split(output.cpu(), received))
        streams = {rank: row.numpy() for rank, row in enumerate(rows)}
        taken = dict.fromkeys(streams, 0)
        units, at = [], 0
        for stripe in self._mine:
            data = []
            for piece in stripe.data:
                rank, size = self._rank_of[piece.holder], piece.stop - piece.start
                data.append(streams[rank][taken[rank] : taken[rank] + size])
                taken[rank] += size
            unit = home[at : at + stripe.length]
            Code(len(data), len(stripe.parity)).encode(data, [unit])
            units.append(ParityUnit(stripe.index, 0, at, stripe.length, checksum(unit)))
            at += stripe.length
        domains = {str(holder): domain for holder, domain in self._domains.items()}
        generation = self._communicator.generation
        self.keep = (step, generation)
        record = ParityRecord(step, generation, self._layout.as_json(), domains, tuple(units))
        memory.commit(half, record)
