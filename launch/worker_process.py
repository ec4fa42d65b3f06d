"""One worker process as its agent sees it: spawned, watched, pinged, killed.

Three things watch it: the latch (milliseconds, once the worker has locked it), the pidfd (always,
but only after the kernel has freed its memory) and the pings (a process that lives and does
nothing). Invariant: a death is reported lost at most once and exited exactly once, in this order,
and everything the worker said before is handed over first.
"""

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from outlast.cluster.environment import AGENT_FD, LATCH_FD
from outlast.cluster.latch import Latch
from outlast.cluster.timing import Timing
from outlast.launch.config import LaunchConfig
from outlast.launch.link import Link, Message
from outlast.launch.worker_output import WorkerOutput

PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL("libc.so.6", use_errno=True).prctl


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOrder:
    """What to start: identity, environment, and a directory of its own for logs and errors."""

    holder: int
    local_rank: int
    rank: int
    title: str
    environment: dict[str, str]
    directory: Path


class WorkerWatcher(Protocol):
    """Who is told about a worker."""

    def said(self, worker: "WorkerProcess", message: Message) -> None:
        """A message has arrived."""

    def lost(self, worker: "WorkerProcess", cause: str) -> None:
        """It is dead or as good as dead; its exit code is not known yet."""

    def exited(self, worker: "WorkerProcess", code: int) -> None:
        """It is gone: exit code, or minus the signal's number."""


class WorkerProcess:
    """A running worker."""

    def __init__(self, order: WorkerOrder, config: LaunchConfig, watcher: WorkerWatcher) -> None:
        self.holder, self.local_rank = order.holder, order.local_rank
        self.rank = order.rank  # of the newest view with this worker
        self.attached = self.ready = self.finished = False
        self.expected = False  # we end it ourselves: no news to anybody
        self.started = time.monotonic()
        self.hung = False  # it did not answer though nobody stopped it: likely the script's fault
        self.error = ""
        self.gone = asyncio.Event()
        self.lost = False
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._link = Link(lambda message: watcher.said(self, message))
        self._latch = Latch()
        self._error_file = order.directory / "error.json"
        order.directory.mkdir(parents=True, exist_ok=True)
        self._output = WorkerOutput(config, order.directory, order.local_rank, order.title)
        files = (self._link.peer.fileno(), self._latch.file)
        environment = order.environment | {
            AGENT_FD: str(files[0]),
            LATCH_FD: str(files[1]),
            "TORCHELASTIC_ERROR_FILE": str(self._error_file),
        }
        if config.together:  # through a pipe, where Python would keep lines back
            environment["PYTHONUNBUFFERED"] = "1"
        agent = os.getpid()
        try:
            self._process = subprocess.Popen(
                _command(config), env=environment, pass_fds=files, stdin=subprocess.DEVNULL,
                stdout=self._output.stdout, stderr=self._output.stderr, process_group=0,
                preexec_fn=lambda: _die_with(agent),
            )  # fmt: skip
        finally:
            self._output.spawned()
            self._link.peer.close()
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._heard = time.monotonic()
        self._cpu = (0, self._heard)

    def send(self, message: Message, files: list[int] | None = None) -> None:
        """Tell the worker something; never blocks."""
        self._link.send(message, files)

    def attach(self) -> None:
        """It has called outlast.init() and holds the latch: watch it."""
        self.attached = True
        self.heard()

        def fired(died: bool) -> None:
            if died and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._on_latch)

        self._latch.watch(fired)

    def heard(self) -> None:
        """It has answered just now."""
        self._heard = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal to the process and what it has started."""
        if not self.gone.is_set():
            os.killpg(self.pid, number)

    def catches(self, number: int) -> bool:
        """Whether the process has a handler for a signal."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)

    def lose(self, cause: str) -> None:
        """Fence it and report it lost, once."""
        self.signal(signal.SIGKILL)
        if not self.lost and not self.expected:
            self.lost = True
            self._watcher.lost(self, cause)

    def check_silence(self, timing: Timing, now: float) -> None:
        """Lose a worker that answers no more: soon when it is stopped or idle, late when busy."""
        state, cpu = _state_and_cpu(self.pid)
        if cpu != self._cpu[0]:
            self._cpu = (cpu, now)
        silence = now - self._heard
        if not self.attached or self.finished or silence < timing.silence_s:
            return
        if state in "Tt":
            self.lose(f"stopped: no answer for {silence:.1f} s")
        elif silence > timing.busy_silence_s or now - self._cpu[1] > timing.silence_s:
            self.hung = True
            self.lose(f"hung: no answer for {silence:.1f} s")

    def failure_text(self) -> str:
        """The traceback that the worker sent or wrote to torchrun's error file, or nothing."""
        if self.error:
            return self.error
        try:
            message: Any = json.loads(self._error_file.read_text())["message"]
            return str(message["extraInfo"]["py_callstack"])
        except (OSError, ValueError, KeyError, TypeError):  # none written, or not torchrun's form
            return ""

    def _on_latch(self) -> None:
        if self.gone.is_set():
            return
        self._link.drain()
        if not self.finished:
            self.lose(_death_cause(self.pid))

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._link.drain()
        # Before the process is reaped its group cannot be anybody else's: end what it has started.
        os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self.gone.set()
        os.close(self._pidfd)
        self._link.close()
        self._latch.close()
        self._output.finish()
        if self.attached and not self.finished:
            self.lose(exit_text(code))
        self._watcher.exited(self, code)


def exit_text(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _command(config: LaunchConfig) -> list[str]:
    python = [] if config.no_python else [sys.executable, "-u"]
    return [*python, *(["-m"] if config.module else []), config.script, *config.script_args]


def _die_with(agent: int) -> None:
    """In the child before exec: die with the agent, and give back the agent's priority."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        os._exit(1)
    os.setpriority(os.PRIO_PROCESS, 0, 0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def _state_and_cpu(pid: int) -> tuple[str, int]:
    try:
        fields = _stat(pid)
    except (OSError, ValueError):  # it has just gone; the pidfd says so
        return "X", -1
    return fields[0], int(fields[11]) + int(fields[12])


def _death_cause(pid: int) -> str:
    """Why a dying process dies: the kernel knows before it can be waited for."""
    try:
        status = int(_stat(pid)[-1])
    except (OSError, ValueError):
        return "died"
    return exit_text(-(status & 127) if status & 127 else status >> 8)
