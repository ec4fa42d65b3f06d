"""One thread, virtual time: everything that happens in a simulated job is an event of one heap.

A process is an agent (callbacks, run by `loop.Loop`) or a worker (greenlets). What belongs to a
dead process never runs; what belongs to a stopped one waits until it is continued. All chance
comes from one generator, so a seed is a history: `World.trace` is equal for equal histories.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

EPOCH = 1.7e9
Waiters = list[tuple["Strand", int]]


class Violation(AssertionError):
    """An invariant does not hold; the text begins with its name, such as S1."""


class Timer:
    """An event to come."""

    __slots__ = ("args", "call", "process", "when")

    def __init__(self, when: float, process: "Process | None", call: Any, args: Any) -> None:
        self.when, self.process, self.call, self.args = when, process, call, args

    def cancel(self) -> None:
        """It will not happen."""
        self.call = None


class Strand(greenlet):
    """A thread of a worker; `token` tells a wake-up that is due from one that is stale."""

    process: "Process"
    token = 0


class Process:
    """An agent or a worker of node `node`. `dying`: what it does from here on has no effect."""

    def __init__(self, world: "World", name: str, node: int) -> None:
        self.world, self.name, self.node = world, name, node
        self.pid = len(world.processes) + 1
        self.alive, self.stopped, self.dying, self.silent = True, False, False, False
        self.slowness = 1.0
        self.turns = 0  # grows with the work done, as CPU time does
        self.code = 0
        self.strands: list[Strand] = []
        self.backlog: list[Timer] = []
        self.on_exit: list[Callable[[], None]] = []
        self.facts: dict[str, Any] = {}
        world.processes.append(self)

    def kill(self, code: int = -9, *, silent: bool = False) -> None:
        """It never runs again, also where it is in the middle of something.

        silent: with its machine, so that no connection ends visibly.
        """
        if not self.alive:
            return
        self.dying, self.silent, self.code = True, silent, code
        if self.world.active is self and not isinstance(getcurrent(), Strand):
            self.world.at(0, None, self._end)  # an agent: the callback ends, but nobody hears
            return
        self._end()
        if getcurrent() in self.strands:
            self.world.hub.switch()
            raise GreenletExit

    def _end(self) -> None:
        self.alive = False
        self.world.note("exit", self.name, self.code)
        self.world.tell("exited", self)
        for told in self.on_exit:
            told()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        for timer in self.backlog:
            self.world.push(timer, self.world.now)
        self.backlog = []


class World:
    """The heap, the clock, the processes, and who listens to what happens."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.hub = getcurrent()
        self.processes: list[Process] = []
        self.active: Process | None = None
        self.listeners: list[Any] = []
        self.trace = seed
        self.history: list[str] = []
        self.closed = False
        self.limit_s = 150.0  # by then it must be over; whoever disturbs moves it
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    # ---- events

    def at(self, delay: float, process: Process | None, call: Any, *args: Any) -> Timer:
        """Call in `delay` seconds, in the name of a process that must be alive then."""
        timer = Timer(self.now + delay, process, call, args)
        self.push(timer, timer.when)
        return timer

    def push(self, timer: Timer, when: float) -> None:
        """Put an event (back) on the heap."""
        self._count += 1
        heappush(self._heap, (when, self._count, timer))

    def run(self, over: Callable[[], bool]) -> None:
        """Let things happen until it is over; L-violation if it is not by the limit."""
        while not over():
            if not self._heap:
                raise Violation("L2: nothing will ever happen again")
            when, _, timer = heappop(self._heap)
            process = timer.process
            if timer.call is None or (process is not None and not process.alive):
                continue
            if when > self.limit_s:
                raise Violation(f"L2: undisturbed, the job has not ended at {self.limit_s:.0f} s")
            self.now = max(self.now, when)
            if process is not None and process.stopped:
                process.backlog.append(timer)
                continue
            self.trace = hash((self.trace, self.now, process.pid if process else 0))
            self.active = process
            if process is not None:
                process.turns += 1
            timer.call(*timer.args)
            self.active = None

    # ---- greenlets

    def spawn(self, process: Process, work: Callable[[], None]) -> Strand:
        """A new thread of a worker."""
        strand = Strand(lambda _: work(), self.hub)
        strand.process = process
        process.strands.append(strand)
        self.at(0, process, self._resume, strand, 0, True)
        return strand

    def pause(self, seconds: float | None, waiters: Waiters | None = None) -> bool:
        """Stop the present thread; True when it was woken by way of `waiters`."""
        strand = getcurrent()
        if self.closed:
            raise GreenletExit
        assert isinstance(strand, Strand), "an agent never blocks"
        strand.token += 1
        timer = None
        if seconds is not None:
            timer = self.at(seconds, strand.process, self._resume, strand, strand.token, False)
        if waiters is not None:
            waiters.append((strand, strand.token))
        woken = bool(self.hub.switch())
        if timer is not None:
            timer.cancel()
        return woken

    def wake(self, waiters: Waiters) -> None:
        """Continue all who wait there."""
        for strand, token in waiters:
            self.at(0, strand.process, self._resume, strand, token, True)
        waiters.clear()

    def _resume(self, strand: Strand, token: int, woken: bool) -> None:
        if strand.token == token and not strand.dead:
            strand.token += 1
            strand.switch(woken)

    @property
    def current(self) -> Process:
        """The process whose code is running."""
        strand = getcurrent()
        found = strand.process if isinstance(strand, Strand) else self.active
        assert found is not None
        return found

    # ---- what is told

    def note(self, kind: str, *facts: Any) -> None:
        """A line of the history."""
        self.history.append(f"{self.now:9.4f} {kind} {' '.join(map(str, facts))}")

    def tell(self, kind: str, *facts: Any) -> None:
        """Every listener with a method of that name hears it."""
        for listener in self.listeners:
            heard = getattr(listener, kind, None)
            if heard is not None:
                heard(*facts)

    def close(self) -> None:
        """End what still hangs, so that nothing of this world is left."""
        self.closed = True
        for process in self.processes:
            for strand in process.strands:
                if strand and not strand.dead:
                    strand.throw()
            process.strands.clear()
        self._heap.clear()
