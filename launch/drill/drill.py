"""`outlast drill`: the user's own command under a list of faults, and a verdict.

The job runs on pretended nodes of this machine. Every salvo waits until the job is at full
strength and on its own redundancy; with a mean time between failures nothing is waited for but a
quorum. Afterwards the same command runs undisturbed, as the twin, and every promise is checked.
"""

import dataclasses
import json
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import RECOVERY, STEP
from outlast.launch.drill.drilled_job import RETURN_LIMIT_S, DrilledJob, DrillFailed, Shape
from outlast.launch.drill.fault import DRAWN, KINDS, Order, Salvo, draw, parse
from outlast.launch.drill.namespaces import Namespaces, missing
from outlast.launch.drill.strike import Striker, Struck
from outlast.launch.drill.trap import Traps
from outlast.launch.drill.verdict import announced, digests, promises, spelt, table, told, unplanned
from outlast.launch.report.report import (
    FAULTS_FILE,
    METRICS_FILE,
    load_run,
    read_lines,
    write_report,
)
from outlast.launch.report.timeline import RunRecord

EXIT_PASSED, EXIT_VIOLATED, EXIT_NOT_RUN = 0, 1, 3
ORPHAN_LIMIT_S = 5.0
QUORUM_NODES = 3  # with a mean time between failures no fault strikes while fewer are at work


@dataclass(frozen=True, kw_only=True)
class DrillConfig:
    """What is done to which job: `salvos`, or so many random `rounds`, or faults `mtbf_s` apart."""

    shape: Shape
    out: Path
    salvos: tuple[Salvo, ...] = ()
    rounds: int = 0
    mtbf_s: float = 0.0
    duration_s: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = DRAWN
    namespaces: bool = False
    twin: bool = True
    pace_s: float = 0.0

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        demands = (
            (self.salvos or self.rounds or self.mtbf_s,
             "nothing to do: give --fault SPEC, --faults FILE, --rounds N or --mtbf S"),
            (self.shape.nodes >= 3,
             "--nodes: at least 3, so that a quorum is left when one is lost"),
            (not self.mtbf_s or self.duration_s > 0, "--mtbf needs --duration SECONDS"),
            (not wrong, f"--kinds: {wrong} is none of {', '.join(KINDS)}"),
            (Path(self.shape.script[0]).is_file(),
             f"script {self.shape.script[0]!r} does not exist"),
        )  # fmt: skip
        for holds, complaint in demands:
            if not holds:
                raise Misuse(complaint)

    @property
    def points(self) -> frozenset[str]:
        """Failpoints to arm: those of the orders, or any that may be drawn."""
        orders = [order for salvo in self.salvos for order in salvo]
        kinds = {order.kind for order in orders} or set(self.kinds)
        used = {order.phase for order in orders} - {""}
        used |= {"reduce"} if self.pace_s or not self.mtbf_s else set()
        used |= {*STEP, *RECOVERY} if self.rounds else set()
        return frozenset(used | {"leaf" for kind in kinds if kind == "poison"})


def config_of(options: dict[str, Any]) -> DrillConfig:
    """The config behind the flags; raises Misuse."""
    specs = list(options["faults"])
    if options["file"]:
        try:
            specs += tomllib.loads(Path(options["file"]).read_text(encoding="utf-8"))["faults"]
        except (OSError, KeyError, ValueError) as error:
            raise Misuse(f"--faults: {options['file']} has no list `faults`: {error}") from error
    shape = Shape(
        nodes=options["nodes"], workers=options["nproc_per_node"], spares=options["spares"],
        launch=tuple(shlex.split(options["launch_flags"])),
        script=(options["script"], *options["script_args"]),
    )  # fmt: skip
    kinds = tuple(filter(None, options["kinds"].split(","))) or DRAWN
    same = ("rounds", "seed", "namespaces", "twin")
    return DrillConfig(
        shape=shape, out=Path(options["log_dir"]).absolute(), salvos=tuple(map(parse, specs)),
        mtbf_s=options["mtbf"], duration_s=options["duration"], pace_s=options["pace"],
        kinds=kinds, **{name: options[name] for name in same},
    )  # fmt: skip


