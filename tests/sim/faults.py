"""The kinds of faults: each strikes the process that passes or another, and says whether it did."""


from sim.aim import Aim
from sim.world import Process


class Faults(Aim):
    """A method per kind."""

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
        self._lose(node, dead=True)
        self._away.add(node)
        if silent:
            self.job.network.dead.add(node)
        # Before a worker has spoken the job may be a plain one, and waits for all its nodes.
        trained = [w.facts["training"] for w in self.world.processes if "training" in w.facts]
        founded = any(training.gathered >= 0 for training in trained)
        if self.random.random() < (0.8 if founded else 1.0):
            self.job.booting += 1
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
        self.job.booting -= 1
        if not self.job.over:
            self.job.boot(node)

    def _lose(self, node: int, *, dead: bool) -> None:
        agent = self._agent(node)
        if agent is not None:
            self.bound.spoilt(agent.agent, dead=dead)

    def hang_worker(self, process: Process | None) -> bool:
        """SIGSTOP, for a while or for ever."""
        worker = self._worker(process)
        # Before it has attached, a worker may be as slow as it likes, for `join_s`.
        if worker is None or worker.stopped or "training" not in worker.facts:
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
        self._lose(node, dead=False)
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
        self._lose(node, dead=False)
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
        if worker is None or not self._may_lose(worker.node) or not self.bound.protected:
            return False
        agent = self._agent(worker.node)
        if agent is None or "training" not in worker.facts:
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
        if worker is None or not self._may_lose(worker.node) or not self.bound.protected:
            return False
        agent = self._agent(worker.node)
        if agent is None or "training" not in worker.facts:
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

    def poison(self, process: Process | None) -> bool:
        """A rank computes NaN from now on, among at least three others that do not."""
        worker = self._worker(process)
        sound = [w for w in self.job.workers() if "poison" not in w.facts]
        if worker is None or len(sound) < 4 or len({w.node for w in sound}) < 3:
            return False
        if any("poison" in w.facts for w in self.world.processes):
            return False  # who has gone that way does not come back
        worker.facts["poison"] = "nan"
        return self._told("poison", worker.name)
