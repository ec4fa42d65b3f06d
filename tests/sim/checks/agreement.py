"""S2 and S10: at every commit each rank holds the bits of the undisturbed twin, in every role, and
the ranks of a generation agree on who owns what."""

from typing import Any

import torch

from sim.script import twin
from sim.world import Violation


class Agreement:
    """Compares with the twin, bit by bit."""

    def __init__(self, task: Any) -> None:
        self._truth = twin(task)

    def committed(self, process: Any, training: Any) -> None:
        """A step is done on this rank."""
        step, truth = training.committed, self._truth[training.committed]
        self._same(process, training)
        if not torch.equal(training.model.param, truth.param):
            raise Violation(f"S2: {process.name} has other parameters after step {step}")

    def entered(self, process: Any, training: Any, *_: object) -> None:
        """A rank goes on from some step."""
        self._same(process, training)

    def _same(self, process: Any, training: Any) -> None:
        step, truth = training.committed, self._truth[training.committed]
        for role, values in truth.roles.items():
            for run, mine in zip(training.state.runs, training.state.live(role), strict=True):
                if not torch.equal(mine, values[run.start : run.stop]):
                    raise Violation(f"S10: {process.name} has another {role} after step {step}")

    def finished(self, job: Any) -> None:
        """The job has ended well: all who say a digest say the same one."""
        if len(set(job.digests.values())) != 1:
            raise Violation(f"S2: digests {job.digests}")
