"""The outer optimization of one island, as one rank of it sees it (Streaming DiLoCo).

It is a part of the step's transaction: what is sent and what is applied belongs to a step like the
inner update, so a rank that is lost is rebuilt with it, and a step that is made again sends and
applies the same. Other islands are waited for in one place, `Council.decided`.
"""

import re
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from outlast.checkpoint.records import SlotRecord
from outlast.cluster.errors import Misuse
from outlast.layout.fragments import Rounds, fragments
from outlast.layout.run import Run
from outlast.runtime.collectives import Communicator
from outlast.runtime.islands.closing import Round
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.council import (
    Astray,
    Contributions,
    Council,
    Record,
    Vote,
    given,
)
from outlast.runtime.islands.courier import Courier
from outlast.runtime.islands.exchange import Exchange
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import DONE, TRAINING, Neighbours, Place
from outlast.runtime.islands.outer_optimizer import PSEUDOGRADIENT, OuterOptimizer, taken_roles
from outlast.runtime.islands.replay import Recorder, Replay
from outlast.runtime.islands.settings import Islands
from outlast.runtime.islands.shares import Shares
from outlast.runtime.link import Generation

if TYPE_CHECKING:
    from outlast.runtime.training import Training

Live = dict[str, list[Tensor]]

PARDONED = 1  # rounds in a row without this island, after which it is better off at the front


