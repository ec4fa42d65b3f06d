"""Whether anything grows: hundreds of losses and returns in one job.

    python benchmarks/soak.py [--rounds 200] [--every 10]

Four nodes of one worker. Every round kills the worker of the last node, at a random instant, and
waits until its successor trains along; so the agents and the other three workers live through all
rounds. Every few rounds their open files, threads and resident memory are noted. A quantity has
grown if the median of the last third of the notes exceeds that of the first third after the
first round by more than its allowance, which is what a running process varies by.
"""

import argparse
import os
import random
import signal
import time
from pathlib import Path

import psutil
from job import (
    GPT,
    SMALL,
    Job,
    Strength,
    median,
    parser_of,
    say,
    table,
    workspace,
    write_json,
)  # fmt: skip

MIB = 2**20
SETTLE_S = 3.0  # the groups of the last view are taken down behind the training
ALLOWANCE = {"files": 2.0, "threads": 2.0, "MiB": 16.0}
ENDLESS = ["--steps=100000000", "--pace=0.3"]  # the pauses let a successor start sooner
Note = dict[str, dict[str, float]]  # process -> quantity -> value


def note(job: Job, victim: str) -> Note:
    """What every agent and every worker that is never killed uses at the moment."""
    found = {}
    for member in job.members:
        pids = {f"agent {member['node']}": job.agent_pid(member["agent"])}
        if member["node"] != victim:
            pids[f"worker {member['node']}"] = job.nodes.workers(member["node"])[0]
        for name, pid in pids.items():
            process = psutil.Process(pid)
            found[name] = {
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "MiB": process.memory_info().rss / MIB,
            }
    return found


def soak(args: argparse.Namespace, out: Path) -> list[Note]:
    """All rounds; one note at the start and one every few rounds."""
    generator, notes = random.Random(args.seed), []
    with Job(out, [GPT, *SMALL, *ENDLESS], Strength()) as job:
        for done in range(args.rounds + 1):
            job.await_strength()
            victim = job.nodes.names[-1]
            if done % args.every == 0 or done == args.rounds:
                time.sleep(SETTLE_S)
                notes.append(note(job, victim))
                write_json(args.json, {"rounds": done, "notes": notes})
                most = {q: max(taken[q] for taken in notes[-1].values()) for q in ALLOWANCE}
                say(f"round {done}: step {job.watch.step}, at most {most}")
            if done < args.rounds:
                pid = job.nodes.workers(victim)[0]
                lost = next(m for m in job.members if m["node"] == victim)["workers"][0]
                job.random_moment(generator, job.step_s(2))
                os.kill(pid, signal.SIGKILL)
                job.await_view_without(lost)
    return notes


def summary(notes: list[Note]) -> list[list[object]]:
    """A row per process and quantity: first, last, most, and whether it has grown."""
    rows: list[list[object]] = []
    for process in notes[0]:
        for quantity, allowance in ALLOWANCE.items():
            values = [taken[process][quantity] for taken in notes if process in taken]
            later = values[1:] or values
            third = max(1, len(later) // 3)
            growth = median(later[-third:]) - median(later[:third])
            verdict = "GROWS" if growth > allowance else "steady"
            edges = [round(values[0]), round(values[-1]), round(max(values))]
            rows.append([process, quantity, *edges, verdict])
    return rows


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="rounds between two notes")
    args = parser.parse_args()
    with workspace(args.out) as out:
        notes = soak(args, out / "soak")
    rows = summary(notes)
    print(table(["process", "quantity", "first", "last", "most", "verdict"], rows))
    grown = [f"{row[0]}: {row[1]}" for row in rows if row[-1] != "steady"]
    print(f"\n{args.rounds} rounds; " + (f"GROWTH of {', '.join(grown)}" if grown else "no growth"))
    write_json(args.json, {"rounds": args.rounds, "notes": notes, "grown": grown})


if __name__ == "__main__":
    main()
