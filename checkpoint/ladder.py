"""The recovery ladder: from what the survivors still have to where every lost run comes from.

`decide` is a pure function of the survivors' reports, so every rank computes the same recovery
without asking anybody. It takes the newest step of which every element can be had, each lost run
from the first rung that has it:

    replica   a live worker's own slot holds it
    memory    the worker is dead, its node's agent still has the slot
    parity    at most m units of its stripe are gone, whoever holds the others

and refuses, by name, what no rung has. All rungs are exact: determinism makes all copies of a
step equal, so copies of different generations may be mixed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from outlast.checkpoint.decode import Decode, Readable, decodes
from outlast.checkpoint.protection import record_stripes
from outlast.checkpoint.records import ParityRecord, Protection, Report, SlotSource, StateShape
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
    """What every rank does next; `step` counts committed steps; `fresh` means nothing is stored
    yet."""

    step: int
    layout: Layout
    fresh: bool = False
    transfers: tuple[Transfer, ...] = ()
    decodes: tuple[Decode, ...] = ()
    losses: tuple[float, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    parity: tuple[int, int] | None = None  # (step, generation) that is whole and must be kept

    def rungs(self, shape: StateShape) -> dict[str, int]:
        """Bytes that each rung supplied."""
        total: dict[str, int] = {}
        for move in self.transfers:
            total[move.rung] = total.get(move.rung, 0) + move.run.numel * shape.element_bytes
        for decode in self.decodes:
            size = sum(out.run.numel * shape.widths[out.role] for out in decode.outputs)
            total[Rung.PARITY] = total.get(Rung.PARITY, 0) + size
        return {str(rung): size for rung, size in total.items()}

    def moved(self, shape: StateShape) -> int:
        """Bytes that go from one rank to another."""
        size = sum(move.run.numel for move in self.transfers if move.src != move.dst)
        decodes = (message for decode in self.decodes for message in decode.moved(shape))
        return size * shape.element_bytes + sum(n for src, dst, n in decodes if src != dst)


@dataclass(frozen=True, slots=True)
class Ladder:
    """What does not change during a job: the space, the grain, the shape of a slot, the ZeRO
    stage, how steps are protected."""

    space: Space
    shape: StateShape
    grain: int
    replicated: bool
    protection: Protection = field(default_factory=Protection)

    def initial(self, holders: Sequence[int]) -> Layout:
        """Layout of a job that starts on `holders`."""
        if self.replicated:
            return replicate(self.space, holders)
        return deal(self.space, holders, self.grain)

    def decide(self, reports: Sequence[Report]) -> Recovery:
        """The newest step that can be restored, and how.

        Args:
            reports: one per rank of the new generation, in rank order.
        Raises:
            StateLost: no step is whole; says what is missing of the newest one.
        """
        steps = sorted({slot.step for report in reports for slot in report.slots}, reverse=True)
        reasons = []
        for step in steps:
            attempt = _Attempt(self, reports, step)
            recovery = attempt.recovery()
            if recovery is not None:
                return recovery
            reasons.append(attempt.refusal())
        if all(report.initial for report in reports):
            return Recovery(0, self.initial([report.holder for report in reports]), fresh=True)
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
        self.decodes = self._decodes() if self.missing else ()

    def _target(self) -> Layout:
        holders = [report.holder for report in self.reports]
        if self.ladder.replicated:
            return replicate(self.ladder.space, holders)
        claims = [
            (slot.generation, slot.holder, slot.owned)
            for _, _, slot in self.sources.values()
            if slot.own
        ]
        return settle(claims, holders, self.ladder.space, self.ladder.grain)

    def recovery(self) -> Recovery | None:
        """The recovery to this step, or None where something is still missing."""
        if self._unrecovered() or not self.sources:
            return None
        slots = [slot for _, _, slot in self.sources.values()]
        return Recovery(
            step=self.step,
            layout=self.layout,
            transfers=tuple(self._transfers()),
            decodes=self.decodes,
            losses=slots[0].losses,
            scalars=next((slot.scalars for slot in slots if slot.scalars), {}),
            parity=self._whole_parity(),
        )

    def _whole_parity(self) -> tuple[int, int] | None:
        """The newest parity up to this step of which every live holder has its units.

        It is what a further loss falls back on until the parity of the new generation is whole.
        """
        made: dict[tuple[int, int], tuple[ParityRecord, set[tuple[int, int, int]]]] = {}
        for report in self.reports:
            for source in report.parity:
                record = source.record
                if source.own and record.step <= self.step:
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
        runs = self._unrecovered()
        names = self.ladder.space.names(runs)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"step {self.step}: {numel(runs)} elements are in no memory or parity ({shown})"

    def _unrecovered(self) -> tuple[Run, ...]:
        found: dict[tuple[int, str], list[Run]] = {}
        for decode in self.decodes:
            for output in decode.outputs:
                found.setdefault((output.dst, output.role), []).append(output.run)
        gone: tuple[Run, ...] = ()
        for dst, runs in self.missing.items():
            for role in self.ladder.shape.roles:
                gone = union(gone, subtract(runs, found.get((dst, role.name), [])))
        return gone

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
        found = sorted(self.sources.items(), key=lambda item: not item[1][2].own)
        readable = [Readable(rank, index, self.held[key]) for key, (rank, index, _) in found]
        return decodes(self.ladder.shape, self.reports, self.step, readable, self.missing)
