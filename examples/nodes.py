"""Nodes of a pretended cluster: each is an `outlast launch` in a session of its own.

Killing a node takes its agent and all its workers at once, as pulling a plug would; starting it
again is the same command. Whatever happens to the demo, no process outlives it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

GRACE_S = 15.0


class Nodes:
    """Starts, kills and restarts nodes by name; leaving the context ends them all.

    command: what runs on each node, `{node}` standing for its name. Output goes to
    `<output>/<node>.log`.
    """

    def __init__(
        self, names: Sequence[str], command: Sequence[str], output: Path, key: str
    ) -> None:
        self.names = tuple(names)
        self.command = tuple(command)
        self.output = output
        self.environment = {**os.environ, "OUTLAST_JOB_KEY": key, "OMP_NUM_THREADS": "1"}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, node: str) -> None:
        """Run the command of a node that is not running."""
        self.output.mkdir(parents=True, exist_ok=True)
        command = [word.replace("{node}", node) for word in self.command]
        with (self.output / f"{node}.log").open("ab") as log:
            self.agents[node] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self.environment, start_new_session=True,
            )  # fmt: skip

    def workers(self, node: str) -> list[int]:
        """Process ids of the workers of a node, the longest running first."""
        children = _tree(self.agents[node].pid)[1:]
        script = next(word for word in self.command if word.endswith(".py"))
        workers = [child for child in children if _runs(child, script)]
        return [child.pid for child in sorted(workers, key=_created)]

    def kill_worker(self, node: str) -> tuple[float, int]:
        """SIGKILL to one worker; returns (time.time() of the kill, its process id)."""
        pid = self.workers(node)[0]
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return at, pid

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
        self.wait(GRACE_S)
        for tree in trees.values():
            _kill_all(tree)
        for agent in self.agents.values():
            agent.wait()


def outlast(*arguments: str) -> list[str]:
    """The command line of the outlast that is installed beside this Python."""
    return [str(Path(sys.executable).with_name("outlast")), *arguments]


def _tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; none for a process that is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()  # refuses a process id that was given to somebody else meanwhile
        except psutil.NoSuchProcess:
            continue


def _runs(process: psutil.Process, script: str) -> bool:
    try:
        return script in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _created(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return float("inf")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