class Drill:
    """One job under faults; `struck` is what was done to it so far."""

    def __init__(self, config: DrillConfig, job: DrilledJob, say: Callable[[str], None]) -> None:
        self.config, self.job, self.say = config, job, say
        self.generator = random.Random(config.seed)
        self.striker = Striker(job, None if config.salvos else self.generator)
        self.struck: list[Struck] = []
        job.pace_s, job.patient = config.pace_s, not config.mtbf_s

    def run(self) -> None:
        """All faults, then the job to its end."""
        job = self.job
        with job:
            self.say(f"{len(job.names)} nodes start; logs in {job.out}")
            if self.config.mtbf_s:
                self.poisson()
            for salvo in self._salvos():
                job.await_strength(salvo[0].step)
                if self.config.rounds:  # at any moment of a step
                    time.sleep(self.generator.uniform(0, max(self.config.pace_s, 0.2)))
                self._strike(salvo)
            job.over_is_news = False
            job.await_strength()
            self.say(f"step {job.watch.step}: everything is back; to the end")
            job.pace_s = 0.0
            job.await_end()

    def _salvos(self) -> Iterator[Salvo]:
        yield from self.config.salvos
        for _ in range(self.config.rounds):
            yield draw(self.generator, self.config.kinds)

    def poisson(self) -> None:
        """Faults at random moments; the clock starts at full strength."""
        job, generator = self.job, self.generator
        job.await_strength()
        due = time.monotonic()
        end = due + self.config.duration_s
        while (due := due + generator.expovariate(1 / self.config.mtbf_s)) < end:
            self.wait_until(due, QUORUM_NODES)
            self._strike((Order(generator.choice(self.config.kinds)),))
        self.wait_until(end)

    def wait_until(self, due: float, nodes: int = 0) -> None:
        """Until a moment of the monotonic clock, and so many nodes at work."""
        job, limit_s = self.job, due - time.monotonic() + RETURN_LIMIT_S
        job.await_that(
            lambda: time.monotonic() >= due and len(job.working) >= nodes,
            f"{nodes} nodes at work", limit_s,
        )  # fmt: skip

    def _strike(self, salvo: Salvo) -> None:
        self.say(f"step {self.job.watch.step}: {' + '.join(order.kind for order in salvo)}")
        for struck in self.striker.strike(salvo):
            self.struck.append(struck)
            what = struck.fault.label if struck.fault is not None else str(struck.order)
            said = "took effect" if struck.sign else struck.why
            self.say(f"step {self.job.watch.step}: {what}: {said}")


def run_drill(config: DrillConfig, console: Console, as_json: Path | None) -> int:
    """The whole drill; the exit code."""
    if config.namespaces and missing():
        console.print(f"not run: network namespaces: {missing()}", style="yellow")
        return EXIT_NOT_RUN
    for name in ("disturbed", "twin", "nodes"):  # what an earlier drill left, and nothing else
        shutil.rmtree(config.out / name, ignore_errors=True)
    config.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up

    def say(text: str) -> None:
        console.print(f"[dim]drill[/dim]  {text}", highlight=False, soft_wrap=True)

    failure = ""
    with traps(config.points) as armed, ExitStack() as stack:
        network = None
        if config.namespaces:
            network = stack.enter_context(Namespaces(config.shape.names))
        drill = Drill(
            config, DrilledJob(config.out / "disturbed", config.shape, armed, network), say
        )
        try:
            drill.run()
            if config.twin:
                say("the twin: the same command, left alone")
                run_twin(config, armed)
        except (DrillFailed, TimeoutError) as error:
            failure = str(error)
        orphans = left_behind(armed.path)
    twin = config.out / "twin" if config.twin and not failure else None
    result, run = judge(drill, failure, orphans, twin)
    for path in filter(None, (config.out / "verdict.json", as_json)):
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, console)
    try:
        write_report(config.out / "report.html", run, load_run(twin) if twin else None)
        console.print(f"report: {config.out / 'report.html'}", highlight=False, soft_wrap=True)
    except Misuse as error:
        console.print(str(error), style="yellow")
    return exit_code(result)


