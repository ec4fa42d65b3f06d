"""One simulated job: its nodes, its agents, its workers, and how it ended."""

import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from outlast.launch.config import LaunchConfig
from outlast.launch.node import _incarnations
from outlast.runtime.link import AgentLink
from sim.loop import Loop, Wires
from sim.network import Network
from sim.processes import Descriptors
from sim.script import Data, Redundancy, Task, loss_of, prepare
from sim.world import Process, World

PORT = 29400


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the job is, what it trains, and how that is protected."""

    nodes: int = 3
    workers: int = 1
    task: Task = field(default_factory=Task)
    how: Redundancy = field(default_factory=Redundancy)


class Console:
    """What the operator would see."""

    def __init__(self, world: World) -> None:
        self._world = world

    def line(self, text: str) -> None:
        self._world.note("says", text.partition("; logs in")[0])

    def failure(self, text: str, trace: str) -> None:
        self._world.note("failure", text)


class Job:
    """The machines 1..n of a job on a world; `ends` are exit codes of agents by node."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world, self.shape = world, shape
        self.network = Network(world)
        self.wires = Wires(self.network)
        self.loops: dict[Process, Loop] = {}
        self.shared = Descriptors(world, self.loops, self.script)
        self.agents: dict[int, Process] = {}
        self.ends: dict[int, int] = {}
        self.digests: dict[str, str] = {}
        self.booting = 0  # machines that are about to come up again
        self._newest = 0  # generation
        self._directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.log_dir = Path(self._directory.name)

    def close(self) -> None:
        """Drop what the killed have left, without a word, and what is on disk."""
        told, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            for loop in self.loops.values():
                for task in loop.tasks:
                    with contextlib.suppress(RuntimeError):
                        task.get_coro().close()
                loop.tasks.clear()
        finally:
            sys.unraisablehook = told
        self.loops.clear()
        self._directory.cleanup()

    # ---- agents

    def boot(self, node: int) -> None:
        """A machine comes up and starts its agent."""
        self.network.dead.discard(node)
        self.ends.pop(node, None)
        host = f"10.0.0.{node}"
        config = LaunchConfig(
            script="script", job="sim", min_nodes=self.shape.nodes, max_nodes=self.shape.nodes,
            nproc_per_node=self.shape.workers, endpoints=(f"10.0.0.1:{PORT}", f"10.0.0.2:{PORT}"),
            node=f"node{node}", local_addr=host, log_dir=str(self.log_dir),
        )  # fmt: skip
        process = Process(self.world, f"node{node}", node)
        loop = self.loops[process] = Loop(process, self.wires, host)
        self.agents[node] = process

        async def live() -> None:
            console: Any = Console(self.world)
            code = await _incarnations(config, b"k" * 16, console)
            self.ends[node] = code
            self.world.note("ended", process.name, code)
            process.kill(code)

        self.world.at(0.0, process, partial(_start, loop, live))

    def workers(self, node: int | None = None) -> list[Process]:
        """The living workers, of one machine or of all."""
        return [
            p for p in self.world.processes
            if p.alive and "agent" in p.facts and node in (None, p.node)
        ]  # fmt: skip

    @property
    def over(self) -> bool:
        """Every agent has ended, but for those that came when the job was over, and those that
        were cut off while it ended: they wait for `join_s`."""
        agents = [p.facts.get("as agent") for p in self.agents.values() if p.alive]
        if 0 in self.ends.values():
            views = [agent.view for agent in agents if agent is not None]
            return all(view is None or view.generation < self._newest for view in views)
        return not agents and not self.booting and len(self.agents) == self.shape.nodes

    def born(self, process: Process, agent: Any, *_: object) -> None:
        """An agent begins, or begins anew after it was evicted."""
        process.facts["as agent"] = agent

    def installed(self, process: Process, agent: Any, view: Any, *_: object) -> None:
        """An agent is in a view."""
        self._newest = max(self._newest, view.generation)

    # ---- workers

    def prepared(self, process: Process, training: Any, *_: object) -> None:
        """A worker has state."""
        process.facts["training"] = training

    def script(self, process: Process, number: int, latch: int) -> None:
        """The life of a worker."""
        world = self.world

        def read(index: int) -> None:
            process.facts.setdefault("read", []).append(index)

        link = AgentLink(number, latch)
        run, model = prepare(link, self.shape.task, self.shape.how)
        for step in run.steps(self.shape.task.steps):
            with step:
                for batch in step.batches(Data(read), batch_size=2):
                    loss = loss_of(model, batch)
                    world.pause(process.slowness * 0.02 * (0.5 + world.random.random()))
                    step.backward(loss)
            run.log(loss=step.loss)
        self.digests[process.name] = run.digest()
        world.note("digest", process.name, self.digests.get(process.name))
        run.close()


def _start(loop: Loop, live: Any) -> None:
    loop.call_soon(lambda: loop.create_task(live()))


__all__ = ["Job", "Shape"]
