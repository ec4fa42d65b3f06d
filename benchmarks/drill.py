"""What random faults cost: recovery times per kind and rung, and the share of steps that survive.

    python benchmarks/drill.py [--rounds 300] [--minutes 10] [--parts rounds ratio]

rounds: seeded random faults on 6 ranks (6 nodes), several jobs with several faults each, every job
compared step by step and in its final bits with one undisturbed twin. A fault is of any kind that
needs no privilege, at a random moment or at a failpoint, now and then with a second one inside its
recovery. Times are those that the job wrote into its own logs.

ratio: 4 ranks, kills of workers and nodes as a Poisson process with a mean time between failures
of 60 s and of 15 s. Committed: against what the same job commits undisturbed in that time.
Committed of attempted: every interruption of a step counts as an attempt that failed, though its
finished leaves are kept, and so does every step made again. Steps are held to a pace, as where an
accelerator computes: else the cores that restart a killed process are those that train.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from job import GPT, SMALL, median, parser_of, quantile, say, table, workspace, write_json

from outlast.launch.drill.drill import (
    Drill,
    DrillConfig,
    events_of,
    judge,
    left_behind,
    run_twin,
    traps,
)
from outlast.launch.drill.drilled_job import DrilledJob, DrillFailed, Shape, TrainingOver
from outlast.launch.drill.fault import DRAWN

RANKS, PER_JOB, ROUND_S = 6, 15, 16.0
RATIO_RANKS, TWIN_S = 4, 60.0


def script(args: argparse.Namespace, steps: int) -> tuple[str, ...]:
    """The training; two parity units, so that a node may follow a node."""
    return (GPT, *SMALL, f"--steps={steps}", f"--seed={args.seed}", "--parity=2")


def run_rounds(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All rounds; every job ends by itself and is judged."""
    per_job = min(PER_JOB, args.rounds)
    steps = int(per_job * ROUND_S / args.pace)
    shape = Shape(nodes=RANKS, workers=1, script=script(args, steps))
    found: dict[str, Any] = {"faults": [], "jobs": []}
    number = 0
    while len(found["faults"]) < args.rounds:
        left = args.rounds - len(found["faults"])
        config = DrillConfig(
            shape=shape, out=out / f"job{number}", rounds=min(per_job, left), kinds=DRAWN,
            seed=args.seed + number, twin=number == 0, pace_s=args.pace,
        )  # fmt: skip
        result = one_job(config, out / "job0" / "twin")
        found["faults"] += result["events"]
        found["jobs"].append({k: v for k, v in result.items() if k != "events"})
        say(f"job {number}: {len(found['faults'])} faults so far, passed: {result['passed']}")
        write_json(args.json, {"rounds": found})
        number += 1
    return found


def one_job(config: DrillConfig, twin: Path) -> dict[str, Any]:
    """One drill, as the command does it; the twin of the first job serves all of them."""
    failure = ""
    config.out.mkdir(parents=True, exist_ok=True)
    with traps(config.points) as set_traps:
        job = DrilledJob(config.out / "disturbed", config.shape, set_traps)
        drill = Drill(config, job, say)
        try:
            drill.run()
        except TrainingOver:
            say("the training was over before the last fault: the next job makes up for it")
        except (DrillFailed, TimeoutError) as error:
            failure = str(error)
        orphans = left_behind(set_traps.path)
        if config.twin:
            run_twin(config, set_traps)
    return judge(drill, failure, orphans, twin)[0]


def rounds_table(faults: list[dict[str, Any]]) -> str:
    """p50 / p99 of what a fault cost, per kind and rung."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for fault in (fault for fault in faults if "fault" in fault):
        kind = f"{fault['kind']} ({fault['how']})" if fault["how"] else fault["kind"]
        rows[kind, fault.get("rung", "") or "none needed"].append(fault)
    cells: list[list[object]] = []
    for (kind, rung), told in sorted(rows.items()):
        detect = [t["phases_ms"]["detect"] for t in told]
        whole = [sum(t["phases_ms"].values()) for t in told]
        commit = [t["to_commit_ms"] for t in told if t.get("to_commit_ms") is not None]
        passed = sum(t["passed"] for t in told)
        cells.append([kind, rung, f"{passed} of {len(told)}", *map(_both, (detect, whole, commit))])
    head = ["fault", "rung", "passed", "detect, ms", "recovery, ms", "to commit, ms"]
    return table(head, cells)


def _both(values: list[float]) -> str:
    return f"{median(values):.0f} / {quantile(values, 0.99):.0f}" if values else ""


def run_ratio(args: argparse.Namespace, mtbf_s: float, out: Path) -> dict[str, float]:
    """One job under a Poisson process of kills, and the pace of the same job before the first."""
    shape = Shape(nodes=RATIO_RANKS, workers=1, script=script(args, 100_000_000))
    duration_s = 60 * args.minutes
    config = DrillConfig(
        shape=shape, out=out, mtbf_s=mtbf_s, duration_s=duration_s, seed=args.seed,
        kinds=("kill-worker", "kill-node"), pace_s=args.pace,
    )  # fmt: skip
    with traps(frozenset({*config.points, "reduce"})) as set_traps:
        job = DrilledJob(out / "disturbed", shape, set_traps)
        drill = Drill(config, job, say)
        with job:
            job.await_strength()
            before, began = job.watch.step, time.monotonic()
            twin_s = min(TWIN_S, duration_s)
            drill.wait_until(began + twin_s)
            undisturbed = (job.watch.step - before) / (time.monotonic() - began)
            first, begins = job.watch.step, time.time()
            drill.poisson()
            committed, ends = job.watch.step - first, time.time()
    told = [e for e in events_of(out / "disturbed") if begins < e["time"] < ends]
    recovered = {e["generation"]: e["redone"] for e in told if e["event"] == "recovered"}
    attempted = committed + len(recovered) + sum(recovered.values())
    return {
        "mtbf_s": mtbf_s, "faults": len(drill.struck), "committed": committed,
        "of_undisturbed": committed / (undisturbed * (ends - begins)),
        "of_attempted": committed / attempted, "generations": len(recovered),
        "redone": sum(recovered.values()), "undisturbed_steps_per_s": undisturbed,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parts = ("rounds", "ratio")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each ratio")
    parser.add_argument("--mtbf", nargs="+", type=float, default=(60.0, 15.0))
    parser.add_argument("--pace", type=float, default=0.4, help="seconds of a step")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with workspace(args.out) as out:
        if "rounds" in args.parts:
            found["rounds"] = run_rounds(args, out / "rounds")
            faults, jobs = found["rounds"]["faults"], found["rounds"]["jobs"]
            print(rounds_table(faults))
            run = [fault for fault in faults if "fault" in fault]
            passed = sum(fault["passed"] for fault in run)
            kept = sum(not any(job["violations"].values()) for job in jobs)
            print(f"\n{passed} of {len(run)} faults took effect and were recovered from, "
                  f"{len(faults) - len(run)} were not run; "
                  f"{kept} of {len(jobs)} jobs kept every promise, bits included\n")  # fmt: skip
        if "ratio" in args.parts:
            found["ratio"] = [run_ratio(args, s, out / f"mtbf{s:g}") for s in args.mtbf]
            head = ["MTBF, s", "faults", "committed", "of undisturbed", "of attempted"]
            print(table(head, [
                [r["mtbf_s"], r["faults"], r["committed"], f"{r['of_undisturbed']:.1%}",
                 f"{r['of_attempted']:.1%}"] for r in found["ratio"]
            ]))  # fmt: skip
        write_json(args.json, found)


if __name__ == "__main__":
    main()
