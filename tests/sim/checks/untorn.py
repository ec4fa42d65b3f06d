"""S7: what a worker leaves behind, wherever it was killed, is whole: a half that says that it is
committed holds the bits of its step, and there is one as soon as there was any."""

from typing import Any

import torch

from outlast.checkpoint.memory import HALVES, checksum
from sim.script import twin
from sim.world import Violation


class Untorn:
    """Reads the memory of every worker that has ended."""

    def __init__(self, task: Any) -> None:
        self._truth = twin(task)
        self._stored: dict[Any, int] = {}
        self._publishing = False

    def entered(self, process: Any, training: Any, *_: object) -> None:
        """From here on the worker has state."""
        self._stored[process] = training.committed

    def committed(self, process: Any, training: Any) -> None:
        """The worker has this step."""
        self._stored[process] = training.committed

    def exited(self, process: Any) -> None:
        """A worker is dead."""
        self._publishing = process.facts.get("publishing", False)
        if process in self._stored and not process.facts.get("corrupt"):
            self.read(process.name, process.facts["training"].state.memory, self._stored[process])

    def read(self, name: str, memory: Any, stored: int) -> None:
        """Check both halves of state and of parity."""
        steps = []
        for half in HALVES:
            record = memory.record(half)
            if record is not None:
                steps.append(record.step)
                self._same(name, memory, half, record)
            parity = memory.parity.record(half)
            for unit in parity.units if parity else ():
                data = memory.parity.array(half, unit.offset + unit.length)[unit.offset :]
                if checksum(data) != unit.checksum:
                    raise Violation(f"S7: parity of {name} is torn")
        if self._publishing or not stored:
            return  # the one half is being published again; the start can be made again
        if not steps or max(steps) < stored:
            raise Violation(f"S7: {name} had step {stored} and left {steps}")

    def _same(self, name: str, memory: Any, half: int, record: Any) -> None:
        for role in memory.shape.roles:
            values = self._truth[record.step].roles[role.name]
            for run in record.held:
                found = torch.from_numpy(memory.run_bytes(half, role, run)).view(values.dtype)
                if not torch.equal(found, values[run.start : run.stop]):
                    raise Violation(f"S7: {role.name} of {name} at step {record.step} is torn")
