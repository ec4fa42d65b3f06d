"""The outer optimization of one island, as one rank of it sees it (Streaming DiLoCo).

It is a part of the step's transaction: what is sent and what is applied belongs to a step like the
inner update, so a rank that is lost is rebuilt with it, and a step that is made again sends and
applies the same. Other islands are waited for in one place, `_decided`, as `closing` says.
"""

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor

from outlast.checkpoint.records import SlotRecord
from outlast.cluster.errors import OutlastError
from outlast.layout.fragments import Rounds, fragments
from outlast.layout.run import Run
from outlast.runtime.collectives import Communicator
from outlast.runtime.islands.closing import Round, verdict
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.courier import Courier
from outlast.runtime.islands.exchange import Exchange
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import DONE, TRAINING, Neighbours, Place
from outlast.runtime.islands.outer_optimizer import PSEUDOGRADIENT, OuterOptimizer
from outlast.runtime.islands.settings import Islands
from outlast.runtime.link import Generation

if TYPE_CHECKING:
    from outlast.runtime.training import Training

Live = dict[str, list[Tensor]]


class Astray(OutlastError):
    """This island has to take another one's state before it goes on."""


class Outer:
    """What an island exchanges with others.

    Args:
        model: name of the parameters that the script made.
    """

    def __init__(self, training: "Training", settings: Islands, model: str) -> None:
        self._training, identity = training, training.link.identity
        self.island, self.islands = identity.island or 0, max(1, identity.islands)
        self.settings, self._space = settings, training.model.space
        self.fragments = fragments(self._space, settings.fragment, settings.order)
        count, grain = len(self.fragments), training.settings.grain
        self.rounds = Rounds(settings.every, count)
        self._delays, self._mixings = settings.delays(self.island, count), settings.mixings(count)
        made = codec(settings.codec, grain)
        self._optimizer = OuterOptimizer(settings, made, training.primary, grain)
        self.inbox = Inbox(made, [each.runs for each in self.fragments], self.islands)
        self.neighbours = Neighbours(
            self._space.numel, self._say, self.inbox.clear, self.inbox.changed
        )
        timing, key = identity.timing, identity.island_key
        self.exchange = Exchange(identity.island_host, key, self.inbox.put, timing)
        self.courier = Courier(self.island, made, self.neighbours, self.exchange)
        self.initial = self.facts = self._next = Facts.initial(count, model[:16])
        self.astray = False  # a peer's state has to be taken before the next step
        self._absent: set[int] = set()  # in reach, and not waited for
        self._due_since: dict[str, float] = {}
        self._waited_s = 0.0
        self._of: list[int] = []  # fragment of every owned run
        self._units: list[int] = []
        self._given: set[str] = set()
        training.link.follow_islands(self.neighbours.heard, self.neighbours.reached)

    @property
    def _communicator(self) -> Communicator:
        return self._generation.communicator

    def _say(self, message: dict[str, Any]) -> None:
        self._training.link.send(kind="islands", message=message)

    def leaf(self, leaf: int) -> int:
        """Number of a leaf among those of all islands, which read different samples."""
        return self.island * self._training.settings.leaves + leaf

    # ---- a generation

    def enter(self, generation: Generation, facts: Mapping[str, Any]) -> None:
        """Go on in a generation, from the facts of a record, with the runs that are owned now."""
        self._generation = generation
        self.facts = self._next = Facts.from_json(facts) if facts else self.initial
        self._due_since.clear()
        home = {unit: p for p, fragment in enumerate(self.fragments) for unit in fragment.units}
        units = [i for i, unit in enumerate(self._space.units) if unit.numel]
        edges = [self._space.units[i].start for i in units]
        runs = self._training.state.runs
        self._units = [units[bisect_right(edges, run.start) - 1] for run in runs]
        self._of = [home[unit] for unit in self._units]
        state = self._training.state
        self.tell(generation, TRAINING, state.step, state.owned)

    def tell(self, generation: Generation, state: str, step: int, owned: Sequence[Run]) -> None:
        """Say where this rank is, and how far."""
        agents = "".join(generation.view.agents).encode()
        team = f"{generation.view.generation}-{sha256(agents).hexdigest()[:8]}"
        holder, size = self._training.link.identity.holder, generation.communicator.size
        began, versions = self.facts.began, tuple(each.name for each in self.facts.versions)
        address = self.exchange.address
        self.neighbours.here(
            Place(holder, team, size, address, tuple(owned), step, state, began, versions)
        )

    # ---- a step

    def say(self, step: int) -> dict[str, Any]:
        """This rank's word on the rounds that are on their way when `step` steps will be done."""
        self.courier.bring(
            self.facts,
            self._training.state.live(PSEUDOGRADIENT),
            self._training.state.runs,
            self._of,
        )
        rounds = {at.key: self._vote(at) for at in self._pending(step)}
        return {"rounds": rounds, "sent": self.exchange.sent_bytes, "asks": self._asks()}

    def _pending(self, step: int) -> list[Round]:
        flying = [*self.rounds.flying(step - 1, self._delays), *self.rounds.due(step, self._delays)]
        return [self._round(p, sent) for p, sent in dict.fromkeys(flying)]

    def _round(self, fragment: int, step: int) -> Round:
        facts = self._next
        sent = facts.sent[fragment]
        return Round(fragment, step, facts.versions[fragment], sent is not None and sent[0] == step)

    def _vote(self, at: Round) -> dict[str, Any]:
        runs = self._runs(at.fragment)
        others = [j for j in range(self.islands) if j != self.island]
        whole = [j for j in others if runs and self.inbox.covers(at.fragment, at.step, j, runs)]
        have = {str(j): self.inbox.base(at.fragment, at.step, j) for j in whole}
        vote: dict[str, Any] = {
            "have": have if runs else None,
            "closing": self.neighbours.closings.get((at.fragment, at.step)),
        }
        if self._communicator.rank == 0:
            vote |= self._watch(at, whole)
        return vote

    def _watch(self, at: Round, whole: Sequence[int]) -> dict[str, Any]:
        """What rank 0 adds to its vote: whom to wait for, and for how long."""
        self._absent -= set(whole)
        reach = self.neighbours.reach
        there = {j: p for j, p in self.neighbours.training().items() if j not in self._absent}
        waited_s = time.monotonic() - self._due_since.get(at.key, inf)
        leader = min([self.island, *there])
        if leader != self.island and waited_s > 2 * self.settings.patience_s:
            self._absent.add(leader)  # it would have closed the round by now
            del there[leader]
        others = [j for j in range(self.islands) if j != self.island]
        return {
            "there": {str(j): place.began for j, place in there.items()},
            "lost": [j for j in others
                     if j not in reach or self.inbox.newest(at.fragment, j) > at.step],
            "late": waited_s > self.settings.patience_s,
        }  # fmt: skip

    def _runs(self, fragment: int) -> list[Run]:
        runs = self._training.state.runs
        return [run for run, of in zip(runs, self._of, strict=True) if of == fragment]

    def advance(self, live: Live, step: int, heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The outer part of the step that makes `step` steps, on the opened half.

        Returns:
            the facts for its record.
        Raises:
            Astray: on all ranks: another island knows better.
            GenerationChanged, PeerLost: a rank was lost meanwhile.
        """
        self._next = self.facts
        for fragment in self.rounds.sent(step):
            if step > self.facts.began:
                self._optimizer.send(live, self._chosen(fragment))
                self._next = self._next.sending(fragment, step)
        runs = self._training.state.runs
        self.courier.bring(self._next, live[PSEUDOGRADIENT], runs, self._of)
        votes = [head["outer"]["rounds"] for head in heads]
        due = self.rounds.due(step, self._delays)
        for at in self._pending(step):
            if (at.fragment, at.step) not in due and at.key in votes[0]:
                self._heed(at, [vote[at.key] for vote in votes])
        for fragment, sent in due:
            at = self._round(fragment, sent)
            self._apply(live, at, step, self._decided(at, step, votes, live))
        return self._next.as_json()

    def committed(self, record: SlotRecord, heads: Sequence[Mapping[str, Any]]) -> None:
        """The step of the last `advance` is committed: hand it to every island that has asked all
        ranks for it."""
        changed, self.facts = self._next.versions != self.facts.versions, self._next
        if changed:
            state = self._training.state
            self.tell(self._generation, TRAINING, state.step, state.owned)
        for name in sorted(set.intersection(*(set(head["outer"]["asks"]) for head in heads))):
            self._give(name, record)

    def _chosen(self, fragment: int) -> list[int]:
        return [i for i, of in enumerate(self._of) if of == fragment]

    def _decided(
        self, at: Round, step: int, votes: Sequence[Mapping[str, Any]], live: Live
    ) -> tuple[int, ...]:
        """Wait until it is known who counts in a round, and until all that counts is here."""
        began = self._due_since[at.key] = time.monotonic()
        communicator, training = self._communicator, self._training
        words = [vote.get(at.key) for vote in votes]
        while True:
            if None not in words:
                islands = self._heed(at, [word for word in words if word is not None])
                if islands is not None:
                    break
            with self.inbox.changed:
                self.inbox.changed.wait(training.link.identity.timing.poll_s)
            self.courier.bring(self._next, live[PSEUDOGRADIENT], training.state.runs, self._of)
            words = communicator.gather_json(self._vote(at))
        del self._due_since[at.key]
        self._waited_s = time.monotonic() - began
        return islands

    def _heed(self, at: Round, votes: Sequence[Mapping[str, Any]]) -> tuple[int, ...] | None:
        """Do what follows from the votes on a round; whose contributions count, once known."""
        found = verdict(at, votes, self.island)
        first = self._communicator.rank == 0
        if found.astray is not None:
            self.astray = True
            if first:
                self._tell("island_forked", fragment=at.fragment, step=at.step, donor=found.astray)
            raise Astray(f"fragment {at.fragment} of step {at.step}: island {found.astray}")
        if found.closed and found.islands is not None:
            closing = {
                "base": at.base.name, "by": self.island, "islands": list(found.islands),
            }  # fmt: skip
            if first:
                self.neighbours.close(at.fragment, at.step, closing)
            self.neighbours.closings[at.fragment, at.step] = closing
            self._absent |= set(found.missed)
            for island in found.missed if first else ():
                self._tell("island_missed", island=island, fragment=at.fragment, step=at.step)
        return found.islands

    def _apply(self, live: Live, at: Round, step: int, islands: tuple[int, ...]) -> None:
        fragment, chosen = at.fragment, self._chosen(at.fragment)
        runs, facts = self._runs(fragment), self._next
        told: dict[str, Any] = {}
        guard = facts.guard
        if islands:
            vectors = {
                j: [live[PSEUDOGRADIENT][i] for i in chosen]
                if j == self.island
                else self.inbox.codes(fragment, at.step, j, runs)
                for j in islands
            }
            average, guard, told = self._optimizer.average(
                vectors, runs, [self._units[i] for i in chosen], guard,
                self._communicator.gather_bytes,
            )  # fmt: skip
            self._optimizer.apply(live, chosen, average, self._mixings[fragment])
        version = facts.versions[fragment].after(at.step, islands)
        self._next = facts.applied(fragment, version, guard)
        if self._communicator.rank == 0:
            self._tell(
                "outer", fragment=fragment, step=step, sent=at.step, islands=list(islands),
                waited_s=round(self._waited_s, 4), bytes=self.exchange.sent_bytes,
                version=version.name, **({"guard": told} if told else {}),
            )  # fmt: skip

    def _tell(self, event: str, **facts: Any) -> None:
        self._training.link.send(kind="event", event=event, **facts)

    # ---- islands that come

    def _asks(self) -> list[str]:
        """Whom this rank could hand its state now: all ranks of the other island are known."""
        asks = self.neighbours.asks.items()
        return [name for name, (island, size) in asks
                if name.split("-")[1] == str(self.island) and name not in self._given
                and len(self.neighbours.places(island)) == size]  # fmt: skip

    def _give(self, name: str, record: SlotRecord) -> None:
        self._given.add(name)
        island, _ = self.neighbours.asks[name]
        state = self._training.state
        roles = {role.name: state.live(role.name) for role in state.roles}
        facts = {"step": record.step, "scalars": record.scalars, "losses": list(record.losses),
                 "outer": record.outer}  # fmt: skip
        self.courier.hand_over(name, island, roles, state.runs, facts)
        if self._communicator.rank == 0:
            self._tell("island_served", island=island, step=record.step)

    def finish(self) -> None:
        """The last step is done: what others may wait for goes out before this island goes."""
        state = self._training.state
        self.tell(self._generation, DONE, state.step, state.owned)
        timing, end = self._training.link.identity.timing, time.monotonic()
        end += self.settings.patience_s
        while not self.exchange.flush(timing.tick_s) and time.monotonic() < end:
            self._training.check()
            there = self.neighbours.training()
            self.exchange.keep(p.address for j in there for p in self.neighbours.places(j))

    def close(self) -> None:
        """End the connections."""
        self.exchange.close()
