"""Puts a world under the product: its clocks, threads, sockets, processes and process groups.

Nothing of the product is copied here. In every module of it, a name that stands for the real
thing stands for the simulated one while a world runs; and a few methods tell the checkers what
happens, or are places where a worker can be killed.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import outlast.cluster.failpoint as failpoint
import outlast.launch.node
import outlast.runtime.run  # noqa: F401
from outlast.checkpoint import memory
from outlast.cluster.latch import Latch as RealLatch
from outlast.launch import agent, plain_job, worker_process
from outlast.launch.event_log import EventLog
from outlast.launch.link import Link
from outlast.runtime import collectives, leaf_stack, run, shard_state, training
from sim import processes, threads
from sim.group import Groups
from sim.network import Network
from sim.world import World


class Graveyard:
    """Interrupts at once; what hangs holds nothing up here."""

    def bury(self, communicator: Any) -> None:
        communicator.interrupt()

    def close(self, *_: object) -> None:
        """Nothing is kept."""


class Log:
    """`EventLog`, told to the listeners."""

    def __init__(self, world: World, directory: Any, node: str, name: str) -> None:
        self._world, self._name = world, name

    def write(self, event: str, fields: dict[str, Any]) -> None:
        self._world.note("event", self._world.current.name, event, fields)
        self._world.tell("event", self._name, event, fields)

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def simulated(
    world: World, network: Network, shared: processes.Descriptors, reach: Callable[..., Any]
) -> Iterator[None]:
    """Run the product on `world`; `reach` is called at every failpoint and every other place
    where a worker can stop."""
    groups = Groups(network)
    stand_ins = [
        (time, threads.Time(world)),
        (threading, threads.Threading(world)),
        (secrets, threads.Secrets(world)),
        (os, threads.OperatingSystem(world)),
        (socket, processes.Sockets(shared)),
        (subprocess, processes.Subprocess(shared)),
        (RealLatch, lambda file=None: processes.Latch(shared, file)),
        (Link, lambda received: processes.AgentEnd(shared, received)),
        (EventLog, lambda *who: Log(world, *who)),
        (failpoint.reach, reach),
        (collectives.Graveyard, Graveyard),
        (collectives.connect, groups.connect),
        (collectives.shut_down, groups.shut_down),
        (worker_process._death_cause, processes.death_cause(world)),
        (plain_job.is_free, lambda port: True),
        (worker_process._state_and_cpu, processes.state_and_cpu(world)),
    ]
    real = {id(thing): stand_in for thing, stand_in in stand_ins}
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("outlast.", "concurrent.futures")) and module is not None:
                for key, value in list(vars(module).items()):
                    if id(value) in real:
                        stack.enter_context(patch.object(module, key, real[id(value)]))
        for owner, method, wrapped in _told(world, reach):
            stack.enter_context(patch.object(owner, method, wrapped))
        yield


def _told(world: World, reach: Callable[..., Any]) -> Iterator[tuple[Any, str, Any]]:
    """Methods that tell what they have done, or where a worker can be killed half way."""

    def told(owner: Any, method: str, kind: str) -> tuple[Any, str, Any]:
        original = getattr(owner, method)

        def wrapped(self: Any, *args: Any, **named: Any) -> Any:
            found = original(self, *args, **named)
            world.tell(kind, world.current, self, *args)
            return found

        return owner, method, wrapped

    def torn(owner: Any, method: str) -> tuple[Any, str, Any]:
        original = getattr(owner, method)

        def wrapped(self: Any, *args: Any, **named: Any) -> Any:
            reach(f"{owner.__name__}.{method}")
            return original(self, *args, **named)

        return owner, method, wrapped

    publish = shard_state.ShardState.publish

    def publishing(self: Any, *args: Any) -> None:
        facts = world.current.facts
        facts["publishing"] = True
        publish(self, *args)
        facts["publishing"] = False

    yield shard_state.ShardState, "publish", publishing
    yield told(training.Training, "__init__", "prepared")
    commit = training.Training.commit

    def committed(self: Any) -> None:
        before = self.committed
        commit(self)
        if self.committed != before:  # else somebody computes wrongly: nothing was committed
            world.tell("committed", world.current, self)

    yield training.Training, "commit", committed
    yield told(run.Run, "log", "logged")
    yield told(training.Training, "enter", "entered")
    yield told(leaf_stack.LeafStack, "push", "leaf")
    yield told(agent.Agent, "_install", "installed")
    yield told(agent.Agent, "__init__", "born")
    yield told(memory.ParityMemory, "commit", "parity")
    yield torn(memory._Marked, "begin")
    yield torn(memory._Marked, "commit")
    yield torn(memory.StateMemory, "sums")
    yield torn(shard_state.ShardState, "host")
