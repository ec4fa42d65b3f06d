"""S4: one view per generation, and who is left behind in an old one trains no further."""

from typing import Any

from sim.world import Violation


class Fencing:
    """Remembers every view, and what is done in a generation that is over."""

    def __init__(self) -> None:
        self._views: dict[int, Any] = {}
        self._installed: dict[str, int] = {}
        self._entered = 0
        self._late: dict[tuple[Any, int], int] = {}

    def installed(self, process: Any, agent: Any, view: Any, *_: object) -> None:
        """An agent is in a view."""
        if self._views.setdefault(view.generation, view) != view:
            raise Violation(f"S4: two views of generation {view.generation}")
        if view.generation <= self._installed.get(agent.agent, 0):
            raise Violation(f"S4: {process.name} goes back to generation {view.generation}")
        self._installed[agent.agent] = view.generation

    def entered(self, process: Any, training: Any, generation: Any, *_: object) -> None:
        """A worker goes on in a view."""
        self._entered = max(self._entered, generation.view.generation)

    def committed(self, process: Any, training: Any) -> None:
        """What was under way may end; a step begun later is two generations at once."""
        number = training.membership.generation.view.generation
        if number < self._entered:
            key = (process, number)
            self._late[key] = self._late.get(key, 0) + 1
            if self._late[key] > 1:
                raise Violation(f"S4: {process.name} trains on in generation {number}")
