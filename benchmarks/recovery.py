"""How long a loss holds up a job: from the kill to the new group, and to the next committed step.

    python benchmarks/recovery.py [--repeats 20] [--scenarios worker node proposer frozen]

One long job per scenario; every repeat takes one victim away at an instant that is uniform in a
step, and waits until it is back and the parity of the new layout is complete. After the uniform
repeats one more is aimed at every phase of a step that none of them hit (marked in the JSON).

    worker    SIGKILL to one worker of 4, each on a node of its own
    node      SIGKILL to the agent and both workers of one of 3 nodes at once
    proposer  SIGKILL to the agent and the worker of the node that proposes the views
    frozen    SIGSTOP to one worker of 4: no connection breaks, silence alone tells

detected: until an agent knew of it. connected: until every survivor had made its first collective
in the new group. committed: until the next step that the new group committed; its excess is that
less the median of undisturbed steps of the same run just before the losses. Times are those that
the agents wrote into their logs.
"""

import argparse
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from job import (
    POLL_S,
    RECOVERY_LIMIT_S,
    ROOT,
    SMALL,
    Job,
    Strength,
    median,
    parser_of,
    quantile,
    say,
    table,
    workspace,
    write_json,
)  # fmt: skip
from phases import NAMES, phase_of

from outlast.cluster.timing import Timing

STRENGTHS = {"node": Strength(nodes=3, workers=2)}
AIMED = [name for name in NAMES if name not in ("script", "recovery")]
TIMES = ("detected", "connected", "committed", "excess")
UNDISTURBED = 4  # commits between two losses that belong to the undisturbed step time


class Scenario:
    """One long job with many losses of one kind."""

    def __init__(self, name: str, job: Job, generator: random.Random) -> None:
        self.name, self.job, self.generator = name, job, generator
        self.phases = job.out / "phases"

    def repeat(self, aimed: str = "") -> dict[str, Any]:
        """One loss and what came of it; seconds."""
        job = self.job
        job.await_strength(commits=2 + UNDISTURBED)
        step_s = job.step_s(UNDISTURBED)
        candidates = [member for member in job.members if member["workers"]]
        proposer = self.name == "proposer"
        member = candidates[0] if proposer else self.generator.choice(candidates)
        node, lost = member["node"], {int(holder) for holder in member["workers"]}
        pid = job.nodes.workers(node)[0]
        generation = int(job.watch.view["generation"]) if job.watch.view else 0
        if aimed:
            self._await_phase(pid, aimed)
        else:
            job.random_moment(self.generator, step_s)
        survivors = [holder for holder in job.holders if holder not in lost]
        if self.name in ("node", "proposer"):
            at = job.nodes.kill_node(node)
        else:
            at = time.time()
            os.kill(pid, signal.SIGSTOP if self.name == "frozen" else signal.SIGKILL)
        phase = phase_of(self.phases, pid)
        connected = max(job.first("connected", survivors, at))
        committed = job.next_commit(min(job.first("recovered", survivors, at)))
        views = [e for e in job.watch.events if e["event"] == "view"]
        detected = min(v["detected"] for v in views if v["generation"] == generation + 1)
        if self.name in ("node", "proposer"):
            job.bring_back(node, member["agent"])
        redone = [e["redone"] for e in job.watch.events
                  if e["event"] == "recovered" and e["time"] > at and e["holder"] in survivors]
        result = {
            "phase": phase, "aimed": bool(aimed), "node": node, "at_step": job.watch.step,
            "detected": detected - at, "connected": connected - at,
            "committed": committed["time"] - at, "excess": committed["time"] - at - step_s,
            "step": step_s, "redone": max(redone),
        }  # fmt: skip
        say(f"{self.name}: {phase:8} " + "  ".join(f"{k} {result[k]:.3f} s" for k in TIMES))
        return result

    def _await_phase(self, pid: int, phase: str) -> None:
        """Return as soon as the worker is seen in a phase."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while phase_of(self.phases, pid) != phase:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the worker was never seen in {phase}")
            time.sleep(POLL_S / 10)


def run(name: str, args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """All repeats of one scenario."""
    script = [str(ROOT / "phases.py"), f"--phases={out / 'phases'}", *SMALL, "--steps=1000000",
              f"--layers={args.layers}", f"--width={args.width}", f"--batch-size={args.batch_size}",
              f"--context={args.context}"]  # fmt: skip
    results: list[dict[str, Any]] = []
    with Job(out, script, STRENGTHS.get(name, Strength())) as job:
        scenario = Scenario(name, job, random.Random(args.seed))
        for _ in range(args.repeats):
            results.append(scenario.repeat())
        for phase in () if args.no_aimed else AIMED:
            if phase not in {result["phase"] for result in results}:
                results.append(scenario.repeat(aimed=phase))
    return results


def row(name: str, results: list[dict[str, Any]]) -> list[object]:
    """A line of the table."""
    step_s = median([result["step"] for result in results])
    cells: list[object] = [name, len(results), 1000 * step_s]
    for what in TIMES[:3]:
        values = [1000 * result[what] for result in results]
        cells.append(f"{median(values):.0f} / {quantile(values, 0.99):.0f}")
    excess = [result["excess"] / result["step"] for result in results]
    cells.append(f"{median(excess):.1f} / {quantile(excess, 0.99):.1f}")
    phases = Counter(result["phase"] for result in results)
    cells.append(", ".join(f"{phase} {count}" for phase, count in phases.most_common()))
    return cells


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    names = ("worker", "node", "proposer", "frozen")
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-aimed", action="store_true", help="uniform instants only")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with workspace(args.out) as out:
        for name in args.scenarios:
            found[name] = run(name, args, out / name)
            write_json(args.json, found)
    head = ["scenario", "losses", "step, ms"]
    head += [f"{what}, ms (median / p99)" for what in TIMES[:3]]
    head += ["excess, steps (median / p99)", "phase of the victim"]
    print(table(head, [row(name, results) for name, results in found.items()]))
    timing = Timing()
    bound_s = timing.silence_s + timing.heartbeat_s
    print(f"\nBound for the detection of a frozen worker: {1000 * bound_s:.0f} ms")


if __name__ == "__main__":
    main()
