"""Entering a generation: report, decide, move, resume; to start a job, heal or recover.

All ranks exchange what they still hold, and each computes the same decision from it
(`Ladder.decide`). What a rank holds stays valid while it receives, so a second loss at any point
starts over with the new survivors and loses nothing.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from outlast.checkpoint.average import RATE
from outlast.checkpoint.ladder import Recovery
from outlast.checkpoint.records import Averaging, Report, SlotRecord
from outlast.cluster.errors import GenerationChanged, Misuse, PeerLost, StateLost
from outlast.cluster.failpoint import reach
from outlast.layout.run import Run, numel
from outlast.runtime.determinism import numerics
from outlast.runtime.islands.entry import OUTSIDE, Entry
from outlast.runtime.islands.outer import Outer
from outlast.runtime.islands.outer_optimizer import OUTER_PARAM
from outlast.runtime.leaf_tree import Node, covered
from outlast.runtime.link import Generation
from outlast.runtime.optimizer import Cohort
from outlast.runtime.survey import Survey
from outlast.runtime.training import Training
from outlast.runtime.transfer import Transfer


def join(training: Training, fingerprint: str, anew: bool = False) -> None:
    """Enter the newest generation, and the next one if that ends meanwhile.

    Args:
        anew: enter the present one once more, as an island does that takes another one's state.
    Raises:
        StateLost: no rung has the state.
        PeerLost: the peers are gone and no new generation came.
        Misuse: the ranks do not train the same model.
        Stopped: the job was asked to end, and its state is on storage.
    """
    timing = training.link.identity.timing
    training.link.pulse.inside()
    entered = training.now.generation.view.generation if training.now else 0
    deadline_s = timing.collective_s if training.now else timing.join_s
    while True:
        if anew:
            generation, anew = training.membership.generation, False
        else:
            generation = training.link.next_generation(entered, deadline_s)
        entered = generation.view.generation
        training.link.pulse.enter(entered)
        try:
            _Entry(training, generation, fingerprint).run()
            if generation.view.stopping:
                training.membership.redundancy.stop()
                training.durable.save_and_stop(generation.communicator)
        except (GenerationChanged, PeerLost) as cause:
            # A further loss: the ladder is entered again with what is left.
            training.link.send(
                kind="event", event="recovery_interrupted", generation=entered, cause=str(cause)
            )
        except StateLost:
            if not generation.unread_memories:
                raise
            # The missing state lies with the agent of a node whose workers are being restarted.
            deadline_s = timing.join_s
        else:
            training.link.pulse.outside()
            return


class _Entry:
    """One attempt to enter one generation."""

    def __init__(self, training: Training, generation: Generation, fingerprint: str) -> None:
        self.training, self.generation, self.fingerprint = training, generation, fingerprint
        self.communicator = generation.communicator
        self.rank = self.communicator.rank
        self.memory = training.state.memory
        self.marks = [("begun", time.time())]

    def run(self) -> None:
        """All phases, each timed; the event that ends them is what drills and reports read."""
        training, previous = self.training, self.training.now
        if previous is not None:
            previous.redundancy.stop()
        self._reach("finish")
        survey = Survey(training.link, self.memory, self.generation)
        mine = self._report(survey).as_json()
        reports = [Report.from_json(fields) for fields in self.communicator.gather_json(mine)]
        self._mark("finish")
        _compare(reports)
        self._reach("plan")
        decision, stored = self._decide(reports)
        # A step made again costs less than waiting for a worker, two steps do not.
        back = max(report.done for report in reports) - decision.step
        if self.generation.unread_memories and (not 0 <= back <= 1 or decision.fills):
            raise StateLost("a node whose workers are being restarted may have a newer step")
        self._mark("plan")
        self._reach("move")
        if stored:
            decision, half = self._load(decision, stored)
        else:
            half = self._move(decision, survey)
        astray = any(report.astray for report in reports)
        if training.outer is not None and (astray or OUTSIDE in decision.outer or decision.fresh):
            decision, half = self._take_part(training.outer, decision, half, astray)
        self._mark("move")
        redone = max(0, training.committed - decision.step)
        self._reach("resume")
        kept = self._resume(decision, reports, half)
        self._mark("resume")
        names = dict(previous.generation.nodes) if previous else {}
        lost = [
            {"holder": holder, "node": node}
            for holder, node in names.items()
            if holder not in training.membership.holders
        ]
        training.link.send(
            kind="event",
            event="recovered",
            generation=self.generation.view.generation,
            rank=self.rank,
            step=decision.step,
            redone=redone,
            joined=previous is None,
            phases=self._phases(),
            lost=lost,
            rungs=decision.rungs(self.memory.shape),
            moved=decision.moved(self.memory.shape),
            leaves_kept=kept,
            leaves_missing=training.settings.leaves - kept,
        )
        for averaging in decision.lineage:
            self._announce(averaging, decision.step)

    def _decide(self, reports: Sequence[Report]) -> tuple[Recovery, tuple[str, ...]]:
        """What the ladder says, and the steps on storage of which one is to be read: at the start
        of a job, and where no memory has the state any more."""
        ladder, durable = self.training.ladder, self.training.durable
        try:
            decision = ladder.decide(reports)
        except StateLost:
            if self.generation.unread_memories:
                raise
            names = durable.names(self.communicator)
            if names or self.training.outer is not None:
                return ladder.anew(reports), names
            raise
        return decision, durable.names(self.communicator) if decision.fresh else ()

    def _take_part(
        self, outer: Outer, decision: Recovery, half: int, astray: bool
    ) -> tuple[Recovery, int]:
        """Begin with the other islands, or take the state of one; what the state is now."""
        training = self.training
        owned = decision.layout.runs(training.link.identity.holder)
        outer.astray = astray  # also on a rank that has come since
        # Without a state of its own it can only take that of another one.
        lost = decision.fresh and self.generation.trained
        entry = Entry(training, outer, self.generation, owned, decision.step, decision.outer)
        record = entry.run(1 - half, lost)
        outer.astray = False
        if record is None:
            return decision, half
        training.gathered = -1
        return replace(
            decision, step=record.step, fresh=False, losses=tuple(record.losses), parity=None,
            scalars=record.scalars, norms=(), lineage=(), outer=record.outer, stored=True,
        ), 1 - half  # fmt: skip

    def _load(self, decision: Recovery, names: Sequence[str]) -> tuple[Recovery, int]:
        """A step from storage, dealt anew; returns what it is, and the half that holds it."""
        training = self.training
        owned = decision.layout.runs(training.link.identity.holder)
        self.memory.reserve(owned)
        found = training.durable.load(self.communicator, names, owned)
        decision = replace(
            decision, step=found.step, fresh=False, losses=tuple(found.losses),
            scalars=found.scalars, norms=found.norms, lineage=found.lineage,
            outer=found.outer | self._outside, stored=True,
        )  # fmt: skip
        training.gathered = -1
        record = replace(
            self._empty_record(decision), norms=found.norms, lineage=found.lineage,
            outer=decision.outer,
        )  # fmt: skip
        training.state.publish(0, record, owned, owned, self.generation.view.generation)
        return decision, 0

    def _announce(self, averaging: Averaging, step: int) -> None:
        """A lossy recovery never goes unsaid, also if a further loss cut it short."""
        known, self.training.announced = self.training.announced, averaging.generation
        fresh = averaging.generation > known and averaging.step == step
        if self.rank or not fresh or not averaging.runs:
            return
        self.training.link.send(
            kind="event",
            event="averaged",
            step=averaging.step,
            units=list(averaging.units),
            weights=[list(pair) for pair in averaging.weights],
            weighted_by=averaging.kind,
            elements=numel(averaging.runs),
        )

    def _reach(self, phase: str) -> None:
        reach(phase, step=self.training.committed, generation=self.generation.view.generation)

    def _mark(self, phase: str) -> None:
        self.marks.append((phase, time.time()))

    def _phases(self) -> dict[str, float]:
        """Milliseconds of each phase; `finish` is the wait for leaves that were in flight."""
        generation = self.generation
        seconds = {
            "interrupt": generation.interrupted - generation.received,
            "reconnect": generation.connected - generation.interrupted,
            "busy": max(0.0, self.marks[0][1] - generation.connected),
        }
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[phase] = end - begin
        seconds["finish"] += seconds.pop("busy")
        return {phase: round(1000 * value, 3) for phase, value in seconds.items()}

    def _report(self, survey: Survey) -> Report:
        training = self.training
        return Report(
            rank=self.rank,
            holder=training.link.identity.holder,
            node=training.link.identity.node,
            done=training.gathered,
            initial=training.initial and not self.generation.trained,
            nodes_step=training.stack.step,
            nodes=training.stack.nodes,
            weight=training.weight,
            model=self.fingerprint,
            numerics=numerics(),
            slots=tuple(slot.source() for slot in survey.slots),
            parity=tuple(parity.source for parity in survey.parity),
            ended=training.ended,
            changed=training.durable.changed,
            astray=training.outer is not None and training.outer.astray,
        )

    def _move(self, decision: Recovery, survey: Survey) -> int:
        """Bring the state of the decided step to its new owners; returns the half that holds it."""
        training = self.training
        owned = decision.layout.runs(training.link.identity.holder)
        generation = self.generation.view.generation
        self.memory.reserve(owned)
        if decision.fresh:
            return self._found(owned, generation)
        if decision.fills:
            training.gathered = -1  # the working parameters are those before the averaging
        mine = survey.own(decision.step, decision.lineage)
        half = mine.half if mine else survey.spare_half(decision.lineage)
        transfer = Transfer(self.communicator, survey, self.memory.shape)
        received = transfer.run(decision, training.state, half)
        record = mine.record if mine else self._empty_record(decision)
        told = {"norms": decision.norms, "lineage": decision.lineage, "outer": decision.outer}
        record = replace(record, **told)
        training.state.publish(half, record, received, owned, generation)
        return half

    def _empty_record(self, decision: Recovery) -> SlotRecord:
        sums: dict[str, list[int]] = {role.name: [] for role in self.memory.shape.roles}
        losses = list(decision.losses)
        return SlotRecord(decision.step, 0, (), (), sums, decision.scalars, losses)

    def _found(self, owned: tuple[Run, ...], generation: int) -> int:
        """Step 0: every owner stores its runs of the initial parameters."""
        state, training = self.training.state, self.training
        self.memory.begin(0)
        for run in owned:
            home = state.host(0, training.primary, run)
            home.copy_(training.model.param[run.start : run.stop])
            if training.outer is not None:
                state.host(0, OUTER_PARAM, run).copy_(home)
        sums = self.memory.sums(0, owned)
        record = SlotRecord(0, generation, owned, owned, sums, {}, [], outer=self._outside)
        self.memory.commit(0, record)
        return 0

    @property
    def _outside(self) -> dict[str, Any]:
        """What the record of a state says with which an island does not take part yet."""
        return {OUTSIDE: True} if self.training.outer is not None else {}

    def _resume(self, decision: Recovery, reports: Sequence[Report], half: int) -> int:
        """Adopt the state, gather the parameters, deal the missing leaves; returns leaves kept."""
        training, holder = self.training, self.training.link.identity.holder
        step = decision.step
        lineage = training.lineage = decision.lineage
        training.state.adopt(half, step, decision.layout.runs(holder), lineage)
        whole = Cohort(1.0, decision.scalars, started=step > 0)
        cohorts = [Cohort(RATE, one.scalars, started=step > one.step) for one in lineage]
        views = training.state.live(training.primary)
        training.optimizer.rebuild(views, [whole, *cohorts], training.state.members)
        training.committed = step
        training.ended = max(report.ended for report in reports)
        training.losses = decision.losses
        training.enter(self.generation, decision.layout, [report.weight for report in reports])
        if decision.fresh:
            training.gathered = 0
        elif decision.stored or decision.fills or any(r.done != step for r in reports):
            training.gather()
        if not decision.stored:
            training.durable.share(self.communicator, [report.changed for report in reports])
        # Leaves of other parameters than those of now do not count.
        averaged = any(one.step == step and one.runs for one in lineage)
        kept = {} if averaged or decision.stored else _kept(reports, step)
        training.stack.start(step)
        training.stack.keep(kept.get(self.rank, ()))
        training.deal_leaves(kept)
        training.membership.redundancy.keep = decision.parity
        if training.outer is not None:
            training.outer.enter(self.generation, decision.outer)
        self._reach("reprotect")
        training.protect()
        return sum(len(covered(nodes)) for nodes in kept.values())


def _kept(reports: Sequence[Report], step: int) -> dict[int, tuple[Node, ...]]:
    """Rank -> finished nodes of step index `step`, each leaf once."""
    kept: dict[int, tuple[Node, ...]] = {}
    taken: set[int] = set()
    for report in reports:
        if report.nodes_step == step:
            own = tuple(node for node in report.nodes if not covered([node]) & taken)
            kept[report.rank] = own
            taken |= covered(own)
    return kept


def _compare(reports: Sequence[Report]) -> None:
    """Refuse ranks that train different models; warn of ranks that compute different bits."""
    first = reports[0]
    for report in reports[1:]:
        if report.model != first.model:
            raise Misuse(
                f"rank {report.rank} ({report.node}) and rank 0 ({first.node}) start from "
                "different models: parameters must have the same names, shapes and initial values "
                "on every rank. Build the model after outlast.init(seed=...), without random "
                "numbers or settings that depend on the rank"
            )
        if report.numerics != first.numerics:
            warnings.warn(
                f"rank {report.rank} computes with {report.numerics}, rank 0 with "
                f"{first.numerics}: results will depend on which rank computes what",
                stacklevel=2,
            )
