"""S9: as long as no more nodes are lost than the code can spare, nothing of the state is lost."""

from typing import Any

from outlast.cluster.errors import StateLost
from sim.world import Violation


class CodeBound:
    """Counts the nodes lost since the state was last protected as a whole.

    That is when any rank of a generation commits: it has heard then that the parity of the step
    before is complete on all ranks.
    """

    def __init__(self, shape: Any) -> None:
        self._how = shape.how
        self._views: dict[int, Any] = {}
        self._base: Any = None
        self._newest: Any = None
        self._dead: set[str] = set()
        self._corrupt: dict[str, int] = {}  # agent -> generation in which it became so

    def lost(self) -> set[str]:
        """Agents of the protected generation whose memories are gone."""
        if self._base is None:
            return set()
        now = set(self._newest.agents)
        gone = self._dead | self._corrupt.keys()
        return {a for a in self._base.agents if a in gone or a not in now}

    def exceeded(self, more: int = 0) -> bool:
        """Whether with so many more losses too many are lost."""
        if self._base is None:
            return False
        owners = sum(bool(member.workers) for member in self._base.members)
        spare = owners - 1 if self._how.zero == 0 else min(self._how.parity, owners - 1)
        return len(self.lost()) + more > spare

    @property
    def protected(self) -> bool:
        """Whether the state was ever protected as a whole."""
        return self._base is not None

    def spoilt(self, agent: str, *, dead: bool) -> None:
        """What this agent keeps is gone for good, or corrupt until it is made again."""
        if dead:
            self._dead.add(agent)
        elif self._newest is not None:
            self._corrupt[agent] = self._newest.generation

    def installed(self, process: Any, agent: Any, view: Any, *_: object) -> None:
        """An agent is in a view."""
        self._views[view.generation] = view
        if self._newest is None or view.generation > self._newest.generation:
            self._newest = view
            self._base = self._base or view  # a lost start can be made again, mostly

    def point(self, process: Any, name: str, facts: dict[str, Any]) -> None:
        """Somebody commits: see above."""
        training = process.facts.get("training")
        if name == "commit" and training is not None:
            number = training.membership.generation.view.generation
            if self._base is None or number > self._base.generation:
                self._base = self._views[number]
                self._corrupt = {a: g for a, g in self._corrupt.items() if g >= number}

    def failed(self, process: Any, error: BaseException) -> None:
        """A worker gives up."""
        if isinstance(error, StateLost) and not self.exceeded():
            raise Violation(f"S9: {len(self.lost())} nodes are lost: {error}")
