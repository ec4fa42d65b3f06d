"""Pretended machines: the scripts in `bed/` as an object.

Each node has namespaces of its own (see bed/namespaces.sh) and is killed, cut off, frozen and
healed for real. However the process that made them ends, a watchman takes them down: it
waits at a pipe that only this process holds open.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BED = Path(__file__).parent / "bed"


@functools.cache
def missing() -> str:
    """Why none can be had here, after installing what can be; empty if one can."""
    installed = subprocess.run(
        ["bash", str(BED / "install.sh")], capture_output=True, text=True, timeout=600
    )
    if installed.returncode:
        return installed.stderr.strip()
    unshared = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"]
    made = subprocess.run(unshared, capture_output=True, text=True)
    return f"no namespaces: {made.stderr.strip()}" if made.returncode else ""


class Machines:
    """`nodes` nodes, node1 and so on, and the node ctl, which controls them."""

    def __init__(self, nodes: int = 6, **settings: int) -> None:
        # Not under TMPDIR: sockets live there, and their names are short.
        self.directory = Path(tempfile.mkdtemp(prefix="outlast-slurm-", dir="/tmp"))
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        bed = {f"BED_{name.upper()}": str(value) for name, value in settings.items()}
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self._environment = ["env", "LC_ALL=C", path, f"BED_DIR={self.directory}"]
        self._environment += [f"{name}={value}" for name, value in bed.items()]
        self.troubled: set[str] = set()  # nodes that something has befallen since they were healed
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
        """End everything that runs on them and remove its directory."""
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
        """power, crash or slurmd (see bed/node_kill.sh); returns the time of it."""
        self.troubled.add(node)
        return float(self._script("node_kill", node, how))

    def cut(self, *nodes: str, place: str = "nowhere") -> float:
        """Plug nodes into island1 or island2, or nowhere; returns the time of it."""
        self.troubled |= {*nodes}
        return float(self._script("node_cut", place, *nodes))

    def freeze(self, node: str) -> float:
        """Stop every process of a node; returns the time of it."""
        self.troubled.add(node)
        return float(self._script("node_freeze", node))

    def heal(self, *nodes: str, wait: bool = True) -> float:
        """Undo all of these; returns the time of it. With `wait` SLURM knows of it, too."""
        return float(self._script("node_heal", *(() if wait else ("--no-wait",)), *nodes))

    def move(self, site: int, *nodes: str, **link: float) -> None:
        """Put nodes of a remote site behind a long line, or change it: rate_mbit, delay_ms (one
        way), jitter_ms, loss (a share) and queue_ms."""
        path = self.directory / f"wan{site}.json"
        plain = {"rate_mbit": 100, "delay_ms": 20, "jitter_ms": 0, "loss": 0, "queue_ms": 200}
        taps = [f"w{site}a", f"w{site}b"]
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"taps": taps, **plain, **link}))
        fresh.replace(path)
        self._script("wan_up", site, path, *nodes)

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
