"""S3: nobody sees a step or a generation go back, but for the one step whose parity was not
complete, which is made again."""

from typing import Any

from sim.world import Violation


class Monotonic:
    """Follows every rank, and the newest step that anybody has done."""

    def __init__(self, bound: Any) -> None:
        self._bound = bound  # whether more was lost than the code can spare
        self._generation: dict[Any, int] = {}
        self._step: dict[Any, int] = {}
        self._newest: dict[int, int] = {}  # generation -> newest step done in it

    def committed(self, process: Any, training: Any) -> None:
        """A step is done on this rank."""
        step = training.committed
        if step != self._step[process] + 1:
            raise Violation(f"S3: {process.name} went from {self._step[process]} to {step}")
        self._step[process] = step
        number = training.membership.generation.view.generation
        self._newest[number] = max(self._newest.get(number, 0), step)

    def entered(self, process: Any, training: Any, generation: Any, *_: object) -> None:
        """A rank enters a generation at some step."""
        number, step = generation.view.generation, training.committed
        if number <= self._generation.get(process, 0):
            raise Violation(f"S3: {process.name} goes back to generation {number}")
        # A rank that was cut off may still enter what the others have left long ago.
        newest = max((s for g, s in self._newest.items() if g <= number), default=0)
        if step < newest - 1 and not self._bound.exceeded():
            raise Violation(f"S3: {process.name} goes back from {newest} to {step}")
        self._generation[process], self._step[process] = number, step
