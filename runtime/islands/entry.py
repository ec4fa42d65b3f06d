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

from torch import Tensor

from outlast.checkpoint.memory import HALVES
from outlast.checkpoint.records import SlotRecord
from outlast.cluster.errors import Misuse, StateLost
from outlast.layout.run import Run
from outlast.runtime.fold import unit_runs
from outlast.runtime.islands.closing import Round
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.neighbours import TRAINING, WAITING
from outlast.runtime.islands.outer_optimizer import OUTER_PARAM, SENT_ROLES, taken_roles
from outlast.runtime.islands.shares import Shares
from outlast.runtime.link import Generation

if TYPE_CHECKING:
    from outlast.runtime.islands.outer import Outer
    from outlast.runtime.training import Training


OUTSIDE = "outside"  # in a record: with this state the island does not take part yet
_TRIES = 2  # to take a state; then it goes on with its own


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
        outer.facts = Facts.of(facts, step, outer.rounds, outer.common)
        if outer.facts.common != outer.common:
            raise Misuse(
                "the checkpoint is of islands with other settings, or of another model: take "
                "those, or another --checkpoint-dir"
            )
        self._timing = training.link.identity.timing
        self._began, self._told = time.monotonic(), False

    def run(self, half: int, lost: bool) -> SlotRecord | None:
        """Wait until this island may begin; the record of what it has taken, into `half`, if so.

        Args:
            lost: it has trained and lost its state, so it must not begin with what it has now.
        Raises:
            GenerationChanged, PeerLost: it has to be tried again.
            Misuse: the islands train different models.
            StateLost: nobody has a state for it.
        """
        outer, failed = self._outer, 0
        outer.tell(self._generation, WAITING, self._step, self._owned)
        while True:
            found = asdict(self._look(lost, failed))
            word = _Word(**self._communicator.gather_json(found)[0])
            if word.begin and lost:
                raise StateLost("the state of this island is lost, and no other one trains")
            if word.begin:
                return None
            if word.donor >= 0:
                record = self._take(word, half)
                if record is not None:
                    return record
                failed += 1
            with outer.inbox.changed:
                outer.inbox.changed.wait(self._timing.poll_s)

    def _look(self, lost: bool, failed: int) -> _Word:
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
        if training and (lost or failed < _TRIES):
            donor = min(training)
            place = training[donor]
            near = abs(place.step - self._step) < outer.settings.every
            if place.versions == names and near and not (outer.astray or lost):
                return _Word(begin=True)
            return _Word(donor=donor, name=secrets.token_hex(8))
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
        alone = outer.astray or failed >= _TRIES
        return _Word(begin=late if lost else (first or like or bool(training)) and (
            complete or late or alone))  # fmt: skip

    def _take(self, word: _Word, half: int) -> SlotRecord | None:
        """The state of the donor, at whatever step it is, into `half`; None if it does not come."""
        outer, memory = self._outer, self._training.state.memory
        memory.begin(half)
        roles = {role.name: role for role in memory.shape.roles}
        taken = taken_roles(memory.shape.roles, self._training.primary)
        widths, moved = {name: memory.shape.widths[name] for name in taken}, time.monotonic()

        def write(role: str, run: Run, data: memoryview) -> None:
            nonlocal moved
            memory.run_bytes(half, roles[role], run)[:] = data
            moved = time.monotonic()

        outer.inbox.expect(word.name, word.donor, self._owned, widths, write)
        ask = {"name": word.name, "donor": word.donor, "size": self._communicator.size}
        try:
            while True:
                if self._communicator.rank == 0:
                    outer.neighbours.request(type="ask", **ask)
                told = outer.inbox.state(word.name)
                late = time.monotonic() - moved > self._timing.grace_s
                over = late or word.donor not in outer.neighbours.reach
                step = int(told["step"]) if told else None
                words = self._communicator.gather_json([step, over])
                steps = {step for step, _ in words}
                if told is not None and len(steps) == 1:
                    return self._taken(word, half, told)
                if any(over for _, over in words):
                    return None
                with outer.inbox.changed:
                    outer.inbox.changed.wait(self._timing.poll_s)
        finally:
            outer.inbox.forget(word.name)

    def _taken(self, word: _Word, half: int, told: dict[str, Any]) -> SlotRecord:
        """Complete what has come, and make up for the time that it took."""
        outer, training, state = self._outer, self._training, self._training.state
        runs = unit_runs(state.space, self._owned)
        live = {role.name: [state.host(half, role.name, run) for run in runs]
                for role in state.roles}  # fmt: skip
        for outer_values, values in zip(live[OUTER_PARAM], live[training.primary], strict=True):
            values.copy_(outer_values)
        for role in live.keys() & SENT_ROLES:
            for values in live[role]:
                values.zero_()
        shares = Shares(state.space, outer.fragments, runs)
        facts = Facts.from_json(told["outer"]).entered(int(told["step"]))
        facts = self._caught_up(live, shares, facts)
        step = self._communicator.gather_json(self._front(facts))[0]
        self._forget_former(1 - half)
        self._tell("island_entered", step=step, donor=word.donor)
        empty: dict[str, list[int]] = {role.name: [] for role in state.roles}
        record = SlotRecord(
            step, 0, (), (), empty, dict(told["scalars"]), list(told["losses"]),
            outer=facts.entered(step).as_json(),
        )  # fmt: skip
        state.publish(half, record, self._owned, self._owned, self._generation.view.generation)
        return record

    def _caught_up(self, live: dict[str, list[Tensor]], shares: Shares, facts: Facts) -> Facts:
        """Apply the rounds that were closed while the state was on its way: without them the
        island would be as far behind as that took, and never be waited for."""
        outer, moved = self._outer, time.monotonic()
        while True:
            with outer.inbox.changed:
                known = list(outer.neighbours.closings.items())
            closed = [
                [step, p, closing["islands"]]
                for (p, step, base), closing in known
                if base == facts.versions[p].name and step > facts.applied[p]
            ]
            here = [at for at in sorted(closed) if self._whole(shares, *at)]
            late = not closed or time.monotonic() - moved > self._timing.silence_s
            words = self._communicator.gather_json([here, late])
            everywhere = [at for at in words[0][0] if all(at in there for there, _ in words)]
            if everywhere:
                step, p, islands = everywhere[0]
                at = Round(p, step, facts.versions[p], contributed=False)
                group = self._communicator
                facts, _ = outer.merge(live, shares, at, sorted(islands), facts, group)
                moved = time.monotonic()
            elif words[0][1]:
                return facts
            else:
                with outer.inbox.changed:
                    outer.inbox.changed.wait(self._timing.poll_s)

    def _whole(self, shares: Shares, step: int, fragment: int, islands: Sequence[int]) -> bool:
        """Whether all that this rank needs of a round is here; what is not is asked for."""
        inbox, runs = self._outer.inbox, shares.of(fragment)[1]
        lacking = [j for j in islands if runs and not inbox.covers(fragment, step, j, runs)]
        for island in lacking:
            place = {"fragment": fragment, "step": step, "island": island}
            self._outer.neighbours.request(type="want", **place)
        return not lacking

    def _front(self, facts: Facts) -> int:
        """The step to go on from: the others', as far as no round is skipped."""
        outer, began = self._outer, facts.began
        training = outer.neighbours.newest(TRAINING).values()
        newest = max((place.step for place in training), default=began)
        return max(began, min(newest, facts.next_due(outer.rounds, outer.delays) - 1))

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
        generation = self._generation
        me = self._training.link.identity.holder
        if me == generation.first_of_node(me):  # nor do the dead
            self._training.link.send(kind="release", generation=generation.view.generation)
        self._communicator.gather_bytes(b"")
