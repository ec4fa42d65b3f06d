"""Four nodes of one job on this machine, and a hand on each of them at a named point.

Each node is an `outlast launch` in a session of its own, in a network namespace where the test
needs a partition. `Hand` listens where armed processes ask what to do: the first that passes the
given point, and is meant, triggers the fault before it gets its answer.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from outlast.launch.namespaces import Namespaces

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "runtime" / "training_script.py")
LAUNCH = [sys.executable, "-c", "from outlast.launch.cli import main; main()", "launch"]
WAIT_S = 150.0


class Hand:
    """Answers armed points; runs `act` once, when `point` is passed by a process of `node`."""

    def __init__(self, path: Path, point: str, node: str, act: Callable[[], None]) -> None:
        self.path, self.point, self.node, self.act = path, point, node, act
        self.ready = threading.Event()  # from now on the fault may happen
        self.done = threading.Event()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(64)
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line:
            said = json.loads(line.makefile("rb").readline() or b"{}")
            meant = said.get("point") == self.point and self.node in ("", said.get("node"))
            with self._lock:
                if meant and self.ready.is_set() and not self.done.is_set():
                    self.act()
                    self.done.set()
            try:
                line.sendall(b"{}\n")
            except OSError:
                return  # the one who asked is no more

    def close(self) -> None:
        self._server.close()


class Cluster:
    """A job of `nodes` with one worker each; `points` are armed in all its processes."""

    def __init__(
        self, directory: Path, nodes: list[str], network: Namespaces | None, *script: str
    ) -> None:
        self.directory, self.nodes, self.network = directory, nodes, network
        directory.mkdir(parents=True, exist_ok=True)
        self.script = script
        self.socket = directory / "hand"
        self.points = ""
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._key = secrets.token_hex(32)
        self._ports = free_ports(2)

    def start(self) -> None:
        """Start every node."""
        for node in self.nodes:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node that is not running."""
        address = self.network.address if self.network else lambda _: "127.0.0.1"
        ports = [29400, 29400] if self.network else self._ports
        pairs = zip(self.nodes, ports, strict=False)
        endpoint = ",".join(f"{address(one)}:{port}" for one, port in pairs)
        command = [
            *(self.network.prefix(node) if self.network else []), *LAUNCH,
            "--nnodes", str(len(self.nodes)), "--rdzv-endpoint", endpoint, "--rdzv-id", "job",
            "--node-name", node, "--local-addr", address(node), "--log-dir", str(self.directory),
            SCRIPT, *self.script,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTLAST_JOB_KEY": self._key}
        if self.points:
            environment["OUTLAST_DRILL"] = f"{self.socket}:{self.points}"
        with (self.directory / f"{node}.out").open("ab") as out:
            self.agents[node] = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    # ---- faults

    def tree(self, node: str) -> list[psutil.Process]:
        """The agent of a node and everything below it."""
        agent = psutil.Process(self.agents[node].pid)
        return [agent, *agent.children(recursive=True)]

    def workers(self, node: str) -> list[psutil.Process]:
        """The workers of a node."""
        return [p for p in self.tree(node)[1:] if SCRIPT in p.cmdline()]

    def strike(self, kind: str, node: str, worker_only: bool) -> None:
        """Kill, hang or partition a node or its worker."""
        if kind == "partition":
            assert self.network is not None
            self.network.cut([node])
            return
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        send(self.workers(node) if worker_only else self.tree(node), number)

    def heal(self, kind: str, node: str) -> None:
        """Undo what can be undone."""
        if kind == "partition":
            assert self.network is not None
            self.network.heal([node])
        elif kind == "hang" and self.agents[node].poll() is None:
            send(self.tree(node), signal.SIGCONT)

    # ---- what the job says

    @property
    def steps(self) -> list[int]:
        """Steps in metrics.jsonl, in the order of the file."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of that name on all nodes, in order of time."""
        texts = [path.read_text() for path in self.directory.glob("events-*.jsonl")]
        events = [json.loads(line) for text in texts for line in text.splitlines() if line]
        found = [event for event in events if event["event"] == name]
        return sorted(found, key=lambda event: float(event["time"]))

    def digests(self, node: str) -> list[str]:
        """Digests that workers of a node printed."""
        printed = (self.directory / f"{node}.out").read_text(errors="replace")
        return re.findall(r"digest ([0-9a-f]{64})", printed)

    def wait(self, what: Callable[[], Any], name: str) -> None:
        """Until `what` holds."""
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < deadline, f"no {name}:\n{self.shown()}"
            time.sleep(0.02)

    def end(self, nodes: list[str]) -> dict[str, int | None]:
        """Exit codes of nodes once they have ended."""
        self.wait(lambda: all(self.agents[n].poll() is not None for n in nodes), "end")
        return {node: self.agents[node].poll() for node in nodes}

    def shown(self) -> str:
        """The ends of all outputs."""
        files = [self.directory / f"{node}.out" for node in self.nodes]
        return "\n".join(f"--- {file}\n{file.read_text()[-1500:]}" for file in files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node, agent in self.agents.items():
            if agent.poll() is None:
                send(self.tree(node), signal.SIGKILL)
            agent.wait()


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that nobody uses at the moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """One signal to processes, those that are gone excepted."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
