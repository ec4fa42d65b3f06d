"""What an agent and its worker share: the spawn, the latch, the socket between them.

Each class stands in for the one of its name in the product, on the world it is made for.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit

from outlast.cluster.environment import AGENT_FD, LATCH_FD
from sim.loop import Loop
from sim.threads import OperatingSystem
from sim.world import Process, Waiters, World

Script = Callable[[Process, int, int], None]


class Descriptors:
    """The descriptors that processes inherit: numbers for what lies behind them."""

    def __init__(self, world: World, loops: dict[Process, Loop], script: Script) -> None:
        self.world, self.loops, self.script = world, loops, script
        self.ends: list[AgentEnd] = []
        self.latches: list[Latch] = []
        self.workers: dict[int, Process] = {}  # by the number of its end

    def loop(self) -> Loop:
        """The loop of the agent that is running."""
        return self.loops[self.world.current]


class AgentEnd:
    """`launch.link.Link`: the agent's end. Nothing is ever lost, and nothing takes long."""

    def __init__(self, shared: Descriptors, received: Callable[[dict[str, Any]], None]) -> None:
        self.shared, self.world, self._received = shared, shared.world, received
        self.agent = shared.world.current
        shared.ends.append(self)
        self.file = len(shared.ends) - 1
        self.peer = self
        self.to_agent: deque[bytes] = deque()
        self.to_worker: deque[tuple[bytes, list[int]]] = deque()
        self.waiters: Waiters = []
        self.closed = False
        self.agent.on_exit.append(lambda: self.world.wake(self.waiters))

    def fileno(self) -> int:
        return self.file

    def send(self, message: dict[str, Any], files: list[int] | None = None) -> None:
        if not self.closed and not self.agent.dying:
            self.to_worker.append((json.dumps(message).encode(), [os.dup(f) for f in files or []]))
            self.world.wake(self.waiters)

    def said(self, data: bytes) -> None:
        """The worker sends."""
        if not self.closed:
            self.to_agent.append(data)
            self.world.at(0.0001, self.agent, self._readable)

    def _readable(self) -> None:
        self.shared.loops[self.agent].call_soon(self.drain)

    def drain(self) -> None:
        while self.to_agent and not self.closed:
            self._received(json.loads(self.to_agent.popleft()))

    def close(self) -> None:
        if self.agent.alive and not self.shared.workers.get(self.file, self.agent).alive:
            self.closed = True  # before, it is the copy of the worker's end that is closed


class WorkerEnd:
    """The worker's end, as `socket.socket(fileno=...)`."""

    def __init__(self, end: AgentEnd) -> None:
        self._end = end

    def send(self, data: bytes) -> int:
        if not self._end.agent.alive:
            raise BrokenPipeError
        self._end.said(data)
        return len(data)

    def receive(self) -> tuple[bytes, list[int], int, None]:
        end = self._end
        while not end.to_worker and end.agent.alive:
            end.world.pause(None, end.waiters)
        data, files = end.to_worker.popleft() if end.to_worker else (b"", [])
        return data, files, 0, None


class Sockets:
    """The module `socket`."""

    def __init__(self, shared: Descriptors) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        import socket

        return getattr(socket, name)

    def socket(self, *, fileno: int) -> WorkerEnd:
        return WorkerEnd(self._shared.ends[fileno])

    def recv_fds(self, end: WorkerEnd, size: int, count: int) -> Any:
        return end.receive()


class Latch:
    """Fires within a millisecond of the death of the worker that holds it."""

    def __init__(self, shared: Descriptors, file: int | None = None) -> None:
        self._world, self._latches = shared.world, shared.latches
        if file is None:
            file = len(self._latches)
            self._latches.append(self)
        self.file = file
        self.agent = shared.world.current
        self._fired: Callable[[bool], None] | None = None

    def hold(self) -> None:
        self._world.current.on_exit.append(self._latches[self.file].died)

    def watch(self, fired: Callable[[bool], None]) -> None:
        self._fired = fired

    def died(self) -> None:
        if self._fired is not None:
            delay = 0.0002 + 0.001 * self._world.random.random()
            self._world.at(delay, self.agent, self._fired, True)

    def close(self) -> None:
        self._fired = None


class Popen:
    """A worker of the agent that is running."""

    def __init__(self, shared: Descriptors, command: Any, *, env: dict[str, str], **_: Any) -> None:
        world, agent = shared.world, shared.world.current
        number = int(env[AGENT_FD])
        self._process = process = Process(world, f"{agent.name}.{len(world.processes)}", agent.node)
        self.pid = process.pid
        shared.workers[number] = process
        self._loop = shared.loop()
        process.facts["agent"] = agent
        process.on_exit.append(self._exited)
        agent.on_exit.append(lambda: world.at(0.002 * world.random.random(), None, process.kill))

        def work() -> None:
            try:
                world.pause(0.05 * (1 + world.random.random()))  # the interpreter starts
                shared.script(process, number, int(env[LATCH_FD]))
            except GreenletExit:
                raise
            except SystemExit as ending:
                process.code = int(ending.code or 0)
            except BaseException as error:
                process.code = 1
                world.tell("failed", process, error)
            process.kill(process.code)

        world.spawn(process, work)

    def _exited(self) -> None:
        world, loop = self._process.world, self._loop
        if loop.process.alive:
            key = OperatingSystem.PIDFD + self.pid
            delay = 0.002 + 0.02 * world.random.random()

            def tell() -> None:
                if key in loop.readers:
                    loop.call_soon(loop.readers[key])

            world.at(delay, loop.process, tell)

    def wait(self) -> int:
        return self._process.code


class Subprocess:
    """The module `subprocess`."""

    DEVNULL = -3

    def __init__(self, shared: Descriptors) -> None:
        self.Popen = lambda command, **named: Popen(shared, command, **named)


def state_and_cpu(world: World) -> Callable[[int], tuple[str, int]]:
    """What /proc says of a worker."""

    def found(pid: int) -> tuple[str, int]:
        process = world.processes[pid - 1]
        if not process.alive:
            return "X", -1
        busy = process.facts.get("busy", False)
        return "T" if process.stopped else "R", process.turns + int(1000 * world.now) * busy

    return found


def death_cause(world: World) -> Callable[[int], str]:
    """What the kernel knows of a dying worker."""
    return lambda pid: f"code {world.processes[pid - 1].code}"
