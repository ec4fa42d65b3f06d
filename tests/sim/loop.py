"""The event loop of one simulated agent, with in-memory TCP."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from sim.network import Network
from sim.world import Process

AGAIN_S = 0.05  # how often what a partition holds back is tried again


class Wires:
    """Who listens where, on the network of one world."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.listening: dict[tuple[str, int], tuple[Loop, Callable[[], Any]]] = {}
        self.open: list[Transport] = []

    def cut(self, a: int, b: int) -> None:
        """End all connections between two machines."""
        for end in list(self.open):
            if {end.loop.process.node, end.peer.loop.process.node} == {a, b}:
                end.lose(ConnectionResetError("cut"))

    def died(self, process: Process) -> None:
        """The kernel of a live machine ends the connections of a dead process; a dead machine's
        just fall silent."""
        where = [w for w, (loop, _) in self.listening.items() if loop.process is process]
        for address in where:
            del self.listening[address]
        for end in [end for end in self.open if end.loop.process is process]:
            self.open.remove(end)
            if not process.silent:
                end.finish()


class Loop(asyncio.AbstractEventLoop):
    """What the product uses of an event loop; callbacks run only while the process lives."""

    def __init__(self, process: Process, wires: Wires, host: str) -> None:
        self.process, self.wires, self.host = process, wires, host
        self.world = process.world
        self.readers: dict[int, Callable[[], None]] = {}
        self.tasks: list[Any] = []
        self._broken: Callable[..., None] | None = None
        process.on_exit.append(lambda: wires.died(process))

    # ---- callbacks

    def time(self) -> float:
        return 1000.0 + self.world.now

    def run(self, handle: asyncio.Handle) -> None:
        """Run one callback as this loop."""
        if not handle.cancelled():
            asyncio._set_running_loop(self)
            try:
                handle._run()
            finally:
                asyncio._set_running_loop(None)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.world.at(max(0.0, when - self.time()), self.process, self.run, handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(0, callback, *args, context=context)

    call_soon_threadsafe: Any = call_soon
    create_future: Any = lambda self: asyncio.Future(loop=self)
    _timer_handle_cancelled: Any = lambda self, *_: None
    add_signal_handler = default_exception_handler = get_debug = _timer_handle_cancelled

    def create_task(self, coro: Any, **_: Any) -> Any:
        task: Any = asyncio.Task(coro, loop=self)
        task._log_destroy_pending = False  # a process that is killed leaves its tasks as they are
        self.tasks.append(task)
        return task

    def is_closed(self) -> bool:
        return not self.process.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.world.tell("crashed", self.process, context.get("exception") or context["message"])
        if self._broken is not None:
            self._broken(self, context)

    def set_exception_handler(self, handler: Any) -> None:
        self._broken = handler

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(fd, None) is not None

    # ---- connections

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(0, 0, 0, "", (host, port or 0))]

    async def create_server(self, factory: Any, host: Any, port: Any, **_: Any) -> Any:
        address = (self.host, port or 30000 + self.process.pid)
        if host != [self.host] or address in self.wires.listening:
            raise OSError(f"{address} cannot be bound here")
        self.wires.listening[address] = (self, factory)
        return Server(self.wires, address)

    async def create_connection(self, factory: Any, host: Any, port: Any, **_: Any) -> Any:
        network, here = self.wires.network, self.process.node
        there = int(host.rpartition(".")[2])
        while not network.reachable(here, there):
            await asyncio.sleep(AGAIN_S)  # the caller has a deadline
        await asyncio.sleep(2 * network.delay(here, there))
        found = self.wires.listening.get((host, port))
        if found is None:
            raise ConnectionRefusedError(f"nobody listens at {host}:{port}")
        loop, accept = found
        mine, other = Transport(self, factory()), Transport(loop, accept())
        mine.peer, other.peer = other, mine
        self.wires.open += [mine, other]
        mine.protocol.connection_made(mine)
        loop.call_soon(other.protocol.connection_made, other)
        return mine, mine.protocol


class Server:
    """A listening socket."""

    def __init__(self, wires: Wires, address: tuple[str, int]) -> None:
        self._wires, self._address, self.sockets = wires, address, [self]

    def getsockname(self) -> tuple[str, int]:
        return self._address

    def close(self) -> None:
        self._wires.listening.pop(self._address, None)


class Transport(asyncio.Transport):
    """One end of a connection."""

    peer: "Transport"

    def __init__(self, loop: Loop, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.loop, self.protocol = loop, protocol
        self._sent: deque[tuple[float, bytes | None]] = deque()  # None: the end
        self._closing = self._lost = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def setsockopt(self, *_: Any) -> None:
        """As a socket."""

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return sum(len(data or b"") for _, data in self._sent)

    def write(self, data: Any) -> None:
        if not self._closing and not self.loop.process.dying:
            self._send(bytes(data))

    def close(self) -> None:
        if not self._closing and not self.loop.process.dying:
            self.finish()
            self.loop.call_soon(self.lose, None)

    abort = close

    def finish(self) -> None:
        """The other end sees the end behind what was sent."""
        self._closing = True
        self._send(None)

    def lose(self, error: Exception | None) -> None:
        """Gone, for both."""
        self._closing = True
        if not self._lost:
            self._lost = True
            if self in self.loop.wires.open:
                self.loop.wires.open.remove(self)
            self.loop.call_soon(self.protocol.connection_lost, error)
            if error is not None:
                self.peer.lose(error)

    def _send(self, data: bytes | None) -> None:
        network = self.loop.wires.network
        there = self.peer.loop.process
        delay = network.delay(self.loop.process.node, there.node)
        before = self._sent[-1][0] if self._sent else 0.0
        self._sent.append((max(before, network.world.now + delay), data))
        if len(self._sent) == 1:
            network.world.at(delay, there, self._arrive)

    def _arrive(self) -> None:
        network, peer = self.loop.wires.network, self.peer
        world, there = network.world, peer.loop.process
        if not network.reachable(self.loop.process.node, there.node):
            world.at(AGAIN_S, there, self._arrive)
            return
        while self._sent and self._sent[0][0] <= world.now:
            _, data = self._sent.popleft()
            if peer._lost or peer._closing:
                continue
            if data is None:
                peer.loop.call_soon(peer.lose, None)
            else:
                peer.loop.call_soon(peer._receive, data)
        if self._sent:
            world.at(self._sent[0][0] - world.now, there, self._arrive)

    def _receive(self, data: bytes) -> None:
        if not self._closing:
            self.protocol.data_received(data)