class Outer:
    """What an island exchanges with others.

    Args:
        model: name of the parameters that the script made.
    """

    def __init__(self, training: "Training", settings: Islands, model: str) -> None:
        self._training, identity = training, training.link.identity
        self.island, self.islands = identity.island or 0, identity.islands
        if settings.replay:
            self.island, self.islands = _recorded(settings.replay)
        self.settings, self._space = settings, training.model.space
        self.fragments = fragments(self._space, settings.fragment, settings.order)
        count, grain = len(self.fragments), training.settings.grain
        self.rounds = Rounds(settings.every, count)
        self.delays = settings.delays(self.island, count, self.islands)
        self._mixings = settings.mixings(count)
        made = self._codec = codec(settings.codec, grain)
        self._optimizer = OuterOptimizer(settings, made, training.primary, grain)
        self.inbox = Inbox(made, [each.runs for each in self.fragments], self.islands)
        self.neighbours = Neighbours(
            self._space.numel,
            [island for island in range(self.islands) if island != self.island],
            lambda message: training.link.send(kind="islands", message=message),
            lambda island, step: self._anew.append((island, step)),
            self.inbox.changed,
        )
        timing, key = identity.timing, identity.island_key
        self.exchange = Exchange(identity.island_host, key, self.inbox.put, timing)
        self.courier = Courier(self.island, made, self.neighbours, self.exchange)
        self.council: Contributions = Council(
            self.island, settings, self.neighbours, self.inbox, self._tell, timing.poll_s
        )
        self._recorder: Recorder | None = None
        if settings.record:
            name = f"island{self.island}of{self.islands}"
            self._recorder = Recorder(Path(settings.record) / name)
        if settings.replay:
            self.council = Record(Replay(Path(settings.replay), made), made)
        shared = training.settings
        self.common = settings.common(f"{model} {shared.seed} {shared.leaves} {shared.grain}")
        self.facts = self._next = Facts.initial(self.rounds, self.common)
        self._anew: deque[tuple[int, int]] = deque()  # islands that go on with another state
        self._done = False
        self.astray = False  # a peer's state has to be taken before the next step
        training.link.follow_islands(self.neighbours.heard, self.neighbours.reached)

    @property
    def _communicator(self) -> Communicator:
        return self._generation.communicator

    # ---- a generation

    def enter(self, generation: Generation, facts: Mapping[str, Any]) -> None:
        """Go on in a generation, from the facts of a record, with the runs that are owned now."""
        self._generation = generation
        state = self._training.state
        self.facts = self._next = Facts.of(facts, state.step, self.rounds, self.common)
        self.council.enter(generation.communicator)
        self.courier.enter()
        self.shares = Shares(self._space, self.fragments, state.runs)
        self.tell(generation, TRAINING, state.step, state.owned)

    def tell(self, generation: Generation, state: str, step: int, owned: Sequence[Run]) -> None:
        """Say where this rank is, and how far."""
        agents = "".join(generation.view.agents).encode()
        team = f"{generation.view.generation}-{sha256(agents).hexdigest()[:8]}"
        holder, size = self._training.link.identity.holder, generation.communicator.size
        began = self.facts.began
        versions = () if self.astray else tuple(each.name for each in self.facts.versions)
        self.neighbours.here(Place(
            holder, team, size, self.exchange.address, tuple(owned), step, state, began, versions,
            self.common,
        ))  # fmt: skip

    # ---- a step

    def say(self, step: int) -> dict[str, Any]:
        """This rank's word on the rounds that are on their way when `step` steps will be done."""
        self._tend(self._training.state.live(PSEUDOGRADIENT))
        for refused in (self.inbox.refused, self.neighbours.refused):
            while refused:
                cause = refused.popleft()
                self._training.link.send(kind="event", event="island_refused", cause=cause)
        pending = self._pending(step)
        rounds = {at.key: self.council.vote(at, self.shares.of(at.fragment)[1]) for at in pending}
        return {"rounds": rounds, "asks": self.neighbours.asking(self.island)}

    def _tend(self, values: Sequence[Tensor]) -> None:
        """What is to be done before each vote; what was voted on stays until it is used."""
        while self._anew:
            self.inbox.clear(*self._anew.popleft())
        self._bring(values)

    def _bring(self, values: Sequence[Tensor]) -> None:
        self.courier.bring(self._next, values, self.shares.runs, self.shares.fragments)
        self.courier.pass_on(self.inbox, self.shares.runs, self.shares.fragments)

    def _pending(self, step: int) -> list[Round]:
        flying = [*self.rounds.flying(step - 1, self.delays), *self.rounds.due(step, self.delays)]
        return self._open(dict.fromkeys(flying))

    def _open(self, rounds: Iterable[tuple[int, int]]) -> list[Round]:
        """Those of the rounds that are not in the state yet: who enters may be ahead with some."""
        facts = self._next
        return [
            Round(p, step, facts.versions[p], (facts.sent[p] or (-1,))[0] == step)
            for p, step in rounds if step > facts.applied[p]
        ]  # fmt: skip

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
                self._optimizer.send(live, self.shares.of(fragment)[0])
                self._next = self._next.sending(fragment, step)
        self._bring(live[PSEUDOGRADIENT])
        votes = [head["outer"]["rounds"] for head in heads]
        due = self._open(self.rounds.due(step, self.delays))
        try:
            for at in self._pending(step):
                if at not in due and (said := given(votes, at)):
                    self.council.heed(at, said)
            for at in due:
                self._apply(live, at, step, given(votes, at))
        except Astray:
            self.astray = True
            raise
        return self._next.as_json()

    def _apply(self, live: Live, at: Round, step: int, votes: Sequence[Vote]) -> None:
        fragment, (_, runs) = at.fragment, self.shares.of(at.fragment)
        tend = partial(self._tend, live[PSEUDOGRADIENT])
        islands = self.council.decided(at, runs, votes, tend)
        missed = at.contributed and self.island not in islands and not self.settings.replay
        if missed and self._next.missed == PARDONED:
            self._tell("island_behind", fragment=fragment, step=step)
            raise Astray(f"fragment {fragment} of step {at.step}: nobody waits for this island")
        self._next = replace(self._next, missed=self._next.missed + 1 if missed else 0)
        self._next, told = self.merge(
            live, self.shares, at, islands, self._next, self._communicator
        )
        self._tell(
            "outer", fragment=fragment, step=step, sent=at.step, islands=list(islands),
            waited_s=round(self.council.waited_s, 4), bytes=self.exchange.sent_bytes,
            version=self._next.versions[fragment].name, **({"guard": told} if told else {}),
        )  # fmt: skip

    def merge(
        self, live: Live, shares: Shares, at: Round, islands: Sequence[int], facts: Facts,
        group: Communicator,
    ) -> tuple[Facts, dict[str, Any]]:  # fmt: skip
        """Average what `islands` have sent, make the outer step, and merge it into the parameters.

        Args:
            live: role -> a view of every run of `shares`.
        Returns:
            the facts afterwards, and what the averaging rule has to tell.
        """
        fragment, (chosen, runs) = at.fragment, shares.of(at.fragment)
        homes = [live[PSEUDOGRADIENT][i].device for i in chosen]
        vectors = {
            j: [*map(Tensor.to, self.council.contribution(at, j, runs), homes)]
            for j in islands if j != self.island or not at.contributed
        }  # fmt: skip
        if at.contributed and self.island in islands:
            vectors[self.island] = [live[PSEUDOGRADIENT][i] for i in chosen]
        if self._recorder is not None:
            pieces = {j: [*zip(runs, map(self._codec.encode, vectors[j]), strict=True)]
                      for j in islands}  # fmt: skip
            self._recorder.keep(fragment, at.step, islands, pieces, group.rank)
        guard, told = facts.guard, dict[str, Any]()
        if islands:
            average, guard, told = self._optimizer.average(
                {j: vectors[j] for j in islands}, runs, [shares.units[i] for i in chosen], guard,
                group.gather_bytes,
            )  # fmt: skip
            self._optimizer.apply(live, chosen, average, self._mixings[fragment])
        return facts.merged(fragment, at.step, islands, guard), told

    def committed(self, record: SlotRecord, heads: Sequence[Mapping[str, Any]]) -> None:
        """The step of the last `advance` is committed: hand it to every island that has asked all
        ranks for it."""
        changed, self.facts = self._next.versions != self.facts.versions, self._next
        state = self._training.state
        if changed or self._done:
            self._done = False
            self.tell(self._generation, TRAINING, state.step, state.owned)
        for name in sorted(set.intersection(*(set(head["outer"]["asks"]) for head in heads))):
            island = self.neighbours.take_up(name)
            roles = {
                role: state.live(role) for role in taken_roles(state.roles, self._training.primary)
            }
            facts = {"step": record.step, "scalars": record.scalars,
                     "losses": list(record.losses), "outer": record.outer}  # fmt: skip
            self.courier.hand_over(name, island, roles, state.runs, facts)
            self._tell("island_served", island=island, step=record.step)

    def finish(self) -> None:
        """The last step is done: what others may wait for goes out before this island goes."""
        state, timing = self._training.state, self._training.link.identity.timing
        self._done = True  # for as long as no further step is made
        self.tell(self._generation, DONE, state.step, state.owned)
        end = time.monotonic() + self.settings.patience_s
        while not self.exchange.flush(timing.tick_s) and time.monotonic() < end:
            self._training.check()
            there = self.neighbours.newest(TRAINING)
            self.exchange.keep(p.address for j in there for p in self.neighbours.places(j))

    def _tell(self, event: str, **facts: Any) -> None:
        if self._communicator.rank == 0:
            self._training.link.send(kind="event", event=event, **facts)


def _recorded(directory: str) -> tuple[int, int]:
    """Which island a directory of a recorder is of, and of how many."""
    found = re.fullmatch(r"island(\d+)of(\d+)", Path(directory).name)
    if found is None or not Path(directory).is_dir():
        raise Misuse(f"Islands(replay={directory!r}): name a directory island…of… of a record")
    return int(found[1]), int(found[2])
