"""Jobs of `outlast launch` on this machine: nodes to kill, logs to read, tables to print.

A job is one `outlast launch` per pretended node, as in a drill, so that a node can be killed
and started again. What happened is read from the logs of the job alone: the events of agents and
workers, and the commit of every step.
"""

import argparse
import json
import math
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from outlast.launch.drill.nodes import Nodes, free_port, outlast
from outlast.launch.drill.watch import Event, Watch

START_LIMIT_S, RETURN_LIMIT_S, RECOVERY_LIMIT_S, POLL_S = 90.0, 300.0, 120.0, 0.002
ROOT = Path(__file__).resolve().parent
GPT = str(ROOT.parent / "examples" / "gpt.py")
SMALL = ("--layers=2", "--width=64", "--heads=2", "--context=32", "--batch-size=2",
         "--corpus-mb=1", "--eval-every=0")  # fmt: skip


class JobFailed(Exception):
    """A node ended with an error; the text has the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How many nodes a job has, how many workers each, and with how many it may start."""

    nodes: int = 4
    workers: int = 1
    least: int = 0

    @property
    def ranks(self) -> int:
        """Workers when all are there."""
        return self.nodes * self.workers


class Job:
    """A running job. As a context it starts its nodes, and ends them whatever happens.

    Args:
        out: directory of this job's logs, made here.
        script: the training script and its flags.
    """

    def __init__(self, out: Path, script: Sequence[str], strength: Strength) -> None:
        self.out, self.strength, self.logs = out, strength, out / "logs"
        names = [f"node{index}" for index in range(strength.nodes)]
        least = f"{strength.least}:" if strength.least else ""
        flags = (
            "launch", "--nnodes", f"{least}{strength.nodes}", "--rdzv-id", "benchmark",
            "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1",
            "--nproc-per-node", str(strength.workers), "--max-restarts", "10000",
            "--log-dir", str(self.logs), "--node-name",
        )  # fmt: skip

        def command(node: str) -> list[str]:
            return outlast(*flags, node, *script)

        self.nodes = Nodes(names, command, out / "nodes", secrets.token_hex(32))
        self.watch = Watch(self.logs, self._alive)

    def __enter__(self) -> "Job":
        self.nodes.__enter__()
        for node in self.nodes.names[: self.strength.least or None]:
            self.nodes.start(node)
        return self

    def __exit__(self, *trouble: Any) -> None:
        self.nodes.__exit__(*trouble)

    def _alive(self) -> None:
        failed = {node: code for node, code in self.nodes.exit_codes().items() if code}
        for node, code in failed.items():
            lines = (self.nodes.output / f"{node}.log").read_text(errors="replace").splitlines()
            raise JobFailed(f"{node} ended with {code}:\n" + "\n".join(lines[-15:]))

    @property
    def members(self) -> list[dict[str, Any]]:
        """Members of the newest view, the proposer first."""
        return list(self.watch.view["members"]) if self.watch.view else []

    @property
    def holders(self) -> dict[int, str]:
        """Worker -> its agent, in the newest view."""
        return {int(h): member["agent"] for member in self.members for h in member["workers"]}

    def agent_pid(self, agent: str) -> int:
        """Process id of an agent."""
        started = self.watch.event("started", agent=agent)
        assert started is not None
        return int(started["pid"])

    def await_strength(self, ranks: int = 0, commits: int = 3) -> None:
        """Until `ranks` workers (default all) are in the view and committed steps together.

        After two commits the parity of the new layout is complete on every rank.
        """
        wanted = ranks or self.strength.ranks

        def strong() -> bool | None:
            view = self.watch.view
            if view is None or len(self.holders) != wanted:
                return None
            since = [m for m in self.watch.metrics[-commits:] if m["time"] > view["agreed"]]
            return True if len(since) == commits else None

        limit_s = RETURN_LIMIT_S if self.watch.metrics else START_LIMIT_S
        self.watch.until(strong, f"{wanted} workers to commit {commits} steps", limit_s)

    def step_s(self, commits: int) -> float:
        """Median time between the last commits."""
        times = [m["time"] for m in self.watch.metrics[-commits - 1 :]]
        return statistics.median(b - a for a, b in pairwise(times))

    def random_moment(self, generator: random.Random, step_s: float) -> None:
        """Sleep until an instant that is uniform in a step."""
        before = self.watch.step
        self.watch.until(
            lambda: True if self.watch.step > before else None, "a commit", RECOVERY_LIMIT_S, POLL_S
        )
        time.sleep(generator.uniform(0, step_s))

    def next_commit(self, at: float) -> Event:
        """The first step committed after `at`."""
        return self.watch.until(
            lambda: next((m for m in self.watch.metrics if m["time"] > at), None),
            "a commit after the loss", RECOVERY_LIMIT_S, POLL_S,
        )  # fmt: skip

    def first(self, name: str, survivors: Sequence[int], at: float) -> list[float]:
        """For every survivor the moment of its first event `name` after `at`."""

        def found() -> list[float] | None:
            first: dict[int, float] = {}
            for event in self.watch.events:
                if event["event"] == name and event["time"] > at:
                    first.setdefault(int(event.get("holder", 0)), float(event["time"]))
            return [first[h] for h in survivors] if set(survivors) <= first.keys() else None

        what = f"'{name}' of all {len(survivors)} survivors"
        return self.watch.until(found, what, RECOVERY_LIMIT_S, POLL_S)

    def await_view_without(self, holder: int) -> None:
        """Until a view is installed in which this worker is no more."""
        self.watch.until(
            lambda: True if holder not in self.holders else None, "a view without it",
            RECOVERY_LIMIT_S,
        )  # fmt: skip

    def bring_back(self, node: str, agent: str) -> None:
        """Start a killed node again, once the others go on without its agent."""
        self.watch.until(
            lambda: None if agent in {m["agent"] for m in self.members} else True,
            f"a view without {node}", RETURN_LIMIT_S,
        )  # fmt: skip
        self.nodes.start(node)


def launched(out: Path, command: Sequence[str], limit_s: float = 900.0) -> int | None:
    """Run one command to its end, whatever it starts included; its exit code."""
    with Nodes(["launcher"], lambda _: command, out, secrets.token_hex(32)) as nodes:
        nodes.start("launcher")
        code = nodes.wait(limit_s)["launcher"]
    if code != 0:
        say(f"ended with {code}:\n" + (out / "launcher.log").read_text(errors="replace")[-2000:])
    return code


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A command line with the flags that all benchmarks have; `text` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of victims, instants and trainings")
    parser.add_argument("--out", type=Path, help="keep the logs here")
    parser.add_argument("--json", type=Path, help="write all single values to this file")
    return parser


@contextmanager
def workspace(keep: Path | None) -> Iterator[Path]:
    """A directory for logs: `keep` if given, else one that is removed afterwards.

    From here on SIGTERM leaves through the clean-up, so that no job outlives its benchmark.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="outlast-benchmark-") as name:
        yield Path(name)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def median(values: Sequence[float]) -> float:
    """The median; nan of none."""
    return statistics.median(values) if values else math.nan


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return str(value)

    lines = [list(names), ["---"] * len(names), *([text(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, result: object) -> None:
    """Write the result if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
