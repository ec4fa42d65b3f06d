"""The demo: a small GPT is trained on nodes that die, and ends in the bits of a run left alone.

    make demo                                # or: python examples/demo.py --steps 60 --nodes 4

Every node is an `outlast launch` of its own. At four moments of the run something is killed with
SIGKILL: a worker, a whole node, the node that proposes the views, and a node in the middle of the
recovery from another loss. What was killed comes back and is taken in again. Then the same
training runs undisturbed, on another number of workers. The demo succeeds if both ended in the same
sha256 over parameters and optimizer state and every fault took effect.
"""

import argparse
import dataclasses
import json
import secrets
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodes import Nodes, free_port, outlast
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from verdict import passed, planned_outcomes, table, verdict
from watch import Watch

from outlast.launch.report import load_run, write_report
from outlast.launch.timeline import Fault

EXAMPLES = Path(__file__).resolve().parent
# When (as a share of all steps) and what; a fault waits until everything is back from the last.
PLAN = ((0.10, "worker"), (0.30, "node"), (0.50, "proposer"), (0.70, "cascade"))
START_LIMIT_S, RETURN_LIMIT_S, STEP_LIMIT_S, END_LIMIT_S = 180.0, 180.0, 600.0, 1800.0


class DemoFailed(Exception):
    """The demo cannot go on; the text says why and where to look."""


