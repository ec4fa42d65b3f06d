"""Faults, seeded: which kinds a history has, when and where they strike.

A fault strikes at a point that a process passes (see `patches`), or at any moment. In a safe
history a fault is left out that would take more nodes than the code can spare, or the quorum: all
must then end well. A wild history leaves nothing out; it may end in a refusal, never in wrong
bits.
"""

from collections.abc import Callable
from typing import Any

from greenlet import getcurrent
from sim.job import Job
from sim.world import Process, Strand

CALM_S = 150.0  # after the last fault the job must end within so long
GIVE_UP_S = 500.0  # a job without a quorum ends when the last agent has given up looking for it


class Swarm:
    """The faults of one history."""

    def __init__(
        self, job: Job, bound: Any, *, wild: bool, kinds: tuple[str, ...] = ()
    ) -> None:
        self.job, self.world, self.random = job, job.world, job.world.random
        self.bound, self.wild = bound, wild
        all_kinds: list[Callable[[Process | None], bool]] = [
            self.kill_worker, self.kill_node, self.hang_worker, self.hang_node, self.partition,
            self.cut, self.slow, self.corrupt_memory, self.corrupt_parity, self.garbage,
        ]  # fmt: skip
        drawn = self.random.sample(all_kinds, self.random.randint(1, 4))
        self.kinds = [getattr(self, kind) for kind in kinds] or drawn
        self.left = self.random.choice([1, 2, 3, 4, 6, 9])
        self._rate = self.random.choice([0.2, 1.0, 3.0])
        self._hot = 0.0  # until then faults are likely: a cascade
        self._unsettled = 0.0  # until then it is not known whom a cut has cost its place
        self._away: set[int] = set()  # machines that are down, stopped or cut off
        self._calm_s = GIVE_UP_S if wild else CALM_S
        self.world.limit_s = self._calm_s
        for _ in range(self.left if self.random.random() < 0.5 else 0):
            self.world.at(6 * self.random.random(), None, self._strike, None)

    # ---- when

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
        return {}

    def _strike(self, process: Process | None) -> None:
        if self.left > 0 and self.job.agents and not self.job.over:
            self._extend()
            kind = self.random.choice(self.kinds)
            if kind(process) and isinstance(getcurrent(), Strand):
                self.world.pause(0)  # who was killed or stopped here goes no further

    def _extend(self) -> None:
        self.world.limit_s = self.world.now + self._calm_s

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def done() -> None:
            self._extend()
            act()

        self.world.at(seconds, None, done)

    # ---- whom

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

    # ---- what

    def kill_worker(self, process: Process | None) -> bool:
        """SIGKILL."""
        worker = self._worker(process)
        if worker is None:
            return False
        self._told("kill-worker", worker.name)
        worker.kill()
        return True

    def kill_node(self, process: Process | None) -> bool:
        """The agent and its workers, by a crash of the agent or of the machine."""
        node = self._node(process)
        agent = self.job.agents[node]
        if not agent.alive or node in self._away or not self._may_lose(node):
            return False
        silent = self.random.random() < 0.5
        self._told("kill-node", f"{node} silent={silent}")
        self._lose(node)
        self._away.add(node)
        if silent:
            self.job.network.dead.add(node)
        founded = self.bound.founded  # before, the job waits for all its nodes
        if self.random.random() < (0.8 if founded else 1.0):
            self._later(0.2 + 6 * self.random.random(), lambda: self._boot(node))
        victims = self.job.workers(node) if silent else []
        for victim in [v for v in victims if v is not process]:
            victim.kill(silent=True)
        agent.kill(silent=silent)
        if silent and process in victims:
            process.kill(silent=True)
        return True

    def _boot(self, node: int) -> None:
        self._away.discard(node)
        if not self.job.over:
            self.job.boot(node)

    def _lose(self, node: int) -> None:
        agent = self._agent(node)
        if agent is not None:
            self.bound.spoilt(agent.agent, dead=True)

    def hang_worker(self, process: Process | None) -> bool:
        """SIGSTOP, for a while or for ever."""
        worker = self._worker(process)
        if worker is None or worker.stopped:
            return False
        worker.stop()
        if self.random.random() < 0.6:
            self._later(4 * self.random.random(), worker.resume)
        return self._told("hang-worker", worker.name)

    def hang_node(self, process: Process | None) -> bool:
        """The whole machine stands still, and goes on."""
        node = self._node(process)
        agent = self.job.agents[node]
        if agent.stopped or node in self._away or not self._may_lose(node):
            return False
        stopped = [agent, *self.job.workers(node)]
        self._lose(node)
        self._away.add(node)
        for victim in stopped:
            victim.stop()

        def resume() -> None:
            self._away.discard(node)
            for victim in stopped:
                victim.resume()

        self._later(5 * self.random.random(), resume)
        return self._told("hang-node", node)

    def partition(self, process: Process | None) -> bool:
        """One machine is cut off, and comes back."""
        node = self._node(process)
        if self.job.network.side or node in self._away or not self._may_lose(node):
            return False
        self._lose(node)
        self._away.add(node)
        self.job.network.side = {node: 1}

        def heal() -> None:
            self._away.discard(node)
            self.job.network.side = {}

        self._later(9 * self.random.random(), heal)
        return self._told("partition", node)

    def cut(self, process: Process | None) -> bool:
        """The connections of two agents end, and may be made again."""
        if len(self.job.agents) < 2:
            return False
        a, b = self.random.sample(list(self.job.agents), 2)
        if not (self._may_lose(a) and self._may_lose(b)):
            return False  # a lost connection is as good as a lost node
        self._unsettled = self.world.now + 1.0
        self.job.wires.cut(a, b)
        return self._told("cut", (a, b))

    def slow(self, process: Process | None) -> bool:
        """A rank computes slowly, which is no fault of its own."""
        worker = self._worker(process)
        if worker is None:
            return False
        worker.slowness = 20 * self.random.random()
        return self._told("slow", worker.name)

    def corrupt_memory(self, process: Process | None) -> bool:
        """A worker dies and some bits of its memory flip."""
        worker = self._worker(process)
        if worker is None or not self._may_lose(worker.node) or "training" not in worker.facts:
            return False
        agent = self._agent(worker.node)
        if agent is None:
            return False
        worker.facts["corrupt"] = True
        self.bound.spoilt(agent.agent, dead=False)
        memory = worker.facts["training"].state.memory
        for half in (0, 1):
            for role in memory.shape.roles:
                memory.array(half, role)[self.random.randrange(memory.shape.numel)] ^= 64
        self._told("corrupt-memory", worker.name)
        worker.kill()
        return True

    def corrupt_parity(self, process: Process | None) -> bool:
        """Bits of what a living worker keeps for others flip."""
        worker = self._worker(process)
        if worker is None or not self._may_lose(worker.node) or "training" not in worker.facts:
            return False
        agent = self._agent(worker.node)
        if agent is None:
            return False
        self.bound.spoilt(agent.agent, dead=False)
        worker.facts["corrupt"] = True
        memory = worker.facts["training"].state.memory.parity
        for half in (0, 1):
            memory.array(half, 4096)[self.random.randrange(4096)] ^= 64
        return self._told("corrupt-parity", worker.name)

    def garbage(self, process: Process | None) -> bool:
        """A worker says nonsense to its agent, and a stranger to a listening agent."""
        agents = [a for a in self.job.agents.values() if a.alive]
        for end in self.job.shared.ends[-3:]:
            for line in (b'{"kind": "store", "generation": -1}', b'{"kind": 7}', b"[]"):
                end.said(line)
        return bool(agents) and self._told("garbage", "to all")
