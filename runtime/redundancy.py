"""Parity of every step, made while the next step computes; and behind it what a save begins with.

After step s is gathered, its parity travels and is encoded in a thread of its own, over the side
group of the generation, beside forward and backward. `finish` waits for it. No rank starts the next
update before it has finished, and the exchange of norms that precedes every update tells it that
all others have, too: so there is always one step that every loss within the code can be restored
to.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from outlast.checkpoint.protection import layout_stripes
from outlast.checkpoint.records import ParityRecord, ParityUnit, Protection
from outlast.cluster.errors import GenerationChanged, PeerLost
from outlast.cluster.failpoint import reach
from outlast.layout.layout import Layout
from outlast.layout.stripe import Stripe
from outlast.runtime.collectives import Communicator
from outlast.runtime.link import Generation
from outlast.runtime.parity_stream import ParityStream, Stream, Swap
from outlast.runtime.shard_state import ShardState


class Redundancy:
    """Parity of one generation.

    Args:
        layout: who owns what in this generation; replicated layouts need no parity.
    """

    def __init__(
        self, state: ShardState, generation: Generation, layout: Layout, protection: Protection
    ) -> None:
        self._state, self._generation = state, generation
        names = {str(holder): domain for holder, domain in generation.domains.items()}
        number = generation.view.generation
        self._record = ParityRecord(-1, number, layout.as_json(), names, protection, ())
        stripes: tuple[Stripe, ...] = ()
        if layout.is_partition(state.space.numel):
            shape, domains = state.memory.shape, generation.domains
            stripes = layout_stripes(shape, layout, domains, protection)
        holders = [holder for holder, _ in generation.nodes]
        ranks = {holder: rank for rank, holder in enumerate(holders)}
        self._rounds = ParityStream(stripes, ranks, holders[generation.communicator.rank])
        self._worker: threading.Thread | None = None
        self._failure: GenerationChanged | PeerLost | None = None
        self._due = (-1, -1)  # (step, generation) of the parity that was started last
        self.keep: tuple[int, int] | None = None  # parity that must not be overwritten
        state.memory.parity.reserve(self._rounds.bytes)

    def start(self, then: Callable[[Callable[[], Communicator]], None] | None = None) -> None:
        """Begin the parity of the newest step; every rank does.

        Args:
            then: called behind it, over the same side group, with what waits for that.
        Raises:
            GenerationChanged, PeerLost: it never will be whole.
        """
        if not self._rounds.rounds and then is None:
            return
        if self._rounds.rounds:
            self._due = self._state.step, self._generation.view.generation
        stream = Stream(part for role in self._state.roles for part in self._state.live(role.name))
        # As early as can be: a loss before the parity is whole goes back one step. A thread that
        # has just started would wait for a busy processor before it posts anything.
        side, first = self._generation.side, None
        if self._rounds.rounds and side.done():
            first = self._rounds.post(side.result(), stream)
        self._worker = threading.Thread(
            target=self._run,
            args=(self._state.beside(), stream, first, then),
            name="outlast-parity",
            daemon=True,
        )
        self._worker.start()

    def finish(self) -> None:
        """Wait until the parity of the newest step is committed, and what comes behind it is done.

        Raises:
            GenerationChanged, PeerLost: it never will be.
        """
        self.stop()
        if self._failure is not None:
            raise self._failure
        assert self._due in (self.keep, (-1, -1)), "the thread of parity died, see above"

    def stop(self) -> None:
        """Wait until nothing is written any more; an interrupted exchange ends at once."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _run(
        self,
        beside: AbstractContextManager[object],
        stream: Stream,
        first: Swap | None,
        then: Callable[[Callable[[], Communicator]], None] | None,
    ) -> None:
        try:
            with beside:
                if self._rounds.rounds:
                    self._protect(stream, first)
                if then is not None:
                    then(self._generation.side.result)
        except (GenerationChanged, PeerLost) as cause:
            self._failure = cause

    def _protect(self, stream: Stream, first: Swap | None) -> None:
        """Commit the parity of the newest step; afterwards older parity is superseded."""
        side = self._generation.side.result()
        if first is None:
            first = self._rounds.post(side, stream)
        self._state.seal()
        memory = self._state.memory.parity
        half = memory.spare(self.keep)
        memory.begin(half)
        reach("encode", step=self._due[0] - 1)
        home = torch.from_numpy(memory.array(half, self._rounds.bytes))
        sums = self._rounds.run(side, stream, home, first)
        if side.interrupted:
            # Aborted NCCL kernels "complete": what they brought is known to be whole only now.
            raise GenerationChanged("interrupted in an exchange of parity")
        units = tuple(
            ParityUnit(unit.stripe.index, unit.row, unit.offset, unit.stripe.length, sum_)
            for unit, sum_ in zip(self._rounds.units, sums, strict=True)
        )
        self.keep = self._due
        memory.commit(half, replace(self._record, step=self._due[0], units=units))