class Demo:
    """One demo: the nodes, what their logs say, and the faults injected so far."""

    def __init__(self, args: argparse.Namespace, console: Console, progress: Progress) -> None:
        self.args, self.console, self.progress = args, console, progress
        self.logs = args.out / "disturbed"
        self.faults: list[Fault] = []
        self.port = free_port()
        self.nodes = Nodes(
            [f"node{index}" for index in range(args.nodes)],
            self._command(self.logs, f"--rdzv-endpoint=127.0.0.1:{self.port}"),
            args.out / "nodes",
            secrets.token_hex(32),
        )
        self.watch = Watch(self.logs, self._alive)
        self.task = progress.add_task("disturbed", total=args.steps, loss="")

    def _command(self, logs: Path, endpoint: str) -> list[str]:
        return outlast(
            "launch", "--nnodes", str(self.args.nodes), endpoint, "--rdzv-id", "demo",
            "--nproc-per-node", str(self.args.workers_per_node), "--node-name", "{node}",
            "--max-restarts", "3", "--log-dir", str(logs), *training(self.args, logs),
            f"--pace={self.args.pace}",  # else a fast machine ends before a killed node is back
        )  # fmt: skip

    def _alive(self) -> None:
        show(self.progress, self.task, self.watch)
        failed = {node: code for node, code in self.nodes.exit_codes().items() if code}
        if failed:
            node, code = next(iter(failed.items()))
            log = self.nodes.output / f"{node}.log"
            raise DemoFailed(f"{node} ended with {code}; the end of {log}:\n{tail(log)}")
        if self.watch.step >= self.args.steps and len(self.faults) < len(PLAN) + 1:
            raise DemoFailed("the training was over before the last fault: give more --steps")

    def run(self) -> None:
        """Start all nodes, inject the plan, and wait for the end."""
        with self.nodes:
            for node in self.nodes.names:
                self.nodes.start(node)
            self.say(f"{self.args.nodes} nodes start")
            for share, kind in PLAN:
                self._wait_for_strength(int(share * self.args.steps))
                getattr(self, f"_{kind}")()
            self._wait_for_strength(0)
            self.say("everything is back; to the end")
            self.watch.until(self._ended, "the end of the training", END_LIMIT_S)
            show(self.progress, self.task, self.watch)

    def _ended(self) -> bool | None:
        return True if all(code == 0 for code in self.nodes.exit_codes().values()) else None

    # ---- the faults

    def _worker(self, note: str = "") -> None:
        node = self.members()[1]["node"]
        at, pid = self.nodes.kill_worker(node)
        self.say(f"step {self.watch.step}: kill -9 of a worker of {node}{note}")
        lost = self.watch.until(
            lambda: self.watch.event("worker_lost", pid=pid), "the loss to be seen",
            RETURN_LIMIT_S, pause_s=0.002,
        )  # fmt: skip
        label = f"worker of {node} killed"
        self.faults.append(Fault(at, "worker", label, node, holders=(int(lost["holder"]),)))

    def _node(self) -> None:
        self._kill_node(self.members()[-1], "node", "whole node")
        self._bring_back(self.faults[-1].node)

    def _proposer(self) -> None:
        self._kill_node(self.members()[0], "proposer", "proposer of the views")
        self._bring_back(self.faults[-1].node)

    def _cascade(self) -> None:
        victim = self.members()[-1]
        self._worker(", and of a node while the others recover")
        holder = self.faults[-1].holders[0]
        self.watch.until(
            lambda: True if holder not in self.holders() else None, "the view without it",
            RETURN_LIMIT_S, pause_s=0.002,
        )  # fmt: skip
        self._kill_node(victim, "cascade", "during that recovery")
        self._bring_back(victim["node"])

    def _kill_node(self, member: dict[str, Any], kind: str, note: str) -> None:
        node = member["node"]
        at = self.nodes.kill_node(node)
        self.say(f"step {self.watch.step}: kill -9 of {node} ({note})")
        holders = tuple(int(holder) for holder in member["workers"])
        label = f"{node} killed, {note}"
        self.faults.append(Fault(at, kind, label, node, (member["agent"],), holders))

    def _bring_back(self, node: str) -> None:
        gone = set(self.faults[-1].agents)
        self.watch.until(
            lambda: None if gone & {m["agent"] for m in self.members()} else True,
            f"a view without {node}", RETURN_LIMIT_S,
        )  # fmt: skip
        self.nodes.start(node)
        self.say(f"step {self.watch.step}: {node} is started again")

    # ---- what the logs say

    def members(self) -> list[dict[str, Any]]:
        """The members of the newest view, the proposer first."""
        return list(self.watch.view["members"]) if self.watch.view else []

    def holders(self) -> set[int]:
        """All workers of the newest view."""
        return {int(holder) for member in self.members() for holder in member["workers"]}

    def _wait_for_strength(self, step: int) -> None:
        """Until all nodes and workers are in the view, have committed a step, and `step` is due."""

        def strong() -> bool | None:
            view = self.watch.view
            full = len(self.holders()) == self.args.nodes * self.args.workers_per_node
            if view is None or not full or not self.watch.metrics:
                return None
            since = float(self.watch.metrics[-1]["time"]) - float(view["agreed"])
            return True if since > 0 and self.watch.step >= step else None

        limit = START_LIMIT_S if not self.faults else RETURN_LIMIT_S + STEP_LIMIT_S
        self.watch.until(strong, f"all workers to be there at step {step}", limit)
        if self.faults:
            self.say(f"step {self.watch.step}: all {len(self.holders())} workers are in the job")

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(f"[dim]disturbed[/dim]  {text}", highlight=False)


def run_twin(args: argparse.Namespace, progress: Progress) -> None:
    """The same training, left alone: one node with two workers."""
    logs = args.out / "twin"
    command = outlast(
        "launch", "--standalone", "--nnodes", "1", "--nproc-per-node", "2", "--node-name", "twin",
        "--log-dir", str(logs), *training(args, logs),
    )  # fmt: skip
    task = progress.add_task("twin", total=args.steps, loss="")
    with Nodes(["twin"], command, args.out / "nodes", secrets.token_hex(32)) as nodes:
        watch = Watch(logs, lambda: show(progress, task, watch))
        nodes.start("twin")
        code = watch.until(lambda: nodes.exit_codes()["twin"], "the end of the twin", END_LIMIT_S)
        show(progress, task, watch)
    if code != 0:
        log = args.out / "nodes" / "twin.log"
        raise DemoFailed(f"the twin ended with {code}; the end of {log}:\n{tail(log)}")


