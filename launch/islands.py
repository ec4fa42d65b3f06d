"""Several islands on one machine: each a job with agents, logs and checkpoints of its own.

The launcher starts, watches and ends; what islands exchange is their own matter. An island all of
whose agents were killed was lost, and is started again: it comes back from its checkpoint or takes
the state of the others. One that failed by itself stays away, and the others go on without it.
"""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from outlast.launch.config import LaunchConfig
from outlast.launch.console import Console
from outlast.launch.ending import goes_on
from outlast.launch.outcome_log import read_outcomes
from outlast.launch.slurm.conclusion import CUT_OFF
from outlast.launch.standalone import (
    EXIT_KILLED,
    LocalJob,
    Process,
    free_port,
    reserved,
    signals,
    watch,
)

# Whatever kills an island in so many starts in a row that come to no new step will kill the next.
LOSSES_MAX = 16
STEPPED = ("resumed", "outer")  # events of steps that an island has made itself


class LocalIsland(LocalJob):
    """One island on this machine."""

    def __init__(self, config: LaunchConfig, key: bytes) -> None:
        super().__init__(config, key)
        self._step = self._losses = 0
        self._read = set(self._logs())  # of an earlier run

    def revive(self, console: Console) -> Sequence[Process]:
        """Its agents, started again if it was lost and can be saved."""
        if self.code not in (None, CUT_OFF):
            return ()
        step = max([self._step, *self._steps()])
        self._losses = 0 if step > self._step else self._losses + 1
        self._step = step
        name = f"island {self.config.island}"
        if self._losses >= LOSSES_MAX:
            console.line(f"{name} was lost {self._losses} times without a new step: it stays away")
            return ()
        console.line(f"{name} was lost; it is started again")
        return self.start()

    def stopped(self, since: float) -> bool:
        """Whether it was brought to storage at a signal."""
        found = read_outcomes(Path(self.config.log_dir))
        return any(record.stopped and record.time >= since for record in found)

    def _logs(self) -> list[Path]:
        return sorted(Path(self.config.log_dir).glob("events-*.jsonl"))

    def _steps(self) -> Iterator[int]:
        """Where it came in the life that has just ended: every agent has a log of its own."""
        fresh = [path for path in self._logs() if path not in self._read]
        self._read.update(fresh)
        for path in fresh:
            for line in path.read_text("utf-8", "replace").splitlines():
                with suppress(ValueError):  # a torn line, as on a full disk
                    event = json.loads(line)
                    if event["event"] in STEPPED and isinstance(event.get("step"), int):
                        yield event["step"]


def run_islands(config: LaunchConfig, key: bytes | None) -> int:
    """Run all islands here; returns 0 if all have finished, else the exit code of one that has
    not. Without a key a fresh one is made."""
    key, ports = key or secrets.token_bytes(32), set[int]()
    while len(ports) < config.islands:
        ports.add(free_port())
    endpoints = [f"127.0.0.1:{port}" for port in sorted(ports)]
    config, began = replace(config, together=True), time.time()
    islands = [LocalIsland(config.of_island(i, endpoints), key) for i in range(config.islands)]
    console = Console()

    def ended(agent: Process, signalled: int) -> Sequence[Process]:
        # An agent that ended together with the last one of its island is told of after the revival.
        island = next((island for island in islands if agent in island.agents), None)
        if island is None:
            return ()
        over = all(agent.poll() is not None for agent in island.agents)
        return island.revive(console) if over and not signalled else ()

    with ExitStack() as stack:
        for island in islands:
            directory = Path(island.config.log_dir)
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(reserved(directory))
        wakeup = stack.enter_context(signals())
        try:
            agents = [agent for island in islands for agent in island.start()]
            signalled = watch(agents, wakeup, config, ended)
        finally:
            for island in islands:
                island.end()
            if any(island.stopped(began) for island in islands):
                console.line(goes_on(config))
            console.close()
    killed = 128 + signalled if signalled else EXIT_KILLED
    codes = [killed if island.code is None else island.code for island in islands]
    return min((code for code in codes if code), default=0)
