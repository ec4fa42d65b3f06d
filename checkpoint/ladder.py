"""The recovery ladder: from what the survivors still have to where every lost run comes from.

`decide` is a pure function of the survivors' reports, so every rank computes the same recovery
without asking anybody. It takes the newest step of which every element can be had, each lost run
from the first rung that has it:

    replica   a live worker's own slot holds it
    memory    the worker is dead, its node's agent still has the slot
    parity    at most m units of its stripe are gone, whoever holds the others
    average   only where a job asks for it: the mean of the neighbouring blocks

and refuses, by name, what no rung has; then the step on storage is left, if there is one. All rungs
but the last are exact: determinism makes all copies of a step equal, so copies of different
generations may be mixed. The last is taken where no step can be had exactly, and what it makes
untrue is left out from then on, see `checkpoint.average`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import zip_longest
from typing import Any

from outlast.checkpoint.average import Averager, Fill, extended, merged, superseded
from outlast.checkpoint.decode import Decode, decodes
from outlast.checkpoint.protection import record_stripes
from outlast.checkpoint.records import (
    Averaging,
    Lineage,
    ParityRecord,
    ParitySource,
    Protection,
    Report,
    SlotSource,
    StateShape,
)
from outlast.cluster.errors import StateLost
from outlast.layout.layout import Layout, deal, replicate, settle
from outlast.layout.plan import plan
from outlast.layout.run import Run, numel, subtract, union
from outlast.layout.space import Space

_MEMORY = 1 << 48  # holders of a plan: ranks below, memories of dead workers above


class Rung(StrEnum):
    """Where a transferred run comes from."""

    REPLICA = "replica"
    MEMORY = "memory"
    PARITY = "parity"
    AVERAGE = "average"
    CHECKPOINT = "checkpoint"  # the step on storage
    HEAL = "heal"  # nothing was lost: a joiner takes its share


@dataclass(frozen=True, slots=True)
class Transfer:
    """All roles of `run`, from slot `source` that rank `src` can read, to rank `dst`."""

    rung: Rung
    src: int
    source: int
    dst: int
    run: Run


@dataclass(frozen=True, slots=True)
class Recovery:
    """What every rank does next; `step` counts committed steps; `fresh` means nothing is in memory
    yet, `stored` that all of it came from storage."""

    step: int
    layout: Layout
    fresh: bool = False
    transfers: tuple[Transfer, ...] = ()
    decodes: tuple[Decode, ...] = ()
    losses: tuple[float, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    parity: tuple[int, int] | None = None  # (step, generation) that is whole and must be kept
    fills: tuple[Fill, ...] = ()
    norms: tuple[float, ...] = ()
    lineage: Lineage = ()
    outer: dict[str, Any] = field(default_factory=dict)
    stored: bool = False

    def rungs(self, shape: StateShape) -> dict[str, int]:
        """Bytes that each rung supplied."""
        total: dict[str, int] = {}
        for move in self.transfers:
            total[move.rung] = total.get(move.rung, 0) + move.run.numel * shape.element_bytes
        for decode in self.decodes:
            size = sum(out.run.numel * shape.widths[out.role] for out in decode.outputs)
            total[Rung.PARITY] = total.get(Rung.PARITY, 0) + size
        if self.fills:
            elements = sum(fill.run.numel for fill in self.fills)
            total[Rung.AVERAGE] = elements * shape.element_bytes
        if self.stored:
            total[Rung.CHECKPOINT] = shape.numel * shape.element_bytes
        return {str(rung): size for rung, size in total.items()}

    def moved(self, shape: StateShape) -> int:
        """Bytes that go from one rank to another."""
        size = sum(move.run.numel for move in self.transfers if move.src != move.dst)
        decodes = (message for decode in self.decodes for message in decode.moved(shape))
        return size * shape.element_bytes + sum(n for src, dst, n in decodes if src != dst)


@dataclass(frozen=True, slots=True)
class Ladder:
    """What does not change during a job: the space, the grain, the shape of a slot, the ZeRO
    stage, how steps are protected, and by which weights blocks may be averaged, if at all."""

    space: Space
    shape: StateShape
    grain: int
    replicated: bool
    protection: Protection = field(default_factory=Protection)
    average: str | None = None

    def initial(self, holders: Sequence[int]) -> Layout:
        """Layout of a job that starts on `holders`."""
        if self.replicated:
            return replicate(self.space, holders)
        return deal(self.space, holders, self.grain)

    def anew(self, reports: Sequence[Report]) -> Recovery:
        """To begin with nothing in memory: at the start, or from a step on storage."""
        return Recovery(0, self.initial(_interleaved(reports)), fresh=True)

    def decide(self, reports: Sequence[Report]) -> Recovery:
        """The newest step that can be restored, and how.

        Args:
            reports: one per rank of the new generation, in rank order.
        Raises:
            StateLost: no step is whole; says what is missing of the newest one.
        """
        reports = _present(reports)
        steps = {slot.step for report in reports for slot in report.slots if slot.step >= 0}
        attempts = []
        for step in sorted(steps, reverse=True):
            attempt = _Attempt(self, reports, step)
            recovery = attempt.recovery()
            if recovery is not None:
                return recovery
            attempts.append(attempt)
        reasons = [attempt.refusal() for attempt in attempts]
        if self.average is not None:
            # What was done stays done; besides, at a step that is only half committed more is
            # missing than was lost.
            done = max(report.done for report in reports)
            key = lambda attempt: (attempt.step < done, numel(attempt.unrecovered))  # noqa: E731
            for attempt in sorted(attempts, key=key):
                averager = attempt.averager(self.average)
                if reason := averager.refusal():
                    reasons.append(f"step {attempt.step}: {reason}")
                else:
                    return attempt.averaged(averager)
        # What is left of a later step says that the job was further: never back to the start.
        if all(report.initial for report in reports) and not any(steps):
            return self.anew(reports)
        raise StateLost("; ".join(reasons) or "no survivor holds any state")


class _Attempt:
    """One candidate step: what is held, what is missing, what parity gives back."""

    def __init__(self, ladder: Ladder, reports: Sequence[Report], step: int) -> None:
        self.ladder, self.reports, self.step = ladder, reports, step
        self.sources: dict[int, tuple[int, int, SlotSource]] = {}
        for report in reports:
            for index, slot in enumerate(report.slots):
                if slot.step == step:
                    key = report.rank if slot.own else _MEMORY + len(self.sources)
                    self.sources[key] = (report.rank, index, slot)
        self.owned = {k: s.owned for k, (_, _, s) in self.sources.items() if s.own}
        self.layout = self._target()
        self.wanted = Layout.of({r.rank: self.layout.runs(r.holder) for r in reports})
        self.held = {key: slot.held for key, (_, _, slot) in self.sources.items()}
        self.plan = plan(Layout.of(self.held), self.wanted)
        self.missing = {dst: runs for dst, runs in self.plan.missing if runs}
        self.lineage = merged([slot.lineage for _, _, slot in self.sources.values()])
        self.decodes = self._decodes() if self.missing else ()
        self.lost = dict(self._lost())
        self.unrecovered = union((), [run for runs in self.lost.values() for run in runs])

    def _target(self) -> Layout:
        holders = [report.holder for report in self.reports]
        if self.ladder.replicated:
            return replicate(self.ladder.space, holders)
        if self.ladder.average is not None:
            # Moves more than to fill the hole would, but keeps neighbouring blocks apart.
            return self.ladder.initial(_interleaved(self.reports))
        claims = [
            (slot.generation, slot.holder, slot.owned)
            for _, _, slot in self.sources.values()
            if slot.own
        ]
        return settle(claims, holders, self.ladder.space, self.ladder.grain)

    def recovery(self) -> Recovery | None:
        """The exact recovery to this step, or None where something is still missing."""
        if self.unrecovered or not self.sources:
            return None
        lineage = self.lineage
        if set(_keys(merged(_lineages(self.reports)))) - set(_keys(lineage)):
            # Back before an averaging: what came after it is made void.
            back = Averaging(self.step, _next_generation(self.reports), "", (), (), (), {})
            lineage = extended(lineage, back)
        return self._recovery((), lineage)

    def averager(self, kind: str) -> Averager:
        """How to average what this step lacks."""
        return Averager(self.ladder.space, kind, self.wanted, self.lost, self._norms)

    def averaged(self, averager: Averager) -> Recovery:
        """The recovery to this step with the mean of the neighbours for what is lost."""
        new = averager.episode(self.step, _next_generation(self.reports))
        return self._recovery(averager.fills, extended(self.lineage, new))

    @property
    def _norms(self) -> tuple[float, ...]:
        slots = (slot for _, _, slot in self.sources.values())
        return next((slot.norms for slot in slots if slot.norms), ())

    def _recovery(self, fills: tuple[Fill, ...], lineage: Lineage) -> Recovery:
        slots = [slot for _, _, slot in self.sources.values()]
        return Recovery(
            step=self.step,
            layout=self.layout,
            transfers=tuple(self._transfers()),
            decodes=self.decodes,
            losses=slots[0].losses,
            scalars=next((slot.scalars for slot in slots if slot.scalars), {}),
            parity=self._whole_parity(),
            fills=fills,
            norms=self._norms,
            lineage=lineage,
            outer=slots[0].outer,
        )

    def _whole_parity(self) -> tuple[int, int] | None:
        """The newest parity up to this step of which every live holder has its units.

        It is what a further loss falls back on until the parity of the new generation is whole.
        """
        made: dict[tuple[int, int], tuple[ParityRecord, set[tuple[int, int, int]]]] = {}
        for report in self.reports:
            for source in report.parity:
                record = source.record
                if source.own and 0 <= record.step <= self.step:
                    _, there = made.setdefault((record.step, record.generation), (record, set()))
                    there |= {(report.holder, unit.stripe, unit.row) for unit in record.units}
        live = {report.holder for report in self.reports}
        for key in sorted(made, reverse=True):
            record, there = made[key]
            due = {
                (holder, stripe.index, row)
                for stripe in record_stripes(self.ladder.shape, record)
                for row, holder in enumerate(stripe.parity)
                if holder in live
            }
            if due <= there:
                return key
        return None

    def refusal(self) -> str:
        """What this step lacks, by tensor."""
        runs = self.unrecovered
        names = self.ladder.space.names(runs)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"step {self.step}: {numel(runs)} elements are in no memory or parity ({shown})"

    def _lost(self) -> Iterator[tuple[int, tuple[Run, ...]]]:
        """(rank, runs that it needs and of which no exact rung has some role)."""
        found: dict[tuple[int, str], list[Run]] = {}
        for decode in self.decodes:
            for output in decode.outputs:
                found.setdefault((output.dst, output.role), []).append(output.run)
        for dst, runs in self.missing.items():
            gone: tuple[Run, ...] = ()
            for role in self.ladder.shape.roles:
                gone = union(gone, subtract(runs, found.get((dst, role.name), [])))
            if gone:
                yield dst, gone

    def _transfers(self) -> Iterator[Transfer]:
        live = union((), [run for runs in self.owned.values() for run in runs])
        for move in self.plan:
            rank, index, slot = self.sources[move.src]
            if not slot.own:
                rung = Rung.MEMORY
            elif self.ladder.replicated or not subtract([move.run], live):
                rung = Rung.HEAL
            else:
                rung = Rung.REPLICA
            yield Transfer(rung, rank, index, move.dst, move.run)

    def _decodes(self) -> tuple[Decode, ...]:
        shape, reports = self.ladder.shape, self.reports
        return decodes(shape, reports, self.step, self.missing, self.lineage)


def _interleaved(reports: Sequence[Report]) -> list[int]:
    """Holders in such an order that those who follow each other are on different nodes."""
    nodes: dict[str, list[int]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report.holder)
    lanes = zip_longest(*nodes.values())
    return [holder for lane in lanes for holder in lane if holder is not None]


def _lineages(reports: Sequence[Report]) -> list[Lineage]:
    return [slot.lineage for report in reports for slot in report.slots if slot.lineage]


def _keys(lineage: Lineage) -> list[tuple[int, int]]:
    return [(averaging.generation, averaging.step) for averaging in lineage]


def _next_generation(reports: Sequence[Report]) -> int:
    """Above all that is stored, and not above the generation that decides."""
    slots = (slot.generation for report in reports for slot in report.slots)
    parity = (source.record.generation for report in reports for source in report.parity)
    return 1 + max([*slots, *parity])


def _present(reports: Sequence[Report]) -> Sequence[Report]:
    """The reports without what an averaging has made void; what is left keeps its place."""
    lineage = merged(_lineages(reports))
    if not lineage:
        return reports

    def slot(source: SlotSource) -> SlotSource:
        if superseded(lineage, source.step, source.generation):
            return replace(source, step=-1, owned=(), held=())
        later = [a for a in lineage if a.generation > source.generation and a.step == source.step]
        held = subtract(source.held, [run for averaging in later for run in averaging.runs])
        return replace(source, held=held)

    def parity(source: ParitySource) -> ParitySource:
        if superseded(lineage, source.record.step, source.record.generation):
            return replace(source, record=replace(source.record, step=-1, units=()))
        return source

    return [
        replace(
            report,
            slots=tuple(map(slot, report.slots)),
            parity=tuple(map(parity, report.parity)),
        )
        for report in reports
    ]