def training(args: argparse.Namespace, logs: Path) -> list[str]:
    """The command line of the training, the same in both runs but for the digest's place."""
    flags = {
        "steps": args.steps, "layers": args.layers, "width": args.width, "heads": args.heads,
        "context": args.context, "batch-size": args.batch_size, "leaves": args.leaves,
        "zero": args.zero, "seed": args.seed, "corpus-mb": args.corpus_mb, "eval-every": 0,
        "digest-file": logs / "digest.json",
    }  # fmt: skip
    return [str(EXAMPLES / "gpt.py"), *(f"--{name}={value}" for name, value in flags.items())]


def show(progress: Progress, task: Any, watch: Watch) -> None:
    """Bring the bar of a run up to date."""
    if watch.metrics:
        loss = f"loss {watch.metrics[-1]['loss']:.3f}"
        progress.update(task, completed=watch.step, loss=loss)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def clear(out: Path, keep: bool) -> None:
    """Make room in `out`: what an earlier demo left is removed, or set aside where asked to."""
    earlier = [out / name for name in ("disturbed", "twin", "nodes", "verdict.json", "report.html")]
    if keep and any(path.exists() for path in earlier):
        number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))
    for path in earlier:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def conclude(args: argparse.Namespace, faults: Sequence[Fault], console: Console) -> bool:
    """Write the verdict and the page, print the table; whether all went as promised."""
    run, twin = load_run(args.out / "disturbed", faults), load_run(args.out / "twin")
    result = verdict(run, twin, faults)
    (args.out / "verdict.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_report(args.out / "report.html", run, twin)
    console.print(table(run, faults, console.width))
    for loss in result["unplanned"]:
        console.print(f"not planned, at {loss}", style="yellow", highlight=False)
    for name, digest in result["sha256"].items():
        console.print(f"sha256 {name:10} {digest}", highlight=False, soft_wrap=True)
    style = "bold green" if result["identical"] else "bold red"
    word = "identical, bit for bit" if result["identical"] else "NOT identical"
    losses = "" if result["losses_identical"] else "; the losses differ on the way"
    console.print(f"{word}{losses}", style=style)
    console.print(f"report: {args.out / 'report.html'}", highlight=False, soft_wrap=True)
    effective = len(planned_outcomes(run, faults)) == len(faults)
    return effective and passed(result, planned=len(PLAN) + 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; the default model has 0.9 million parameters."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=120)
    add("--nodes", type=int, default=4, help="at least 3, so that a quorum is always left")
    add("--workers-per-node", type=int, default=2)
    add("--pace", type=float, default=1.0, help="seconds that a step takes at least")
    add("--out", type=Path, default=Path("runs/demo"))
    add("--keep", action="store_true", help="set the results of an earlier demo aside")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=128)
    add("--batch-size", type=int, default=4)
    add("--leaves", type=int, default=8)
    add("--zero", type=int, choices=(0, 1, 2), default=2)
    add("--seed", type=int, default=0)
    add("--corpus-mb", type=float, default=4.0)
    args = parser.parse_args(arguments)
    if args.nodes < 3:
        parser.error("--nodes: at least 3, so that a quorum is always left")
    args.out = args.out.absolute()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 only if the results are identical and every fault took effect."""
    args = parse(arguments)
    console = Console()
    clear(args.out, args.keep)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up
    bar = (TextColumn("{task.description:9}"), BarColumn(30), TextColumn("{task.completed}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (*bar, TextColumn("of {task.total}"), TextColumn("{task.fields[loss]}"), *times)
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            demo = Demo(args, console, progress)
            demo.run()
            console.print("[dim]twin[/dim]       the same training, left alone", highlight=False)
            run_twin(args, progress)
        noted = [dataclasses.asdict(fault) for fault in demo.faults]
        (demo.logs / "faults.json").write_text(json.dumps(noted), encoding="utf-8")
        return 0 if conclude(args, demo.faults, console) else 1
    except (DemoFailed, TimeoutError) as error:
        console.print(f"the demo failed: {error}", style="bold red", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; all processes are ended")
        return 130


if __name__ == "__main__":
    sys.exit(main())
