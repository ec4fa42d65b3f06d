"""`time`, `threading`, `secrets` and `os` as the processes of a world see them."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent

from sim.world import EPOCH, Process, Waiters, World


class Time:
    """The module `time`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def time(self) -> float:
        return EPOCH + self._world.now

    def time_ns(self) -> int:
        return int(1e9 * self.time())

    def monotonic(self) -> float:
        return 1000.0 + self._world.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self._world.pause(seconds)


class Threading:
    """The module `threading`; `current_thread` and the like are the real ones."""

    def __init__(self, world: World) -> None:
        self.Thread = _bound(Thread, world)
        self.Lock = self.RLock = _bound(Lock, world)
        self.Condition = _bound(Condition, world)
        self.Event = _bound(Event, world)

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


def _bound(kind: Callable[..., Any], world: World) -> Callable[..., Any]:
    return lambda *args, **named: kind(world, *args, **named)


class Lock:
    """A lock that its owner may take again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._owner: Any = None
        self._depth = 0
        self._waiters: Waiters = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = getcurrent()
        while self._owner not in (None, me):
            if not blocking:
                return False
            if not self.world.pause(None if timeout < 0 else timeout, self._waiters):
                return False
        self._owner, self._depth = me, self._depth + 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self.world.wake(self._waiters)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition(Lock):
    """A condition with its own lock."""

    def __init__(self, world: World, lock: Lock | None = None) -> None:
        super().__init__(world)
        self._asleep: Waiters = []

    def wait(self, timeout: float | None = None) -> bool:
        depth, self._depth = self._depth, 1
        self.release()
        woken = self.world.pause(timeout, self._asleep)
        self.acquire()
        self._depth = depth
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self.world.now + timeout
        while not (found := predicate()):
            left = None if deadline is None else deadline - self.world.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return found

    def notify_all(self) -> None:
        self.world.wake(self._asleep)

    def notify(self, n: int = 1) -> None:
        self.notify_all()


class Event:
    """A flag to wait for."""

    def __init__(self, world: World) -> None:
        self._condition, self._set = Condition(world), False

    def set(self) -> None:
        self._set = True
        self._condition.notify_all()

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        with self._condition:
            return bool(self._condition.wait_for(self.is_set, timeout))


class Thread:
    """A thread of the process that makes it; an exception in it is a bug of ours."""

    def __init__(
        self, world: World, target: Any = None, args: Any = (), kwargs: Any = None, name: str = "",
        daemon: bool | None = None,
    ) -> None:  # fmt: skip
        self._world, self.name, self.daemon = world, name, daemon
        self._work = lambda: target(*args, **(kwargs or {}))
        self._started, self._ended = False, Event(world)

    def start(self) -> None:
        self._started = True
        self._world.spawn(self._world.current, self._run)

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def is_alive(self) -> bool:
        return self._started and not self._ended.is_set()

    def _run(self) -> None:
        try:
            self._work()
        except GreenletExit:
            raise
        except BaseException as error:
            self._world.tell("crashed", self._world.current, error)
            raise
        self._ended.set()


class Secrets:
    """The module `secrets`: no secrets here, but a history that repeats."""

    def __init__(self, world: World) -> None:
        self._random = world.random

    def randbits(self, count: int) -> int:
        return self._random.getrandbits(count)

    def token_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def token_hex(self, count: int) -> str:
        return self._random.randbytes(count).hex()


class OperatingSystem:
    """The module `os`: processes are those of the world, all else is real."""

    PIDFD = 1 << 20

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getpid(self) -> int:
        return self._world.current.pid

    def kill(self, pid: int, number: int) -> None:
        process: Process = self._world.processes[pid - 1]
        if number == signal.SIGCONT:
            process.resume()
        elif number == signal.SIGSTOP:
            process.stop()
        else:
            process.kill(-number)

    killpg = kill

    def pidfd_open(self, pid: int) -> int:
        return self.PIDFD + pid

    def close(self, file: int) -> None:
        if file < self.PIDFD:
            os.close(file)
