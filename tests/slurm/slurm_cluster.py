"""A real SLURM cluster on this machine, for tests and benchmarks: machines with SLURM on them."""

import time
from collections.abc import Callable
from typing import Any

from machines import Machines

WAIT_S = 60.0


class Cluster(Machines):
    """`nodes` nodes, node1 and so on, and the node ctl, where jobs are submitted."""

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
        self.heal(*self.troubled, wait=False)  # before they are told to end their jobs
        self.run("ctl", "scancel", "--user=root")
        self.heal(*self.troubled)
        self.troubled.clear()
        idle = [f"{node} idle" for node in self.nodes]
        ask = ("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")
        self.await_true(lambda: self.run("ctl", *ask).splitlines() == idle, hint="idle nodes")
