"""Entering a generation: report, decide, move, resume. The same path starts a job, heals a
joiner and recovers a loss.

All ranks exchange what they still hold, and each computes the same decision from it
(`Ladder.decide`). Two rounds of transfers follow: the units that decoders need, then every run
to its new owner. What a rank holds stays valid while it receives, so a second loss at any point
starts over with the new survivors and loses nothing."""

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outlast.checkpoint.ladder import Decode, Recovery
from outlast.checkpoint.memory import HALVES, StateMemory, checksum
from outlast.checkpoint.parity import Code
from outlast.checkpoint.records import ParitySource, Report, SlotRecord, SlotSource
from outlast.cluster.errors import Corrupt, GenerationChanged, Misuse, PeerLost, StateLost
from outlast.layout.run import Run, canonical
from outlast.runtime.collectives import Communicator
from outlast.runtime.determinism import numerics
from outlast.runtime.leaf_tree import Node, covered
from outlast.runtime.link import Generation
from outlast.runtime.training import Training


@dataclass(frozen=True, slots=True)
class _Slot:
    """A half that this rank can read, with what is sound in it."""

    memory: StateMemory
    half: int
    record: SlotRecord
    own: bool
    holder: int


@dataclass(frozen=True, slots=True)
class _Parity:
    memory: StateMemory
    half: int
    source: ParitySource


def join(training: Training, fingerprint: str) -> None:
    """Enter the newest generation, and the next one if that ends meanwhile.

    Raises:
        StateLost: no rung has the state.
        PeerLost: the peers are gone and no new generation came.
        Misuse: the ranks do not train the same model.
    """
    timing = training.link.identity.timing
    entered = training.now.generation.view.generation if training.now else 0
    deadline_s = timing.collective_s if training.now else timing.join_s
    while True:
        generation = training.link.next_generation(entered, deadline_s)
        entered = generation.view.generation
        try:
            _Entry(training, generation, fingerprint).run()
        except (GenerationChanged, PeerLost) as cause:
            # A further loss: the ladder is entered again with what is left.
            training.link.send(
                kind="event", event="recovery_interrupted", generation=entered, cause=str(cause)
            )
            continue
        except StateLost:
            if not _unread_memories(generation):
                raise
            # The missing state lies in the agent of a node whose workers are being restarted.
            deadline_s = timing.join_s
            continue
        return


def _unread_memories(generation: Generation) -> bool:
    return any(member.memories and not member.workers for member in generation.view.members)


