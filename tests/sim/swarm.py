"""Faults, seeded: which kinds a history has, when and where they strike.

A fault strikes at a point that a process passes (see `patches`), or at any moment. In a safe
history a fault is left out that would take more nodes than the code can spare, or the quorum: all
must then end well. A wild history leaves nothing out; it may end in a refusal, never in wrong
bits.
"""

from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from sim.faults import Faults
from sim.job import Job
from sim.world import Process, Strand


class Swarm(Faults):
    """The faults of one history; `kinds` by name, or a few by chance."""

    def __init__(
        self, job: Job, bound: Any, *, wild: bool, kinds: tuple[str, ...] = ()
    ) -> None:
        super().__init__(job, bound, wild=wild)
        every: list[Callable[[Process | None], bool]] = [
            self.kill_worker, self.kill_node, self.hang_worker, self.hang_node, self.partition,
            self.cut, self.slow, self.corrupt_memory, self.corrupt_parity, self.garbage,
            self.poison,
        ]  # fmt: skip
        drawn = self.random.sample(every, self.random.randint(1, 4))
        self.kinds = [getattr(self, kind) for kind in kinds] or drawn
        self._rate = self.random.choice([0.2, 1.0, 3.0])
        for _ in range(self.left if self.random.random() < 0.5 else 0):
            self.world.at(6 * self.random.random(), None, self._strike, None)

    def reach(self, point: str, **facts: Any) -> dict[str, Any]:
        """A process passes a point."""
        process = self.world.current
        self.world.tell("point", process, point, facts)
        named = "." not in point
        rate = self._rate * (0.012 if named else 0.0015)
        if self.world.now < self._hot:
            rate *= 8
        chance = self.random.random()
        if chance < rate:
            self._strike(process)
        elif chance > 0.98 and isinstance(getcurrent(), Strand):
            self.world.pause(0.002 * self.random.random())
        poison = process.facts.get("poison") if point == "leaf" else None
        return {"poison": poison} if poison else {}

    def _strike(self, process: Process | None) -> None:
        if self.left > 0 and self.job.agents and not self.job.over:
            self._extend()
            kind = self.random.choice(self.kinds)
            if kind(process) and isinstance(getcurrent(), Strand):
                self.world.pause(0)  # who was killed or stopped here goes no further
