"""Kill islands at random moments, again and again: do the others go on, and in the same bits?

    python benchmarks/islands_kills.py [--islands 3] [--steps 6000] [--every 6] [--pause-s 6]

A small GPT trains on islands of one worker each, as fast as it can. Every process of a random
island but the first gets SIGKILL at random moments, also while it comes back from the last time;
the launcher starts it again, and it takes the state of another one. The last quarter of the steps
is left alone. Then:

- the longest time between two steps of island 0, beside that of a run that nobody killed;
- the loss of the outer copy at the end, on text that nobody trained on, beside that of the same
  run, whose islands have seen more text: it may be worse by `BAND`;
- whether all islands ended with the same outer parameters and momenta;
- whether island 0, trained alone on what it had recorded, ended in the same bits.

Prints what was found; exits 1 if anything was wrong.
"""

import argparse
import collections
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from job import ROOT, SMALL, median, parser_of, say, table, workspace, write_json

from outlast.launch.drill.nodes import outlast

SCRIPT = str(ROOT.parent / "examples" / "gpt_islands.py")
LIMIT_S, QUIET, BAND = 900.0, 0.25, 0.05
STALL_S = 3.0  # longest that island 0 may stand, more than in the run that nobody killed


@dataclass
class Training:
    """What came of one run: the steps and events of each island."""

    directory: Path
    output: str = ""
    code: int | None = None
    kills: list[tuple[float, int, int]] = field(default_factory=list)  # time, island, step of 0
    seconds: float = 0.0

    def lines(self, island: int, pattern: str) -> list[dict[str, Any]]:
        """The JSON lines of an island's logs, by time."""
        found = []
        for path in (self.directory / f"island{island}").glob(pattern):
            for line in path.read_text().splitlines():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # cut short by a kill
        return sorted(found, key=lambda line: float(line["time"]))

    def gaps(self) -> list[float]:
        """Seconds between the steps of island 0."""
        times = [line["time"] for line in self.lines(0, "metrics.jsonl")]
        return [after - before for before, after in pairwise(times)]

    @property
    def bits(self) -> float:
        """Per byte of text that nobody trained on, by the outer copy at the end."""
        last = self.lines(0, "metrics.jsonl")[-1]
        return float(last["validation_bits_per_byte"])

    def events(self, island: int, name: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [each for each in self.lines(island, "events-*.jsonl") if each["event"] == name]

    def rounds(self, island: int) -> collections.Counter[int]:
        """How many islands counted -> rounds of this island."""
        return collections.Counter(len(each["islands"]) for each in self.events(island, "outer"))

    @property
    def outers(self) -> dict[str, str]:
        """Island -> sha256 of the outer state it has ended with."""
        return dict(re.findall(r"island (\S+), of the outer state: ([0-9a-f]{64})", self.output))


def flags(args: argparse.Namespace) -> list[str]:
    """Of the script."""
    exchange = [f"--every={args.every}", "--fragment=2"]
    sizes = ["--leaves=2", f"--steps={args.steps}", f"--seed={args.seed}", "--eval-every=1000000"]
    return [SCRIPT, *SMALL, *exchange, *sizes]


def kill(run: Training, island: int, chance: random.Random) -> bool:
    """SIGKILL for every process of an island, in random order; False if none lives."""
    try:
        agent = psutil.Process(run.events(island, "started")[-1]["pid"])
        victims = [agent, *agent.children(recursive=True)]
    except (psutil.NoSuchProcess, IndexError):
        return False
    chance.shuffle(victims)
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return True


def train(args: argparse.Namespace, directory: Path, chance: random.Random | None) -> Training:
    """All islands; with `chance`, some are killed."""
    found, record = Training(directory), []
    directory.mkdir(parents=True)
    command = ["--islands", str(args.islands), "--standalone", "--log-dir", str(directory)]
    if chance is not None:
        record = ["--record", str(directory / "record")]
    began, out = time.monotonic(), directory / "output.txt"
    with out.open("w") as stream:
        job = subprocess.Popen(
            outlast("launch", *command, *flags(args), *record),
            stdout=stream, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            while chance is not None and job.poll() is None:
                time.sleep(chance.uniform(0, 2 * args.pause_s))
                step = len(found.gaps())
                if step > (1 - QUIET) * args.steps:
                    break
                victim = chance.randrange(1, args.islands)
                if step > args.every and kill(found, victim, chance):
                    found.kills.append((time.time(), victim, step))
            found.code = job.wait(LIMIT_S)
        finally:
            job.terminate()
            job.wait()
    found.seconds, found.output = time.monotonic() - began, out.read_text()
    return found


def again(args: argparse.Namespace, run: Training) -> dict[str, bool]:
    """Island 0 alone, on what it had recorded: are the bits the same?"""
    past = str(run.directory / "record" / f"island0of{args.islands}")
    done = subprocess.run(
        [sys.executable, *flags(args), "--replay", past],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    mine = re.findall(r"optimizer state: ([0-9a-f]{64})", done.stdout)
    outer = re.findall(r"of the outer state: ([0-9a-f]{64})", done.stdout)
    say((done.stdout + done.stderr)[-500:])
    return {
        "state": len(mine) == 1 and mine[0] in run.output,
        "outer state": outer == [run.outers.get("0")],
    }


def judge(args: argparse.Namespace, calm: Training, wild: Training) -> list[str]:
    """What is wrong."""
    flaws = {
        "a run did not end well": (calm.code, wild.code) != (0, 0),
        "no island was killed": not wild.kills,
        "island 0 stood": max(wild.gaps()) > max(calm.gaps()) + STALL_S,
        "the loss is not that of the run without kills": not wild.bits < calm.bits * (1 + BAND),
        "the islands ended with different outer states": len(wild.outers) != args.islands
        or len(set(wild.outers.values())) != 1,
        "there were rounds of one island in the run without kills": calm.rounds(0)[1] > 0,
    }
    return [flaw for flaw, holds in flaws.items() if holds]


def rows(args: argparse.Namespace, runs: dict[str, Training]) -> list[Sequence[object]]:
    """A row of the table for each run."""
    found: list[Sequence[object]] = []
    for name, run in runs.items():
        gaps, rounds = run.gaps(), run.rounds(0)
        found.append((
            name, len(run.kills), round(run.seconds), sum(rounds.values()),
            " / ".join(str(rounds[count]) for count in range(args.islands, 0, -1)),
            len(run.events(0, "island_missed")), 1000 * median(gaps), 1000 * max(gaps),
            max(gaps) / median(gaps),
            f"{run.bits:.4f}",
        ))  # fmt: skip
    return found


def main() -> int:
    """Both runs and the replay, and what was found."""
    parser = parser_of(__doc__)
    parser.add_argument("--islands", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--pause-s", type=float, default=6.0, help="between kills, on average")
    args = parser.parse_args()
    with workspace(args.out) as out:
        calm = train(args, out / "calm", None)
        say(f"without kills: {calm.seconds:.0f} s")
        wild = train(args, out / "kills", random.Random(args.seed))
        say(f"{len(wild.kills)} kills: {wild.seconds:.0f} s")
        same = again(args, wild)
        counted = " / ".join(map(str, range(args.islands, 0, -1)))
        names = ("run", "kills", "s", "rounds", f"of {counted}", "missed", "median step, ms",
                 "longest, ms", "over the median", "bits per byte")  # fmt: skip
        print(table(names, rows(args, {"left alone": calm, "killed": wild})))
        served = sum(len(wild.events(island, "island_served")) for island in range(args.islands))
        forked = sum(len(wild.events(island, "island_forked")) for island in range(args.islands))
        print(f"\nstates handed over: {served}; islands that went astray: {forked}")
        for what, equal in same.items():
            print(
                f"island 0 once more, alone, from its record: {what} {('DIFFERS', 'same')[equal]}"
            )
        flaws = judge(args, calm, wild) + [f"{w} differs" for w, equal in same.items() if not equal]
        print("wrong: " + "; ".join(flaws) if flaws else "nothing is wrong")
        write_json(args.json, {"kills": wild.kills, "gaps": {"calm": calm.gaps(),
                   "kills": wild.gaps()}, "flaws": flaws})  # fmt: skip
    return bool(flaws)


if __name__ == "__main__":
    sys.exit(main())
