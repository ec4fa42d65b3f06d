"""Whom a fault may strike, so that a safe history can still end well."""

from collections.abc import Callable
from typing import Any

from sim.job import Job
from sim.world import Process

CALM_S = 150.0  # after the last fault the job must end within so long
GIVE_UP_S = 500.0  # a job without a quorum ends when the last agent has given up looking for it


class Aim:
    """What is left of the job; `left` faults are to come."""

    def __init__(self, job: Job, bound: Any, *, wild: bool) -> None:
        self.job, self.world, self.random = job, job.world, job.world.random
        self.bound, self.wild = bound, wild
        self.left = self.random.choice([1, 2, 3, 4, 6, 9])
        self._hot = 0.0  # until then faults are likely: a cascade
        self._unsettled = 0.0  # until then it is not known whom a cut has cost its place
        self._away: set[int] = set()  # machines that are down, stopped or cut off
        self._calm_s = GIVE_UP_S if wild else CALM_S
        self.world.limit_s = self._calm_s

    def _extend(self) -> None:
        self.world.limit_s = self.world.now + self._calm_s

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def done() -> None:
            self._extend()
            act()

        self.world.at(seconds, None, done)

    def _worker(self, process: Process | None) -> Process | None:
        """The one that passes, mostly, or any."""
        mine = process is not None and process.alive and "agent" in process.facts
        if mine and self.random.random() < 0.7:
            return process
        workers = [w for w in self.job.workers() if w.alive]
        return self.random.choice(workers) if workers else None

    def _node(self, process: Process | None) -> int:
        if process is not None and self.random.random() < 0.6:
            return process.node
        return self.random.choice(list(self.job.agents))

    def _agent(self, node: int) -> Any:
        """The product's agent there, or None."""
        process = self.job.agents[node]
        return process.facts.get("as agent") if process.alive else None

    def _may_lose(self, node: int) -> bool:
        """Whether the job can go on without this machine."""
        agent = self._agent(node)
        if self.wild or agent is None or agent.view is None:
            return agent is not None or self.wild
        if self.world.now < self._unsettled:
            return False
        if agent.agent not in self.bound.lost() and self.bound.exceeded(1):
            return False
        there = [
            self._agent(n) for n in self.job.agents
            if n != node and n not in self._away and self._agent(n) is not None
        ]  # fmt: skip
        names = [a.agent for a in there]
        for other in there:
            machine = other.mesh._machine
            views = [machine.view] if machine.view else []
            votes = machine.agreement
            if votes is not None and votes.accepted is not None:
                views.append(type(votes.view)(0, votes.accepted[1]))
            if not all(view.quorum(names) for view in views):
                return False
        return bool(there)

    def _told(self, kind: str, where: object) -> bool:
        self.world.note("FAULT", kind, where)
        self.left -= 1
        self._hot = self.world.now + self.random.choice([0.0, 0.5, 3.0])
        return True
