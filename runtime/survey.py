"""What a rank still has when a generation begins: every half it can read, verified.

A rank reads its own memory; the first worker of a node also reads the memories of the node's dead
workers, which their agent kept. Bytes that do not match their checksum are left out and logged, so
the ladder takes the next source for them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outlast.checkpoint.average import superseded
from outlast.checkpoint.memory import HALVES, Bytes, StateMemory, checksum
from outlast.checkpoint.records import Lineage, ParitySource, SlotRecord, SlotSource
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run, canonical
from outlast.runtime.link import Generation, Link


@dataclass(frozen=True, slots=True)
class Slot:
    """A half that this rank can read, with what is sound in it."""

    memory: StateMemory
    half: int
    record: SlotRecord
    own: bool
    holder: int

    def source(self) -> SlotSource:
        """What the other ranks need to know of it."""
        record = self.record
        return SlotSource(
            own=self.own,
            holder=self.holder,
            step=record.step,
            generation=record.generation,
            owned=record.owned,
            held=canonical(record.held),
            scalars=record.scalars,
            losses=tuple(record.losses),
            norms=record.norms,
            lineage=record.lineage,
            outer=record.outer,
        )

    def read(self, role: str, run: Run) -> Tensor:
        """uint8 view of one run of one role."""
        return torch.from_numpy(self.memory.run_bytes(self.half, self.memory.shape.role(role), run))


@dataclass(frozen=True, slots=True)
class Parity:
    """A half of parity that this rank can read, with the units that are sound."""

    memory: StateMemory
    half: int
    source: ParitySource

    def unit(self, stripe: int, row: int) -> Bytes:
        """Bytes of one unit."""
        units = self.source.record.units
        unit = next(u for u in units if (u.stripe, u.row) == (stripe, row))
        end = unit.offset + unit.length
        return self.memory.parity.array(self.half, end)[unit.offset :]


class Survey:
    """All sources of one rank; their positions in `slots` and `parity` are their names."""

    def __init__(self, link: Link, memory: StateMemory, generation: Generation) -> None:
        self._link, self._memory, self._generation = link, memory, generation
        self.slots: list[Slot] = []
        self.parity: list[Parity] = []
        for readable, own, holder in self._memories():
            for look in (self._look_at_slot, self._look_at_parity):
                for half in HALVES:
                    try:
                        look(readable, half, own, holder)
                    except Corrupt as cause:
                        self._log("memory_unusable", holder=holder, cause=str(cause))

    def own(self, step: int, lineage: Lineage) -> Slot | None:
        """This worker's own half of `step`, unless an averaging has made it void."""
        return next((slot for slot in self._own(lineage) if slot.record.step == step), None)

    def spare_half(self, lineage: Lineage) -> int:
        """Own half to receive into where none holds the wanted step: a void one, or the older."""
        steps = {slot.half: slot.record.step for slot in self._own(lineage)}
        return min(HALVES, key=lambda half: steps.get(half, -1))

    def _own(self, lineage: Lineage) -> Iterator[Slot]:
        for slot in self.slots:
            if slot.own and not superseded(lineage, slot.record.step, slot.record.generation):
                yield slot

    def _memories(self) -> list[tuple[StateMemory, bool, int]]:
        me = self._link.identity.holder
        found = [(self._memory, True, me)]
        if me != self._generation.first_of_node(me):
            return found
        for holder, descriptor in self._link.memories().items():
            try:
                found.append((StateMemory(descriptor, self._memory.shape), False, holder))
            except Corrupt as cause:
                # Its worker died before the memory had its full size.
                self._log("memory_unusable", holder=holder, cause=str(cause))
            finally:
                os.close(descriptor)
        return found

    def _look_at_slot(self, memory: StateMemory, half: int, own: bool, holder: int) -> None:
        record = memory.record(half)
        if record is None:
            return
        torn = memory.torn(half, record)
        for role, run in torn:
            self._log_corrupt(holder, record.step, role, run)
        if torn:
            bad = {run for _, run in torn}
            sound = [i for i, run in enumerate(record.held) if run not in bad]
            sums = {role: [values[i] for i in sound] for role, values in record.sums.items()}
            record = replace(record, held=tuple(record.held[i] for i in sound), sums=sums)
        self.slots.append(Slot(memory, half, record, own, holder))

    def _look_at_parity(self, memory: StateMemory, half: int, own: bool, holder: int) -> None:
        record = memory.parity.record(half)
        if record is None:
            return
        home = memory.parity.array(half, sum(unit.length for unit in record.units))
        sound = []
        for unit in record.units:
            if checksum(home[unit.offset : unit.offset + unit.length]) == unit.checksum:
                sound.append(unit)
            else:
                run = Run(unit.offset, unit.length)
                self._log_corrupt(holder, record.step, "parity", run)
        source = ParitySource(own, replace(record, units=tuple(sound)))
        self.parity.append(Parity(memory, half, source))

    def _log_corrupt(self, holder: int, step: int, role: str, run: Run) -> None:
        self._log("corrupt", holder=holder, step=step, role=role, start=run.start, stop=run.stop)

    def _log(self, event: str, **fields: object) -> None:
        self._link.send(kind="event", event=event, **fields)
