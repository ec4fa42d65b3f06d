"""Nodes of a pretended cluster: each is an `outlast launch` in a session of its own.

Killing a node takes its agent and all its workers at once, as pulling a plug would; starting it
again is the same command. Whatever happens to the drill, no process outlives it: also where it is
killed itself, the kernel ends the agents (PR_SET_PDEATHSIG) and these their workers.
"""

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from outlast.cluster.environment import JOB_KEY, inherited
from outlast.launch.worker_process import PR_SET_PDEATHSIG

GRACE_S = 15.0
_prctl = ctypes.CDLL("libc.so.6").prctl


class Nodes:
    """Starts, kills and restarts nodes by name; leaving the context ends them all.

    Args:
        command: name of a node -> what runs on it. Output goes to `<output>/<node>.log`.
        key: the job's secret.
        environment: further variables.
    """

    def __init__(
        self, names: Sequence[str], command: Callable[[str], Sequence[str]], output: Path,
        key: str, environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.names = tuple(names)
        self.command = command
        self.output = output
        own = {JOB_KEY: key, "OMP_NUM_THREADS": "1"}
        self.environment = {**inherited(), **own, **(environment or {})}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, node: str) -> None:
        """Run the command of a node that is not running."""
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / f"{node}.log").open("ab") as log:
            self.agents[node] = subprocess.Popen(
                list(self.command(node)), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self.environment, start_new_session=True,
                preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip

    def workers(self, node: str) -> list[int]:
        """Process ids of the workers of a node, the longest running first; no dying ones."""
        agent, found = self.agents.get(node), []
        for child in _tree(agent.pid, recursive=False)[1:] if agent else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(found)]

    def signal_node(self, node: str, number: int) -> None:
        """A signal to the agent and everything below it."""
        for process in _tree(self.agents[node].pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill_node(self, node: str) -> float:
        """SIGKILL to the agent and everything below it; returns time.time() of the kill."""
        at = time.time()
        _kill_all(_tree(self.agents[node].pid))
        self.agents.pop(node).wait()
        return at

    def exit_codes(self) -> dict[str, int | None]:
        """Exit code of every node that was not killed; None while it runs."""
        return {node: agent.poll() for node, agent in self.agents.items()}

    def wait(self, timeout_s: float) -> dict[str, int | None]:
        """Wait for all nodes to end by themselves; exit codes, None for one that did not."""
        deadline = time.monotonic() + timeout_s
        while None in self.exit_codes().values() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.exit_codes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        trees = {node: _tree(agent.pid) for node, agent in self.agents.items()}
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.terminate()
                agent.send_signal(signal.SIGCONT)
        self.wait(GRACE_S)
        for tree in trees.values():
            _kill_all(tree)
        for agent in self.agents.values():
            agent.wait()


def outlast(*arguments: str) -> list[str]:
    """The command line of the outlast that is installed beside this Python."""
    return [str(Path(sys.executable).with_name("outlast")), *arguments]


def _tree(pid: int, recursive: bool = True) -> list[psutil.Process]:
    """The process and its descendants, or its children; none for a process that is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=recursive)]
    except psutil.NoSuchProcess:
        return []


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # refuses a process id that was given to somebody else meanwhile


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
