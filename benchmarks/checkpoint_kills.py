"""Kill a whole job at random moments of its saves, again and again: what does it go on from?

    python benchmarks/checkpoint_kills.py [--kills 100] [--ranks 2] [--seed 0]

A small GPT saves as often as it can. Every process of the job gets SIGKILL, in random order, at a
random moment after it has trained on. Then everything that is listed as complete is read in full,
and the job is started again: it has to go on from the newest. After the last kill it is left alone,
and its bits are compared with those of a run that nobody killed. Prints what was found; exits 1 if
anything was wrong.
"""

import argparse
import collections
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from job import GPT, SMALL

from outlast.checkpoint.source import digest
from outlast.checkpoint.steps import Steps
from outlast.launch.drill.nodes import outlast

PATIENCE_S, WATCHED_S, MORE = 120.0, 4.0, 20


def start(args: argparse.Namespace, logs: Path, steps: int, saves: bool) -> subprocess.Popen[str]:
    """The job, from whatever is on storage."""
    flags = ["--standalone", "--nproc-per-node", str(args.ranks), "--log-dir", str(logs)]
    flags += ["--checkpoint-every", "1", "--checkpoint-keep", "3"] if saves else []
    script = [GPT, *SMALL, "--steps", str(steps), "--seed", "3"]
    flags += ["--checkpoint-dir", str(logs.with_suffix(".steps"))]
    command = outlast("launch", *flags, *script)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(job: subprocess.Popen[str], chance: random.Random) -> None:
    """SIGKILL for every process of the job."""
    root = psutil.Process(job.pid)
    every = [root, *root.children(recursive=True)]
    chance.shuffle(every)
    for process in every:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(every, PATIENCE_S)
    job.communicate()


def events(logs: Path) -> list[dict[str, object]]:
    """All that the job has told."""
    found = []
    for path in logs.rglob("*events*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut short by a kill
    return sorted(found, key=lambda event: float(str(event["time"])))


def whole(steps: Steps) -> list[str]:
    """Names of what is listed, newest first, all of it read; Corrupt if any byte is wrong."""
    names = steps.names()
    for name in names:
        source = steps.open(name)
        for array in source.contents.arrays:
            assert digest(source, array) == source.stored_digest(array), f"{name}: {array.key}"
        source.close()
    return names


def await_saves(logs: Path, job: subprocess.Popen[str], known: int) -> None:
    """Until the job has begun to save since it was started."""
    limit = time.monotonic() + PATIENCE_S
    while sum(event.get("event") == "saving" for event in events(logs)) <= known:
        assert time.monotonic() < limit, "the job does not train"
        assert job.poll() is None, "the job has ended"
        time.sleep(0.02)


def finish(args: argparse.Namespace, logs: Path, steps: int, saves: bool) -> str:
    """The digest of a run that is left alone."""
    output, _ = start(args, logs, steps, saves).communicate(timeout=20 * PATIENCE_S)
    found = re.search(r"[0-9a-f]{64}", output)
    assert found, output[-3000:]
    return found[0]


def main() -> int:
    """Kill, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"kills": 100, "ranks": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch, "job")
        steps, newest, left = Steps(str(logs.with_suffix(".steps"))), -1, collections.Counter[str]()
        for _ in range(args.kills):
            known = sum(event.get("event") == "saving" for event in events(logs))
            job = start(args, logs, 10**6, saves=True)
            await_saves(logs, job, known)
            time.sleep(chance.uniform(0, WATCHED_S))
            kill(job, chance)
            loaded = [event for event in events(logs) if event.get("event") == "loaded"]
            assert not loaded or newest <= int(str(loaded[-1]["step"])), "an older step was taken"
            names = whole(steps)
            assert names or newest < 0, "all steps are gone"
            assert not names or int(names[0][5:17]) >= newest, "the newest step is gone"
            newest = int(names[0][5:17]) if names else -1
            halves = {path.name for path in logs.with_suffix(".steps").iterdir()} - {*names}
            left["half ones left behind, none listed"] += bool(halves)
        total = max(newest, 0) + MORE
        same = finish(args, logs, total, True) == finish(args, Path(scratch, "twin"), total, False)
        counts = collections.Counter(str(event.get("event")) for event in events(logs))
    print(
        f"{args.kills} kills in {time.monotonic() - began:.0f} s, the newest step of {total - MORE}"
    )
    print(f"saves begun {counts['saving']}, completed {counts['saved']}; {dict(left)}")
    print(f"bits of the run that nobody killed: {'the same' if same else 'DIFFERENT'}")
    return not same


if __name__ == "__main__":
    sys.exit(main())
