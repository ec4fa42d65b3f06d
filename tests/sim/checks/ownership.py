"""S5: whenever a generation begins, every element has exactly one owner (ZeRO 0: is everywhere),
on whom all ranks agree and who has it committed."""

from typing import Any

from sim.world import Violation


class Ownership:
    """Compares the layouts of all ranks of a generation."""

    def __init__(self) -> None:
        self._layouts: dict[int, Any] = {}

    def entered(self, process: Any, training: Any, generation: Any, layout: Any, *_: Any) -> None:
        """A rank enters a generation with a layout."""
        number, space = generation.view.generation, training.model.space
        known = self._layouts.setdefault(number, layout)
        if known.as_json() != layout.as_json():
            raise Violation(f"S5: {process.name} has another layout of generation {number}")
        if not training.ladder.replicated and not layout.is_partition(space.numel):
            raise Violation(f"S5: generation {number} does not own each element once")
        mine = layout.runs(training.link.identity.holder)
        record = training.state.memory.record(training.state.half)
        if training.state.owned != mine or record is None or record.owned != mine:
            raise Violation(f"S5: {process.name} does not hold what it owns")
