"""How long a loss holds up a job on a real SLURM cluster, and whether it outlasts preemption.

    python benchmarks/slurm.py [--repeats 3] [--scenarios worker node ...] [--trials 20]

The cluster of the tests (tests/slurm) with six nodes, of which five train the tests' model on one
worker each, at about 0.2 s a step. A job suffers its scenario `--repeats` times, or once and there
are as many jobs where the job has only one such node; each is compared with an undisturbed twin.

    worker  SIGKILL to one worker
    crash   every process of a node is killed, its cable is good
    power   the same, but its cable is dead first: nothing but silence tells
    first   `crash` of the node that runs the batch script, founded the job and proposes its views
    cut     a node is cut off and, once it is given up, plugged in again
    frozen  every process of a node is stopped and, once it is given up, goes on

detected: until an agent knew of it. committed: until the next step that was committed without what
was lost; back: from the cure until a step that was committed with it. With `--trials` one job is
preempted so often, each time gets another number of nodes, and has to go on where it was.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import median, parser_of, say, table, workspace, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "slurm"))
from slurm_cluster import Cluster
from slurm_run import SlurmRun

FIVE = ("--nodes", "5", "--time", "30")
WORKER = r"^[^ ]*python[^ ]* (-u )?[^ ]*training_script"
PAUSE_S = 0.1  # of a leaf, of which a rank has one or two in a step
STEPS, LONG = 120, 200
SCENARIOS = ("worker", "crash", "power", "first", "cut", "frozen")
CURED = ("cut", "frozen")
TIMES = ("detected", "committed", "back")


class Trouble:
    """One job on a cluster, and what befalls it."""

    def __init__(self, cluster: Cluster, out: Path, steps: int, *flags: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.cluster, self.script = cluster, ("--steps", str(steps))
        self.run = SlurmRun(cluster, out, *flags, script=self.script, pause_s=PAUSE_S)
        self.run.await_step(1)

    def strike(self, scenario: str, number: int) -> dict[str, float]:
        """Suffer it for the time `number`; seconds of TIMES."""
        run, cluster = self.run, self.cluster
        run.await_steps_more(3)
        view = run.view
        # A lost node is no member any more; the place of a worker may not be taken again yet.
        victim = run.members()[{"first": 0, "worker": -1 - number}.get(scenario, -1)]
        if scenario == "worker":
            at = time.time()
            cluster.run(victim, "pkill", "-KILL", "-f", WORKER)
        elif scenario == "cut":
            at = cluster.cut(victim)
        elif scenario == "frozen":
            at = cluster.freeze(victim)
        else:
            at = cluster.kill(victim, "power" if scenario == "power" else "crash")
        found = self._first("recovered", at)
        views = [v for v in run.events("view") if v["generation"] == view["generation"] + 1]
        times = {"detected": min(v["detected"] for v in views if v["time"] > at) - at}
        times["committed"] = self._commit(found["time"]) - at
        if scenario in CURED:
            at = cluster.heal(victim, wait=False)
            joined = run.await_true(lambda: self._view_with(victim, at), f"{victim} back")
            times["back"] = self._commit(joined["time"]) - at
        say(f"{scenario}: " + "  ".join(f"{name} {value:.2f} s" for name, value in times.items()))
        return times

    def _first(self, name: str, at: float) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((event for event in self.run.events(name) if event["time"] > at), None)

        event: dict[str, Any] = self.run.await_true(found, name)
        return event

    def _view_with(self, node: str, at: float) -> dict[str, Any] | None:
        for view in self.run.events("view"):
            if view["time"] > at and node in [member["node"] for member in view["members"]]:
                return view
        return None

    def _commit(self, at: float) -> float:
        def found() -> float | None:
            return next((line["time"] for line in self.run.steps if line["time"] > at), None)

        moment: float = self.run.await_true(found, "a committed step")
        return moment

    def end(self) -> None:
        """Let the job come to its end; it must have the bits of its twin."""
        self.run.hurry()
        self.run.await_state("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")
        self.run.check_result(*self.script)
        self.cluster.clear()


def losses(cluster: Cluster, out: Path, scenario: str, repeats: int) -> list[dict[str, float]]:
    """All repeats of one scenario."""
    results = []
    steps = LONG if scenario in CURED else STEPS
    for number in range(repeats if scenario == "first" else 1):
        trouble = Trouble(cluster, out / f"{scenario}{number}", steps, *FIVE)
        for again in range(1 if scenario == "first" else repeats):
            results.append(trouble.strike(scenario, again))
        trouble.end()
    return results


def preemptions(cluster: Cluster, out: Path, trials: int) -> list[dict[str, float]]:
    """Preempt one job so often; seconds from the urgent job's submission, and steps."""
    flags = ("--nodes", "4", "--sbatch", "--nodes=2-4", "--time", "60", "--grace", "20")
    trouble = Trouble(cluster, out / "preempted", LONG, *flags)
    run, results = trouble.run, []
    for trial in range(trials):
        run.await_steps_more(3)
        before, nodes = run.step, run.members()
        at = time.time()
        wanted = "node[3-6]" if trial % 2 == 0 else "node[1-2]"
        urgent = cluster.submit("#!/bin/bash\nsleep 600\n", "--partition=urgent", "--exclusive",
                                f"--nodelist={wanted}")  # fmt: skip
        started = awaited(run, lambda n=trial + 2: len(starts(run)) >= n, "another start")
        stopped = max(line["time"] for line in run.outcomes if line["restart"] == trial)
        stored, again = starts(run)[-1], started - at
        if stored < before:
            raise AssertionError(f"trial {trial}: went on at step {stored}, was at {before}")
        cluster.run("ctl", "scancel", urgent)
        results.append({"stored": stopped - at, "again": again, "step": stored})
        run.await_steps_more(1)
        say(f"trial {trial + 1}: {len(nodes)} -> {len(run.members())} nodes, step {stored}, "
            f"stored after {stopped - at:.1f} s, trains again after {again:.1f} s")  # fmt: skip
    trouble.end()
    return results


def starts(run: SlurmRun) -> list[int]:
    """The step with which each start of the job began."""
    return [int(step) for step in re.findall(r"training starts at step (\d+)", run.output)]


def awaited(run: SlurmRun, what: Callable[[], bool], name: str) -> float:
    """When it was true."""
    run.await_true(what, name)
    return time.time()


def row(scenario: str, results: list[dict[str, float]]) -> list[object]:
    """A line of the table."""
    cells: list[object] = [scenario, len(results)]
    for name in TIMES:
        values = [result[name] for result in results if name in result]
        cells.append(f"{median(values):.2f}" if values else "")
    return [*cells, "the twin's"]


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=0, help="preemptions of one job")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with workspace(args.out) as out, Cluster(nodes=6) as cluster:
        for scenario in args.scenarios:
            found[scenario] = losses(cluster, out, scenario, args.repeats)
            write_json(args.json, found)
        trials = preemptions(cluster, out, args.trials) if args.trials else []
        write_json(args.json, {**found, **({"preempted": trials} if trials else {})})
    head = ["loss", "times", *(f"{name}, s (median)" for name in TIMES), "bits"]
    print(table(head, [row(scenario, results) for scenario, results in found.items()]))
    if trials:
        print(f"\n{len(trials)} of {args.trials} preemptions went on where the job was, with the "
              f"twin's bits; stored after {median([t['stored'] for t in trials]):.1f} s, "
              f"trained again after {median([t['again'] for t in trials]):.1f} s (median)")


if __name__ == "__main__":
    main()
