"""Several nodes on one machine: one agent process per node, each in a session of its own.

The launcher only starts, watches and ends; all decisions are the agents'. Invariant: when it
returns, no process that it started is left. An agent that a signal killed is a lost node, and the
job goes on without it.
"""

import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.launch.config import LaunchConfig
from outlast.launch.topology import rack_of

EXIT_KILLED = 1
POLL_S = 0.005
Process = subprocess.Popen[bytes]


def run_standalone(config: LaunchConfig, key: bytes | None) -> int:
    """Run the whole job here; returns its exit code. Without a key a fresh one is made."""
    job = LocalJob(config, key or secrets.token_bytes(32))
    with reserved(Path(config.log_dir)), signals() as wakeup:
        try:
            signalled = watch(job.start(), wakeup, config)
        finally:
            job.end()
    killed = 128 + signalled if signalled else EXIT_KILLED
    return killed if job.code is None else job.code


class LocalJob:
    """The agents of one job on this machine."""

    def __init__(self, config: LaunchConfig, key: bytes) -> None:
        self.config, self._key = config, key
        count = config.max_nodes + config.spares
        width = len(str(count - 1))  # members are ordered by name
        self._names = [f"{config.node or 'node'}{index:0{width}}" for index in range(count)]
        for name in self._names:
            rack_of(name, config.racks, alone=True)  # refuses a node that is in none
        self.agents: list[Process] = []

    @property
    def code(self) -> int | None:
        """Exit code of the job once all agents have ended; None if all of them were killed."""
        ended = [agent.returncode for agent in self.agents if agent.returncode >= 0]
        return min(ended, default=None)  # 0 is agreed among all that are left

    def start(self) -> list[Process]:
        """Start one agent for each node, which meet at a port of their own; returns them."""
        port = free_port()
        config = replace(self.config, endpoints=(f"127.0.0.1:{port}",), local_addr="127.0.0.1")
        self.agents = []
        for name in self._names:
            if self.agents:
                _await_listener(port, self.agents[0])
            self.agents.append(_start(replace(config, node=name), self._key))
        return self.agents

    def end(self) -> None:
        """Leave no agent behind."""
        for agent in self.agents:
            agent.kill()  # no effect on those that have ended
            agent.wait()


def _start(config: LaunchConfig, key: bytes) -> Process:
    source, sink = os.pipe()
    order = {"config": config.as_json(), "key": key.hex(), "launcher": os.getpid()}
    # -P: a directory of the user's must not hide our modules.
    command = [sys.executable, "-P", "-m", "outlast.launch.node", str(source)]
    try:
        agent = subprocess.Popen(command, pass_fds=(source,), start_new_session=True)
    finally:
        os.close(source)
    with os.fdopen(sink, "w") as pipe:
        json.dump(order, pipe)
    return agent


def _await_listener(port: int, agent: Process) -> None:
    """Wait until the first node listens at the endpoint: the founder gets the first ranks.

    Looked up and not dialled: a stranger at the control port would be reported.
    """
    while agent.poll() is None:
        sockets = Path("/proc/net/tcp").read_text()
        if f"0100007F:{port:04X} 00000000:0000 0A" in sockets:
            return
        time.sleep(POLL_S)


def watch(
    agents: Sequence[Process],
    wakeup: socket.socket,
    config: LaunchConfig,
    ended: Callable[[Process, int], Sequence[Process]] = lambda agent, signalled: (),
) -> int:
    """Wait for all agents, handing signals on to them; the first signal's number, or 0.

    Args:
        ended: called when an agent has ended, with the number of the first signal or 0; returns
            agents that were started in its place.
    """
    timing = Timing(heartbeat_s=config.heartbeat_s)
    grace_s = timing.grace_s if config.shutdown_timeout_s is None else config.shutdown_timeout_s
    signalled, running = 0, dict.fromkeys(agents)
    with selectors.DefaultSelector() as selector:

        def follow(agent: Process) -> None:
            selector.register(os.pidfd_open(agent.pid), selectors.EVENT_READ, agent)

        selector.register(wakeup, selectors.EVENT_READ)
        for agent in agents:
            follow(agent)
        while running:
            ready = selector.select(grace_s + timing.no_quorum_s if signalled else None)
            if signalled and not ready:
                return signalled  # an agent hangs: the caller kills
            for found, _ in ready:
                if found.data is not None:
                    found.data.wait()
                    selector.unregister(found.fileobj)
                    os.close(found.fd)
                    del running[found.data]
                    for agent in ended(found.data, signalled):
                        running[agent] = None
                        follow(agent)
                    continue
                for number in wakeup.recv(64):
                    signalled = signalled or number
                    for agent in running:
                        if agent.poll() is None:
                            agent.send_signal(number)
                            agent.send_signal(signal.SIGCONT)
    return signalled


@contextmanager
def signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of the signals that end a job can be read."""
    ours, wakeup = socket.socketpair()
    with ours, wakeup:
        ours.setblocking(False)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.signal(number, lambda *_: None) for number in numbers]
        previous = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        try:
            yield wakeup
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Hold the log directory: two jobs must not write the same metrics."""
    file = os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Misuse(
            f"{directory} belongs to a running job: choose another --rdzv-id or --log-dir"
        ) from None
    finally:
        os.close(file)


def free_port() -> int:
    """A port for the agents to meet at, below the ephemeral ones so that no connection takes it."""
    for _ in range(100):
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise Misuse("no free port between 10000 and 20000 on 127.0.0.1")
