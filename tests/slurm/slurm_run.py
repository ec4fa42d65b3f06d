"""A training run that was submitted to a cluster: its steps, its events, its bits."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from training_job import SCRIPT, alone

OUTLAST = str(Path(sys.executable).with_name("outlast"))
STEPS = ("--steps", "60")
PAUSE_S = 0.2  # of a leaf
WAIT_S = 90.0  # for machines that do much else


class RunLog:
    """What a run has left in its log directory so far."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def output(self) -> str:
        path = self.directory.with_suffix(".out")
        return path.read_text() if path.exists() else "(no output)"

    @property
    def digests(self) -> list[str]:
        logs = [path.read_text() for path in self.directory.glob("node*/*/*/*/stdout.log")]
        return re.findall(r"digest ([0-9a-f]{64})", "".join(logs))

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of all agents, in the order of time."""
        lines = [line for path in self.directory.glob("events-*.jsonl")
                 for line in path.read_text().splitlines()]  # fmt: skip
        events = [json.loads(line) for line in lines if line.endswith("}")]
        found = [event for event in events if event["event"] == name]
        return sorted(found, key=lambda event: float(event["time"]))

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.directory.glob("outcomes/*.json")]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: one for each committed step."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def step(self) -> int:
        """The newest committed step, -1 if there is none."""
        steps = self.steps
        return int(steps[-1]["step"]) if steps else -1

    @property
    def view(self) -> dict[str, Any]:
        """The newest of the newest start."""
        views = self.events("view")
        return views[-1] if views else {"members": []}

    def members(self) -> list[str]:
        """Nodes of the newest view."""
        return [member["node"] for member in self.view["members"]]

    def proposer(self) -> str:
        """The node that proposes the next view: the first of the newest one."""
        return self.members()[0]

    def check_result(self, *script: str) -> None:
        """It has the bits of an undisturbed twin, and each step once."""
        assert set(self.digests) == {alone(*(script or STEPS))}, self.output
        steps = [line["step"] for line in self.steps]
        assert steps == list(range(1, len(steps) + 1)), "each step once"


class SlurmRun(RunLog):
    """`outlast submit` of the tests' training script with these flags and those of the script.

    It trains slowly until `hurry`. What ranks print is in files, too: otherwise it goes to the
    node of the batch script alone, which may die.
    """

    def __init__(
        self, cluster: Cluster, directory: Path, *flags: str, script: tuple[str, ...] = STEPS,
        pause_s: float = PAUSE_S,
    ) -> None:  # fmt: skip
        self.cluster, self.workspace = cluster, directory
        self._pace = directory / "pace"
        self._pace.write_text(str(pause_s))
        told = self.outlast(
            "submit", "--tee", "3", *flags, SCRIPT, *script, "--pace", str(self._pace)
        )
        self.number = told.rpartition(" ")[2]
        super().__init__(directory / "outlast_logs" / f"slurm-{self.number}")

    def outlast(self, *words: str) -> str:
        """Run the command where jobs are submitted."""
        return self.cluster.run(
            "ctl", "env", "OMP_NUM_THREADS=1", OUTLAST, *words, directory=self.workspace
        )

    def hurry(self) -> None:
        """No pauses any more: whatever the test was about has happened."""
        self._pace.unlink()

    def await_step(self, step: int) -> None:
        self.await_true(lambda: self.step >= step, f"step {step}")

    def await_steps_more(self, count: int = 2) -> None:
        self.await_step(self.step + count)

    def await_members(self, *nodes: str) -> None:
        self.await_true(lambda: sorted(self.members()) == sorted(nodes), f"a view of {nodes}")

    def await_state(self, *states: str) -> dict[str, str]:
        return self.await_true(
            lambda: (job := self.cluster.job(self.number))["JobState"] in states and job,
            f"job {' or '.join(states)}",
        )  # type: ignore[no-any-return]

    def check_bits(self, *script: str) -> None:
        """SLURM says that the job has ended well, and its result is right."""
        job = self.await_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert job["JobState"] == "COMPLETED", f"{job}\n{self.output}"
        self.check_result(*script)

    def await_true(self, what: Any, name: str) -> Any:
        try:
            return self.cluster.await_true(what, WAIT_S)
        except TimeoutError:
            job = self.cluster.job(self.number)
            raise AssertionError(f"no {name} within {WAIT_S} s: {job}\n{self.output}") from None