class _Entry:
    """One attempt to enter one generation."""

    def __init__(self, training: Training, generation: Generation, fingerprint: str) -> None:
        self.training, self.generation, self.fingerprint = training, generation, fingerprint
        self.communicator: Communicator = generation.communicator
        self.rank = self.communicator.rank
        self.memory = training.state.memory
        self.slots: list[_Slot] = []
        self.parity: list[_Parity] = []

    def run(self) -> None:
        """All phases, each timed; the event that ends them is what drills and reports read."""
        training, begun = self.training, time.time()
        previous = training.now
        self._survey()
        report = self._report()
        reports = [
            Report.from_json(fields) for fields in self.communicator.gather_json(report.as_json())
        ]
        gathered = time.time()
        _compare(reports)
        decision = training.ladder.decide(reports)
        planned = time.time()
        half = self._move(decision)
        moved = time.time()
        redone = max(0, training.committed - decision.step)
        leaves_kept = self._resume(decision, reports, half)
        resumed = time.time()
        generation = self.generation
        phases = {
            "interrupt": generation.interrupted - generation.received,
            "reconnect": generation.connected - generation.interrupted,
            "finish": max(0.0, begun - generation.connected) + gathered - begun,
            "plan": planned - gathered,
            "move": moved - planned,
            "resume": resumed - moved,
        }
        lost = []
        if previous is not None:
            names = dict(previous.generation.nodes)
            lost = [
                {"holder": holder, "node": names[holder]}
                for holder in previous.holders
                if holder not in training.membership.holders
            ]
        training.link.send(
            kind="event",
            event="recovered",
            generation=generation.view.generation,
            rank=self.rank,
            step=decision.step,
            redone=redone,
            joined=previous is None,
            phases={name: round(1000 * seconds, 3) for name, seconds in phases.items()},
            lost=lost,
            rungs=decision.rungs(self.memory.shape),
            leaves_kept=leaves_kept,
            leaves_missing=training.settings.leaves - leaves_kept,
        )

    # What there is

    def _survey(self) -> None:
        """Verify every half that this rank can read; whatever is torn is left out and logged."""
        memories = [(self.memory, True, self.training.link.identity.holder)]
        if self.rank == self._reader():
            for holder, descriptor in self.training.link.memories().items():
                try:
                    memories.append((StateMemory(descriptor, self.memory.shape), False, holder))
                except Corrupt as cause:
                    # Its worker died before the memory had its full size.
                    self.training.link.send(
                        kind="event", event="memory_unusable", holder=holder, cause=str(cause)
                    )
                finally:
                    os.close(descriptor)
        for memory, own, holder in memories:
            for half in HALVES:
                self._survey_slot(memory, half, own, holder)
                self._survey_parity(memory, half, own, holder)

    def _reader(self) -> int:
        """Rank that reads for the whole node: its first worker."""
        domains = self.generation.domains
        me = domains[self.training.link.identity.holder]
        return next(rank for rank, (h, _) in enumerate(self.generation.nodes) if domains[h] == me)

    def _survey_slot(self, memory: StateMemory, half: int, own: bool, holder: int) -> None:
        record = memory.record(half)
        if record is None:
            return
        torn = memory.torn(half, record)
        for role, run in torn:
            self._log_corrupt(holder, record.step, role, run)
        if torn:
            bad = [run for _, run in torn]
            sound = [i for i, run in enumerate(record.held) if not any(run == b for b in bad)]
            sums = {role: [values[i] for i in sound] for role, values in record.sums.items()}
            record = replace(record, held=tuple(record.held[i] for i in sound), sums=sums)
        self.slots.append(_Slot(memory, half, record, own, holder))

    def _survey_parity(self, memory: StateMemory, half: int, own: bool, holder: int) -> None:
        record = memory.parity_record(half)
        if record is None:
            return
        size = sum(unit.length for unit in record.units)
        home = memory.parity(half, size)
        sound = []
        for unit in record.units:
            if checksum(home[unit.offset : unit.offset + unit.length]) == unit.checksum:
                sound.append(unit)
            else:
                self._log_corrupt(holder, record.step, "parity", Run(unit.offset, unit.length))
        source = ParitySource(own, replace(record, units=tuple(sound)))
        self.parity.append(_Parity(memory, half, source))

    def _log_corrupt(self, holder: int, step: int, role: str, run: Run) -> None:
        self.training.link.send(
            kind="event",
            event="corrupt",
            holder=holder,
            step=step,
            role=role,
            start=run.start,
            stop=run.stop,
        )

    def _report(self) -> Report:
        training = self.training
        sources = tuple(
            SlotSource(
                slot.own,
                slot.holder,
                slot.record.step,
                slot.record.generation,
                slot.record.owned,
                canonical(slot.record.held),
                slot.record.scalars,
                tuple(slot.record.losses),
            )
            for slot in self.slots
        )
        return Report(
            rank=self.rank,
            holder=training.link.identity.holder,
            node=training.link.identity.node,
            done=training.gathered,
            initial=training.initial,
            nodes_step=training.stack.step,
            nodes=training.stack.nodes,
            losses=training.stack.losses,
            weight=training.settings.weight,
            model=self.fingerprint,
            numerics=numerics(),
            slots=sources,
            parity=tuple(parity.source for parity in self.parity),
        )

    # Where it goes

    def _move(self, decision: Recovery) -> int:
        """Bring the state of the decided step to its new owners; returns the half that holds it."""
        training, holder = self.training, self.training.link.identity.holder
        owned = decision.layout.runs(holder)
        generation = self.generation.view.generation
        if decision.fresh:
            return self._found(owned, generation)
        mine = next(
            (slot for slot in self.slots if slot.own and slot.record.step == decision.step), None
        )
        half = mine.half if mine else self._spare_half()
        self.memory.reserve(owned)
        received = self._transfer(decision, half, self._decode(decision))
        record = (
            mine.record
            if mine
            else SlotRecord(
                decision.step,
                generation,
                (),
                (),
                {role.name: [] for role in self.memory.shape.roles},
                decision.scalars,
                list(decision.losses),
            )
        )
        training.state.publish(half, record, received, owned, generation)
        return half

    def _found(self, owned: Sequence[Run], generation: int) -> int:
        """Step 0: every owner stores its runs of the initial parameters."""
        state, training = self.training.state, self.training
        self.memory.reserve(owned)
        self.memory.begin(0)
        for run in owned:
            home = state.host(0, training.primary, run)
            home.copy_(training.model.param[run.start : run.stop])
        record = SlotRecord(
            0, generation, tuple(owned), tuple(owned), self.memory.sums(0, owned), {}, []
        )
        self.memory.commit(0, record)
        return 0

    def _spare_half(self) -> int:
        """Half to receive into where none holds the step: the older one."""
        steps = {slot.half: slot.record.step for slot in self.slots if slot.own}
        return min(HALVES, key=lambda half: steps.get(half, -1))

    def _read(self, source: int, role: str, run: Run) -> Tensor:
        slot = self.slots[source]
        itemsize = next(r.itemsize for r in self.memory.shape.roles if r.name == role)
        array = slot.memory.array(
            slot.half, next(r for r in self.memory.shape.roles if r.name == role)
        )
        return torch.from_numpy(array[run.start * itemsize : run.stop * itemsize])

    def _swap(self, sent: list[list[Tensor]], expected: list[int]) -> list[Tensor]:
        """One all-to-all of byte vectors; returns what came, by rank."""
        device = self.communicator.device
        flat = [part for parts in sent for part in parts]
        input = (
            torch.cat(flat).to(device) if flat else torch.empty(0, dtype=torch.uint8, device=device)
        )
        output = torch.empty(sum(expected), dtype=torch.uint8, device=device)
        sizes = [sum(part.numel() for part in parts) for parts in sent]
        self.communicator.exchange(output, input, expected, sizes).wait()
        return list(torch.split(output.cpu(), expected))

    def _decode(self, decision: Recovery) -> dict[tuple[str, Run], Tensor]:
        """Rebuild the units that this rank decodes: (role, run) -> its bytes."""
        if not decision.decodes:
            return {}
        widths = {role.name: role.itemsize for role in self.memory.shape.roles}
        sent: list[list[Tensor]] = [[] for _ in range(self.communicator.size)]
        expected = [0] * self.communicator.size
        for decode in decision.decodes:
            for part in (part for unit in decode.inputs for part in unit):
                if part.src == self.rank:
                    sent[decode.decoder].append(self._read(part.source, part.role, part.run))
                if decode.decoder == self.rank:
                    expected[part.src] += part.run.numel * widths[part.role]
        arrived = _Streams(self._swap(sent, expected))
        found: dict[tuple[str, Run], Tensor] = {}
        for decode in decision.decodes:
            if decode.decoder == self.rank:
                found.update(self._decode_one(decode, arrived, widths))
        return found

    def _decode_one(
        self, decode: Decode, arrived: "_Streams", widths: dict[str, int]
    ) -> dict[tuple[str, Run], Tensor]:
        source, stripe, row = decode.unit
        parity = self.parity[source]
        unit = next(u for u in parity.source.record.units if (u.stripe, u.row) == (stripe, row))
        end = unit.offset + unit.length
        home = parity.memory.parity(parity.half, end)[unit.offset :]
        data = [
            torch.cat(
                [arrived.take(part.src, part.run.numel * widths[part.role]) for part in parts]
                or [torch.empty(0, dtype=torch.uint8)]
            ).numpy()
            for parts in decode.inputs
        ]
        rebuilt = torch.empty(decode.length, dtype=torch.uint8)
        Code(len(data) + 1, 1).decode(data, {row: home}, [rebuilt.numpy()])
        sizes = [run.numel * widths[role] for role, run in decode.lost]
        pieces = torch.split(rebuilt[: sum(sizes)], sizes)
        return dict(zip(decode.lost, pieces, strict=True))

    def _transfer(
        self, decision: Recovery, half: int, rebuilt: dict[tuple[str, Run], Tensor]
    ) -> list[Run]:
        """Send every run to its new owner and store what arrives; returns the runs that arrived."""
        roles = self.memory.shape.roles
        widths = {role.name: role.itemsize for role in roles}
        sent: list[list[Tensor]] = [[] for _ in range(self.communicator.size)]
        incoming: list[tuple[int, str, Run]] = []
        for move in decision.transfers:
            for role in roles:
                if move.src == self.rank:
                    sent[move.dst].append(self._read(move.source, role.name, move.run))
                if move.dst == self.rank:
                    incoming.append((move.src, role.name, move.run))
        for decode in decision.decodes:
            for dst, role_name, run in decode.outputs:
                if decode.decoder == self.rank:
                    sent[dst].append(_slice(rebuilt, role_name, run, widths[role_name]))
                if dst == self.rank:
                    incoming.append((decode.decoder, role_name, run))
        if not decision.transfers and not decision.decodes:
            return []
        expected = [0] * self.communicator.size
        for src, role_name, run in incoming:
            expected[src] += run.numel * widths[role_name]
        arrived = _Streams(self._swap(sent, expected))
        for src, role_name, run in incoming:
            data = arrived.take(src, run.numel * widths[role_name])
            home = self.training.state.host(half, role_name, run)
            home.view(torch.uint8).copy_(data)
        return list(canonical(run for _, _, run in incoming))

    # How it goes on

    def _resume(self, decision: Recovery, reports: Sequence[Report], half: int) -> int:
        """Adopt the state, gather the parameters, deal the leaves that are missing."""
        training, holder = self.training, self.training.link.identity.holder
        step = decision.step
        training.state.adopt(half, step, decision.layout.runs(holder))
        training.optimizer.rebuild(
            training.state.live(training.primary), decision.scalars, started=step > 0
        )
        training.committed = step
        training.losses = decision.losses
        training.enter(self.generation, decision.layout, [report.weight for report in reports])
        if decision.fresh:
            training.gathered = 0
        elif any(report.done != step for report in reports):
            training.gather()
        kept: dict[int, tuple[Node, ...]] = {}
        taken: set[int] = set()
        for report in reports:
            if report.nodes_step == step and step >= 0:
                own = tuple(n for n in report.nodes if not covered([n]) & taken)
                kept[report.rank] = own
                taken |= covered(own)
        training.stack.start(step)
        training.stack.keep(kept.get(self.rank, ()))
        training.deal_leaves(kept)
        if training.settings.parity:
            training.membership.redundancy.schedule()
            training.membership.redundancy.start()
        return len(taken)


class _Streams:
    """Bytes that arrived, taken from the front, by rank."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self._taken = [0] * len(parts)

    def take(self, rank: int, size: int) -> Tensor:
        at = self._taken[rank]
        self._taken[rank] += size
        return self._parts[rank][at : at + size]


def _slice(rebuilt: dict[tuple[str, Run], Tensor], role: str, run: Run, itemsize: int) -> Tensor:
    """Bytes of `run`, which lies within one rebuilt run of its role."""
    for (name, home), data in rebuilt.items():
        if name == role and home.start <= run.start and run.stop <= home.stop:
            return data[(run.start - home.start) * itemsize : (run.stop - home.start) * itemsize]
    raise AssertionError(f"{role} {run} was not rebuilt")


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
