"""Whose contributions count in a round: the ranks of one island agree, and wait for other islands.

All ranks see the same votes and draw the same conclusion, see `closing`. What differs from rank to
rank, who is in reach and how long it has taken, rank 0 observes for all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Protocol

from torch import Tensor

from outlast.cluster.errors import OutlastError
from outlast.layout.run import Run
from outlast.runtime.collectives import Communicator
from outlast.runtime.islands.closing import Round, verdict
from outlast.runtime.islands.codec import Codec
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import WAITING, Neighbours
from outlast.runtime.islands.replay import Replay
from outlast.runtime.islands.settings import Islands

Vote = dict[str, Any]
Tell = Callable[..., None]


class Astray(OutlastError):
    """This island has to take another one's state before it goes on."""


class Contributions(Protocol):
    """Where the contributions of a round come from."""

    waited_s: float

    def enter(self, communicator: Communicator) -> None:
        """A new generation."""

    def vote(self, at: Round, runs: Sequence[Run]) -> Vote:
        """This rank's word on a round of which it owns `runs`."""

    def heed(self, at: Round, votes: Sequence[Vote]) -> tuple[int, ...] | None:
        """Do what follows from the votes of all ranks; whose contributions count, once known.

        Raises:
            Astray: on all ranks.
        """

    def decided(
        self, at: Round, runs: Sequence[Run], votes: Sequence[Vote], tend: Callable[[], None]
    ) -> tuple[int, ...]:
        """Wait until it is known who counts, and until all that counts is here.

        Args:
            votes: of all ranks, if they were gathered already.
            tend: to be called meanwhile.
        """

    def contribution(self, at: Round, island: int, runs: Sequence[Run]) -> list[Tensor]:
        """What an island that counts has sent, decoded, float32 [n] for each of `runs`."""


