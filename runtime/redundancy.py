"""Parity of every step, made while the next step computes.

After step s is gathered, every rank sends the pieces of its stream to the encoders of their
stripes: one all-to-all that runs beside forward and backward, as do encoding and commit. `finish`
waits for them. No rank starts the next update before it has finished, and the exchange of norms
that precedes every update tells it that all others have, too: so there is always one step that
every loss within the code can be restored to.
"""

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from outlast.checkpoint.code import Code
from outlast.checkpoint.memory import checksum
from outlast.checkpoint.protection import layout_stripes
from outlast.checkpoint.records import ParityRecord, ParityUnit, Protection
from outlast.checkpoint.stream import stream_parts
from outlast.cluster.errors import GenerationChanged, PeerLost
from outlast.cluster.failpoint import reach
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
            self._stripes = layout_stripes(
                state.memory.shape, layout, self._domains, Protection()
            )
        self._mine = [stripe for stripe in self._stripes if stripe.parity[0] == self._me]
        self._worker: threading.Thread | None = None
        self._failure: GenerationChanged | PeerLost | None = None
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
        # A thread of its own, so that the parity is whole as early as can be: a loss before that
        # goes back one step.
        self._worker = threading.Thread(
            target=self._complete,
            args=(output, received, pending, self._state.step),
            name="outlast-parity",
            daemon=True,
        )
        self._worker.start()

    def _bytes(self, piece: Piece) -> list[Tensor]:
        runs = self._layout.runs(piece.holder)
        parts = stream_parts(self._state.memory.shape, runs, piece.start, piece.stop)
        return [self._state.part(role, run).view(torch.uint8) for role, run in parts]

    def finish(self) -> None:
        """Wait until the parity of the newest step is committed.

        Raises:
            GenerationChanged, PeerLost: it never will be.
        """
        self.start()
        self.stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Wait until nothing is written any more; an interrupted exchange ends at once."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _complete(self, output: Tensor, received: list[int], pending: Pending, step: int) -> None:
        try:
            pending.wait()
        except (GenerationChanged, PeerLost) as cause:
            self._failure = cause
        else:
            self._encode(torch.split(output.cpu(), received), step)

    def _encode(self, rows: Sequence[Tensor], step: int) -> None:
        """Commit the parity of what arrived, by rank; afterwards older parity is superseded."""
        memory = self._state.memory.parity
        half = memory.spare(self.keep)
        memory.begin(half)
        reach("encode", step=step - 1)
        home = memory.array(half, self.bytes)
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
        layout = self._layout.as_json()
        record = ParityRecord(step, generation, layout, domains, Protection(), tuple(units))
        memory.commit(half, record)