@contextmanager
def traps(points: frozenset[str]) -> Iterator[Traps]:
    """Traps with a socket in a directory of their own: its path must be short."""
    temporary = tempfile.TemporaryDirectory(prefix="outlast-drill-")
    with temporary as directory, Traps(Path(directory) / "socket", points) as found:
        yield found


def run_twin(config: DrillConfig, armed: Traps) -> None:
    """The same command, left alone: fewer processes, the same bits."""
    shape = replace(config.shape, nodes=1, workers=2, spares=0)
    with DrilledJob(config.out / "twin", shape, armed) as job:
        job.await_end()


def left_behind(socket: Path) -> list[str]:
    """Processes of the drilled job that are still there after a moment's grace."""

    def armed() -> Iterator[str]:
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(socket).encode() in file.read_bytes():
                    yield f"process {file.parent.name}"
            except OSError:  # gone, or somebody else's
                continue

    deadline = time.monotonic() + ORPHAN_LIMIT_S
    while (found := list(armed())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def events_of(directory: Path) -> list[dict[str, Any]]:
    """All events of a run, in order of time."""
    found = [e for log in sorted(directory.glob("events-*.jsonl")) for e in read_lines(log)]
    return sorted(found, key=lambda event: float(event["time"]))


def judge(
    drill: Drill, failure: str, orphans: Sequence[str], twin: Path | None
) -> tuple[dict[str, Any], RunRecord]:
    """The verdict on a drill that is over, and its story; `twin` are the logs of the twin.

    Notes the faults beside the logs, so that a report can be made again.
    """
    logs = drill.job.out
    faults = [s.fault for s in drill.struck if s.fault is not None]
    noted = [dataclasses.asdict(fault) for fault in faults]
    (logs / FAULTS_FILE).write_text(json.dumps(noted), encoding="utf-8")
    run, events = load_run(logs, faults), events_of(logs)
    twin_events = None if twin is None else events_of(twin)
    violations = promises(run, events, list(read_lines(logs / METRICS_FILE)), twin_events)
    violations["nothing left behind"] = list(orphans)
    if failure:
        violations["the drill came to its end"] = [failure]
    entries = [told(struck, run) for struck in drill.struck]
    result = {
        "passed": not any(violations.values()) and all(e["passed"] for e in entries),
        "sha256": {"disturbed": sorted(digests(events)),
                   "twin": sorted(digests(twin_events or []))},
        "lossy": announced(events), "events": entries, "violations": violations,
        "unplanned": unplanned(run, faults), "steps": drill.job.watch.step,
    }  # fmt: skip
    return result, run


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 1 a promise was broken or a fault without effect, 3 something was not run."""
    not_run = [e for e in result["events"] if e["why"].startswith("not run")]
    failed = [e for e in result["events"] if not e["passed"] and e not in not_run]
    if failed or any(result["violations"].values()):
        return EXIT_VIOLATED
    return EXIT_NOT_RUN if not_run else EXIT_PASSED


def show(result: dict[str, Any], console: Console) -> None:
    """The verdict for people."""
    console.print(table(result["events"], console.width))
    lines = [f"{entry['order']}: {entry['why']}" for entry in result["events"] if entry["why"]]
    lines += [f"not planned, at {loss}" for loss in result["unplanned"]]
    for line in lines:
        console.print(line, style="yellow", highlight=False)
    for name, wrong in result["violations"].items():
        word = f"[red]NO[/red]: {spelt(wrong)}" if wrong else "[green]yes[/green]"
        console.print(f"{name + '?':35} {word}", highlight=False, soft_wrap=True)
    for name, found in result["sha256"].items():
        console.print(f"sha256 {name:10} {', '.join(found)}", highlight=False, soft_wrap=True)
    bits = result["violations"].get("the bits of the twin")
    if bits is not None:
        style = "bold red" if bits else "bold green"
        console.print("NOT identical" if bits else "identical, bit for bit", style=style)
