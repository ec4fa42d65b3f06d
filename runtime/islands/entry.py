"""How an island begins to take part: together with the others, or with the state of one of them.

A part of the entry into a generation, where all ranks of the island are at one step. Rank 0 looks
around and decides, so that all ranks do the same. An island that trains already is the truth; where
none does, it is the one that is farthest. Who is like it begins, everybody else takes its state:
parameters, moments and outer state, so that a new island is a copy of an old one at some step, and
reads other samples from then on.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.memory import HALVES
from outlast.checkpoint.records import SlotRecord
from outlast.cluster.errors import Misuse
from outlast.layout.run import Run
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.neighbours import TRAINING, WAITING
from outlast.runtime.link import Generation

if TYPE_CHECKING:
    from outlast.runtime.islands.outer import Outer
    from outlast.runtime.training import Training


@dataclass(frozen=True, slots=True)
class _Word:
    """What rank 0 decides; all empty: wait."""

    begin: bool = False
    donor: int = -1
    name: str = ""


class Entry:
    """One try of one rank, in one generation.

    Args:
        owned: runs that this rank will own.
        step, facts: of what the island has, from its script, its memory or its storage.
        half: of the memory, that may be overwritten.
    """

    def __init__(
        self, training: "Training", outer: "Outer", generation: Generation, owned: Sequence[Run],
        step: int, facts: dict[str, Any],
    ) -> None:  # fmt: skip
        self._training, self._outer, self._generation = training, outer, generation
        self._communicator, self._owned, self._step = generation.communicator, tuple(owned), step
        outer.facts = Facts.from_json(facts) if facts else outer.initial
        self._timing = training.link.identity.timing
        self._began, self._told = time.monotonic(), False

    def run(self, half: int) -> SlotRecord | None:
        """Wait until this island may begin; the record of what it has taken, into `half`, if so.

        Raises:
            GenerationChanged, PeerLost: it has to be tried again.
            Misuse: the islands train different models.
        """
        outer = self._outer
        outer.tell(self._generation, WAITING, self._step, self._owned)
        while True:
            word = _Word(**self._communicator.gather_json(asdict(self._look()))[0])
            if word.begin:
                return None
            if word.donor >= 0 and (record := self._take(word, half)) is not None:
                return record
            with outer.inbox.changed:
                outer.inbox.changed.wait(self._timing.poll_s)

    def _look(self) -> _Word:
        """What rank 0 makes of what it knows; the others' word does not count."""
        outer = self._outer
        if self._communicator.rank:
            return _Word()
        names = tuple(version.name for version in outer.facts.versions)
        training, waiting = (outer.neighbours.newest(state) for state in (TRAINING, WAITING))
        for island, place in (training | waiting).items():
            if place.settings != outer.common:
                raise Misuse(
                    f"island {island} has other settings, or starts from another model: give all "
                    "islands the same Islands(...), and build the model after outlast.init(seed=…)"
                )
        if training:
            donor = min(training)
            place = training[donor]
            near = abs(place.step - self._step) < outer.settings.every
            if place.versions == names and near and not outer.astray:
                return _Word(begin=True)
            return _Word(donor=donor, name=f"{outer.island}-{donor}-{secrets.token_hex(8)}")
        best = max([(place.step, -j) for j, place in waiting.items()], default=(-1, 0))
        like = best[0] == self._step and waiting[-best[1]].versions == names
        first = best < (self._step, -outer.island)
        complete = len(waiting) == outer.islands - 1 or bool(outer.settings.replay)
        waited_s = time.monotonic() - self._began
        late = waited_s > self._timing.grace_s
        if waited_s > self._timing.silence_s and not (complete or self._told):
            self._told = True
            away = [island for island in outer.neighbours.others if island not in waiting]
            self._tell("island_waiting", islands=away, limit_s=self._timing.grace_s)
        return _Word(begin=(first or like) and (complete or late or outer.astray))

    def _take(self, word: _Word, half: int) -> SlotRecord | None:
        """The state of the donor, at whatever step it is, into `half`; None if it does not come."""
        outer, memory = self._outer, self._training.state.memory
        memory.begin(half)
        roles = {role.name: role for role in memory.shape.roles}

        def write(role: str, run: Run, data: memoryview) -> None:
            memory.run_bytes(half, roles[role], run)[:] = data

        outer.inbox.expect(word.name, word.donor, self._owned, memory.shape.widths, write)
        moved, before = time.monotonic(), -1
        try:
            if self._communicator.rank == 0:
                outer.neighbours.ask(word.name, self._communicator.size)
            while True:
                told = outer.inbox.state(word.name)
                gone = word.donor not in outer.neighbours.reach
                if outer.exchange.received_bytes != before:
                    moved, before = time.monotonic(), outer.exchange.received_bytes
                late = time.monotonic() - moved > self._timing.grace_s
                words = self._communicator.gather_json(
                    [int(told["step"]) if told else None, gone or late]
                )
                steps = {step for step, _ in words}
                if told is not None and len(steps) == 1:
                    self._forget_former(1 - half)
                    self._tell("island_entered", step=told["step"], donor=word.donor)
                    return self._record(half, told)
                if words[0][1]:
                    return None
                with outer.inbox.changed:
                    outer.inbox.changed.wait(self._timing.poll_s)
        finally:
            outer.inbox.forget(word.name)

    def _tell(self, event: str, **facts: Any) -> None:
        if self._communicator.rank == 0:
            self._training.link.send(kind="event", event=event, **facts)

    def _forget_former(self, half: int) -> None:
        """What was here may be of the same step and other bits: before anybody has the new state
        committed, nobody has anything of the old one."""
        memory = self._training.state.memory
        memory.begin(half)
        for parity in HALVES:
            memory.parity.begin(parity)
        self._communicator.gather_bytes(b"")

    def _record(self, half: int, told: dict[str, Any]) -> SlotRecord:
        training = self._training
        step = int(told["step"])
        facts = Facts.from_json(told["outer"]).entered(step)
        empty: dict[str, list[int]] = {role.name: [] for role in training.state.roles}
        record = SlotRecord(
            step, 0, (), (), empty, dict(told["scalars"]), list(told["losses"]),
            outer=facts.as_json(),
        )  # fmt: skip
        number = self._generation.view.generation
        training.state.publish(half, record, self._owned, self._owned, number)
        return record
