"""A real SLURM cluster on this machine: the scripts in `bed/`, for tests and benchmarks.

Each node has namespaces of its own (see bed/namespaces.sh) and is killed, cut off, frozen and
healed for real. However the process that made a cluster ends, a watchman takes the cluster down:
it waits at a pipe that only this process holds open.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BED = Path(__file__).parent / "bed"
WAIT_S = 60.0


@functools.cache
def missing() -> str:
    """Why no cluster can be had here, after installing what can be; empty if one can."""
    installed = subprocess.run(
        ["bash", str(BED / "install.sh")], capture_output=True, text=True, timeout=600
    )
    if installed.returncode:
        return installed.stderr.strip()
    unshared = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"]
    made = subprocess.run(unshared, capture_output=True, text=True)
    return f"no namespaces: {made.stderr.strip()}" if made.returncode else ""


class Cluster:
    """`nodes` nodes, node1 and so on, and the node ctl, where jobs are submitted."""

    def __init__(self, nodes: int = 6, **settings: int) -> None:
        # Not under TMPDIR: sockets live there, and their names are short.
        self.directory = Path(tempfile.mkdtemp(prefix="outlast-slurm-", dir="/tmp"))
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        bed = {f"BED_{name.upper()}": str(value) for name, value in settings.items()}
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self._environment = ["env", path, f"BED_DIR={self.directory}"]
        self._environment += [f"{name}={value}" for name, value in bed.items()]
        self._watchman: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        down = [*self._environment, "bash", "-c", f"read -r _; exec bash {BED}/cluster_down.sh"]
        self._watchman = subprocess.Popen(down, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._script("cluster_up", len(self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End everything in the cluster and remove its directory."""
        if self._watchman is not None and self._watchman.stdin is not None:
            self._watchman.stdin.close()
            self._watchman.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _command(self, script: str, *arguments: object) -> list[str]:
        return [*self._environment, "bash", str(BED / f"{script}.sh"), *map(str, arguments)]

    def _script(self, name: str, *arguments: object) -> str:
        done = subprocess.run(
            self._command(name, *arguments), capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} {arguments}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    # ---- what befalls nodes

    def kill(self, node: str, how: str) -> float:
        """power, crash or slurmd (see bed/node_kill.sh); returns the time before it."""
        before = time.time()
        self._script("node_kill", node, how)
        return before

    def cut(self, *nodes: str, place: str = "nowhere") -> float:
        """Plug nodes into island1 or island2, or nowhere; returns the time before it."""
        before = time.time()
        self._script("node_cut", place, *nodes)
        return before

    def freeze(self, node: str) -> float:
        """Stop every process of a node; returns the time before it."""
        before = time.time()
        self._script("node_freeze", node)
        return before

    def heal(self, *nodes: str, wait: bool = True) -> float:
        """Undo all of these; returns the time before it. With `wait` SLURM knows of it, too."""
        before = time.time()
        self._script("node_heal", *(() if wait else ("--no-wait",)), *nodes)
        return before

    # ---- what is run in it

    def start(self, node: str, *command: str, **how: Any) -> subprocess.Popen[str]:
        """Start a command on a node; `stop` ends it."""
        return subprocess.Popen(
            self._command("node_exec", node, *command), text=True, start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **how},
        )  # fmt: skip

    @staticmethod
    def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
        """Signal what `start` started, all of it, and wait for its end.

        nsenter stops when its child does, and nothing but this continues it.
        """
        for each in (number, signal.SIGCONT) if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, each)
        return process.wait(20)

    def run(
        self, node: str, *command: str, timeout: float = 60, directory: Path | None = None
    ) -> str:
        """What a command printed on a node; raises where it failed."""
        process = self.start(
            node, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=directory
        )
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.stop(process, signal.SIGKILL)
            raise
        if process.returncode:
            raise RuntimeError(f"{command} on {node}: code {process.returncode}: {out}{error}")
        return out.strip()

    def submit(self, script: str, *flags: str) -> str:
        """sbatch this text; returns the number of the job."""
        path = self.directory / f"{time.time_ns()}.sbatch"
        path.write_text(script)
        output = () if "--output" in script else ("--output=/dev/null",)
        return self.run("ctl", "sbatch", "--parsable", *output, *flags, str(path))

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job; its JobState is empty where SLURM has forgotten it."""
        try:
            told = self.run("ctl", "scontrol", "show", "job", job)
        except RuntimeError:
            return {"JobState": ""}
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def state(self, node: str) -> str:
        """What SLURM calls a node: idle, mixed, down*, …"""
        return self.run("ctl", "sinfo", "-h", "-p", "main", "-n", node, "-o", "%T")

    def await_true(self, what: Callable[[], Any], wait_s: float = WAIT_S, hint: str = "") -> Any:
        """The first true value of `what`; raises TimeoutError, with the hint."""
        deadline = time.monotonic() + wait_s
        while not (found := what()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {wait_s:g} s: {hint or what}")
            time.sleep(0.05)
        return found

    def await_job(self, job: str, *states: str, wait_s: float = WAIT_S) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        found: dict[str, str] = self.await_true(
            lambda: (seen := self.job(job))["JobState"] in states and seen, wait_s,
            f"job {job} in {' or '.join(states)}",
        )  # fmt: skip
        return found

    def clear(self) -> None:
        """No jobs, and every node up: as it was made."""
        self.heal(*self.nodes, wait=False)
        self.run("ctl", "scancel", "--user=root")
        self.heal(*self.nodes)
        idle = [f"{node} idle" for node in self.nodes]
        ask = ("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")
        self.await_true(lambda: self.run("ctl", *ask).splitlines() == idle, hint="idle nodes")
