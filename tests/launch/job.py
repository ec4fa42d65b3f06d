"""A job under test: the command as a process, its events, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-c", "from outlast.launch.cli import main; main()", "launch"]
FAKE = str(HERE / "fake_worker.py")
KEY = "0123456789abcdef0123456789abcdef"
WAIT_S = 20.0


class Job:
    """`outlast launch` with these arguments, started by `by`; logs go to `directory`."""

    def __init__(
        self, directory: Path, *arguments: str, by: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.directory = directory
        self._output = directory.with_suffix(f".{time.time_ns()}.out")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*by, *COMMAND, "--log-dir", str(directory), *arguments],
                stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.directory.glob("events-*.jsonl")):
            for line in path.read_text().splitlines():
                event = json.loads(line)
                if event["event"] == name:
                    found.append(event)
        return sorted(found, key=lambda event: float(event["time"]))

    def wait_for(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.02)
        raise AssertionError(f"not within {WAIT_S} s; output:\n{self.output}")

    def wait_for_events(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]] | None:
            found = self.events(name)
            return found if len(found) >= count else None

        found: list[dict[str, Any]] = self.wait_for(enough)
        return found

    def connected(self, workers: int) -> int:
        """Wait for a generation whose keys have reached all its workers; returns it."""

        def generation() -> int | None:
            counts: dict[int, set[int]] = {}
            for event in self.events("fake_connected"):
                counts.setdefault(event["generation"], set()).add(event["holder"])
            last = max(counts, default=-1)
            newest = max((e["generation"] for e in self.events("view")), default=0)
            return last if last == newest and len(counts[last]) == workers else None

        found: int = self.wait_for(generation)
        return found

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def end(self, wait_s: float = WAIT_S) -> int:
        try:
            return self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {wait_s} s; output:\n{self.output}") from None

    def stop(self) -> None:
        """Leave nothing behind, whatever the test has come to."""
        if self.process.poll() is None:
            tree = self.tree()
            self.process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, 3)
            for process in alive:
                process.kill()
            self.process.wait()


def all_gone(tree: list[psutil.Process], wait_s: float) -> bool:
    _, alive = psutil.wait_procs(tree, wait_s)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive if p.is_running())


def free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [int(holder.getsockname()[1]) for holder in holders]
    for holder in holders:
        holder.close()
    return ports
