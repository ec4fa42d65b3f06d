"""The same bits from any number of ranks, any ZeRO stage, with and without losses.

    python benchmarks/same_bits.py [--ranks 1 2 3 4 5 8] [--zero 0 1 2] [--dtypes fp32 bf16]

Each run trains the same small GPT (dropout, gradient clipping, warm-up and cosine) for the same
number of steps; its digest is the sha256 of all parameters and of the optimizer state. One run per
ZeRO stage and dtype is disturbed: it starts on three nodes, a fourth joins, and workers and whole
nodes are killed at random instants and come back. One digest per dtype is expected.
"""

import argparse
import json
import os
import random
import signal
from itertools import product
from pathlib import Path

from job import (
    GPT,
    SMALL,
    Job,
    Strength,
    launched,
    outlast,
    parser_of,
    say,
    table,
    workspace,
    write_json,
)  # fmt: skip

END_LIMIT_S = 900.0
PACE_S = 1.0  # a step of a disturbed run takes at least that: what was killed needs time to return
LAST = 8  # no more losses in so many last steps: what comes back must still meet the job


def script(args: argparse.Namespace, zero: int, dtype: str, digest: Path) -> list[str]:
    """The training, the same in all runs."""
    return [GPT, *SMALL, f"--steps={args.steps}", f"--seed={args.seed}", "--dropout=0.1",
            "--clip=0.5", "--warmup=5", f"--zero={zero}", f"--dtype={dtype}",
            f"--digest-file={digest}"]  # fmt: skip


def disturbed(out: Path, steps: int, command: list[str], generator: random.Random) -> str:
    """A run with a join and with as many losses as fit; returns what happened."""
    done = {"worker": 0, "node": 0, "join": 0}
    with Job(out, [*command, f"--pace={PACE_S}"], Strength(nodes=4, least=3)) as job:
        job.await_strength(ranks=3, commits=1)
        job.nodes.start(job.nodes.names[-1])
        done["join"] += 1
        while True:
            job.watch.until(lambda: True if _strong(job, steps) else None, "4 ranks", END_LIMIT_S)
            if job.watch.step >= steps - LAST:
                break
            member = generator.choice(job.members)
            kind = "worker" if done["worker"] <= done["node"] else "node"
            pid = job.nodes.workers(member["node"])[0]
            job.random_moment(generator, PACE_S)
            if kind == "worker":
                os.kill(pid, signal.SIGKILL)
                job.await_view_without(int(member["workers"][0]))
            else:
                job.nodes.kill_node(member["node"])
                job.bring_back(member["node"], member["agent"])
            done[kind] += 1
        job.watch.until(
            lambda: True if set(job.nodes.exit_codes().values()) == {0} else None,
            "the end", END_LIMIT_S,
        )  # fmt: skip
    return f"{done['worker']} workers and {done['node']} nodes killed, {done['join']} joined"


def _strong(job: Job, steps: int) -> bool:
    """All are there and their parity is complete, or the run is nearly over."""
    view = job.watch.view
    last = job.watch.metrics[-3:]
    full = view is not None and len(job.holders) == job.strength.ranks
    ready = full and len(last) == 3 and last[0]["time"] > (view or {})["agreed"]
    return ready or job.watch.step >= steps - LAST


def main() -> None:
    """The command line; the exit code is 1 if digests of one dtype differ."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 3, 4, 5, 8])
    parser.add_argument("--zero", nargs="+", type=int, choices=(0, 1, 2), default=[0, 1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--no-losses", action="store_true", help="leave the disturbed runs out")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    rows: list[list[object]] = []
    generator = random.Random(args.seed)
    with workspace(args.out) as out:
        for dtype, zero in product(args.dtypes, args.zero):
            for ranks in [*args.ranks, *([] if args.no_losses else [0])]:
                here = out / f"{dtype}-zero{zero}-{ranks or 'losses'}"
                command = script(args, zero, dtype, here / "digest.json")
                if ranks:
                    launch = outlast("launch", "--standalone", "--nproc-per-node", str(ranks),
                                     "--log-dir", str(here / "logs"), *command)  # fmt: skip
                    code = launched(here, launch, END_LIMIT_S)
                    what = f"exit code {code}" if code else "none"
                else:
                    what = disturbed(here, args.steps, command, generator)
                file = here / "digest.json"
                digest = json.loads(file.read_text())["sha256"] if file.exists() else "none"
                rows.append([dtype, zero, ranks or "3 to 4", what, digest])
                say(" ".join(map(str, rows[-1])))
    print(table(["dtype", "ZeRO", "ranks", "losses", "sha256"], rows))
    digests = {dtype: sorted({str(r[-1]) for r in rows if r[0] == dtype}) for dtype in args.dtypes}
    print("\n" + "; ".join(f"{dtype}: {len(found)} digest" for dtype, found in digests.items()))
    write_json(args.json, {"steps": args.steps, "digests": digests, "runs": rows})
    if any(len(found) != 1 or "none" in found for found in digests.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