class Council:
    """The contributions of islands that train now.

    Args:
        me: number of this island, of `islands`.
        tell: writes to the event log.
        poll_s: slices of a wait.
    """

    def __init__(
        self, me: int, settings: Islands, neighbours: Neighbours, inbox: Inbox, tell: Tell,
        poll_s: float,
    ) -> None:  # fmt: skip
        self._me, self._every, self._patience_s = me, settings.every, settings.patience_s
        self._neighbours, self._inbox, self._tell, self._poll_s = neighbours, inbox, tell, poll_s
        self.waited_s = 0.0
        self._absent: dict[int, int] = {}  # in reach, not waited for: island -> when it began
        self._due_since: dict[str, float] = {}

    def enter(self, communicator: Communicator) -> None:
        """See `Contributions`."""
        self._communicator = communicator
        self._due_since.clear()

    def vote(self, at: Round, runs: Sequence[Run]) -> Vote:
        """See `Contributions`."""
        others = self._neighbours.others
        whole = [j for j in others if runs and self._inbox.covers(at.fragment, at.step, j, runs)]
        have = {str(j): self._inbox.base(at.fragment, at.step, j) for j in whole}
        vote: Vote = {
            "have": have if runs else None,
            "closing": self._neighbours.closings.get((at.fragment, at.step, at.base.name)),
        }
        return vote | (self._watch(at) if self._communicator.rank == 0 else {})

    def _watch(self, at: Round) -> Vote:
        """What rank 0 adds to its vote: whom to wait for, and for how long."""
        reach, others = self._neighbours.reach, self._neighbours.others
        partners = self._neighbours.partners(self._every)
        # Who has entered anew since is waited for again.
        self._absent = {
            j: began for j, began in self._absent.items()
            if j not in partners or partners[j].began == began
        }  # fmt: skip
        there = {j: place for j, place in partners.items() if j not in self._absent}
        # They have nothing of this round: they take another's state, or have just done so.
        anew = {j for j in self._neighbours.newest(WAITING) if j not in partners}
        anew |= {j for j, place in partners.items() if place.began >= at.step}
        waited_s = time.monotonic() - self._due_since.get(at.key, inf)
        if waited_s > 2 * self._patience_s:  # the lower ones would have closed the round by now
            self._absent |= {j: place.began for j, place in there.items() if j < self._me}
            there = {j: place for j, place in there.items() if j > self._me}
        return {
            "there": {str(j): place.began for j, place in there.items()},
            "lost": [j for j in others if j not in reach or j in anew
                     or self._inbox.newest(at.fragment, j) > at.step],
            "late": waited_s > self._patience_s,
        }  # fmt: skip

    def heed(self, at: Round, votes: Sequence[Vote]) -> tuple[int, ...] | None:
        """See `Contributions`."""
        found = verdict(at, votes, self._me)
        said = [vote["have"].keys() for vote in votes if vote["have"] is not None]
        for island in set(self._absent) if said else ():
            if all(str(island) in whole for whole in said):
                del self._absent[island]  # it has come in time
        place = {"fragment": at.fragment, "step": at.step}
        if found.astray is not None:
            self._tell("island_forked", **place, donor=found.astray)
            raise Astray(f"fragment {at.fragment} of step {at.step}: island {found.astray}")
        for island in found.wanted:
            self._neighbours.request(type="want", **place, island=island)
        if found.closed and found.islands is not None:
            closing = {"base": at.base.name, "by": self._me, "islands": list(found.islands)}
            first = self._communicator.rank == 0
            self._neighbours.close(at.fragment, at.step, closing, say=first)
            partners = self._neighbours.partners(self._every)
            self._absent |= {j: partners[j].began for j in found.missed if j in partners}
            for island in found.missed:
                self._tell("island_missed", island=island, **place)
        return found.islands

    def decided(
        self, at: Round, runs: Sequence[Run], votes: Sequence[Vote], tend: Callable[[], None]
    ) -> tuple[int, ...]:
        """See `Contributions`."""
        began = self._due_since[at.key] = time.monotonic()
        while True:
            if votes and (islands := self.heed(at, votes)) is not None:
                break
            with self._inbox.changed:
                self._inbox.changed.wait(self._poll_s)
            tend()
            votes = self._communicator.gather_json(self.vote(at, runs))
        del self._due_since[at.key]
        self.waited_s = time.monotonic() - began
        return islands

    def contribution(self, at: Round, island: int, runs: Sequence[Run]) -> list[Tensor]:
        """See `Contributions`."""
        return self._inbox.codes(at.fragment, at.step, island, runs)


class Record:
    """The contributions that a `Recorder` has kept: the past, once more.

    Args:
        replay: of this island.
    """

    def __init__(self, replay: Replay, codec: Codec) -> None:
        self._replay, self._codec, self.waited_s = replay, codec, 0.0

    def enter(self, communicator: Communicator) -> None:
        """See `Contributions`."""

    def vote(self, at: Round, runs: Sequence[Run]) -> Vote:
        """See `Contributions`."""
        return {}

    def heed(self, at: Round, votes: Sequence[Vote]) -> tuple[int, ...] | None:
        """See `Contributions`."""
        return None

    def decided(
        self, at: Round, runs: Sequence[Run], votes: Sequence[Vote], tend: Callable[[], None]
    ) -> tuple[int, ...]:
        """See `Contributions`."""
        islands, _ = self._replay.round(at.fragment, at.step, runs)
        return tuple(islands)

    def contribution(self, at: Round, island: int, runs: Sequence[Run]) -> list[Tensor]:
        """See `Contributions`."""
        _, pieces = self._replay.round(at.fragment, at.step, runs)
        decode = self._codec.decode
        return [decode(codes, run.numel) for run, codes in zip(runs, pieces[island], strict=True)]


def given(votes: Sequence[Mapping[str, Any]], at: Round) -> list[Vote]:
    """What all ranks said of a round in their votes on a step; nothing if one did not."""
    found = [vote[at.key] for vote in votes if at.key in vote]
    return found if len(found) == len(votes) else []
