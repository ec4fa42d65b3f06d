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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import RECOVERY, STEP
from outlast.launch.drilled_job import RETURN_LIMIT_S, DrilledJob, DrillFailed, Shape
from outlast.launch.fault import DRAWN, KINDS, Salvo, draw, parse
from outlast.launch.namespaces import Namespaces, missing
from outlast.launch.report import (
    FAULTS_FILE,
    METRICS_FILE,
    load_run,
    read_lines,
    write_report,
)  # fmt: skip
from outlast.launch.strike import Striker, Struck
from outlast.launch.timeline import RunRecord
from outlast.launch.trap import Traps
from outlast.launch.verdict import announced, digests, promises, spelt, table, told, unplanned

EXIT_PASSED, EXIT_VIOLATED, EXIT_NOT_RUN = 0, 1, 3
ORPHAN_LIMIT_S = 5.0
QUORUM_NODES = 3  # a Poisson fault is put off while a loss would leave fewer than a majority of 3


@dataclass(frozen=True, kw_only=True)
class DrillConfig:
    """The flags of `outlast drill`; `salvos` or `rounds` or `mtbf_s` say what is done."""

    shape: Shape
    out: Path
    salvos: tuple[Salvo, ...] = ()
    rounds: int = 0
    mtbf_s: float = 0.0
    duration_s: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = ()
    namespaces: bool = False
    twin: bool = True
    pace_s: float = 0.0

    @property
    def points(self) -> frozenset[str]:
        """Failpoints to arm."""
        orders = [order for salvo in self.salvos for order in salvo]
        kinds = {*self.kinds, *(order.kind for order in orders)}
        used = {order.phase for order in orders} - {""}
        used |= {"reduce"} if self.pace_s or "hang" in kinds or not self.mtbf_s else set()
        used |= {"leaf"} if "poison" in kinds else set()
        if self.rounds:  # any of them may be drawn
            used |= {*STEP, *RECOVERY}
        return frozenset(used)


def config_of(options: dict[str, Any]) -> DrillConfig:
    """The config behind the flags; raises Misuse."""
    specs = list(options["faults"])
    if options["file"]:
        try:
            specs += tomllib.loads(Path(options["file"]).read_text(encoding="utf-8"))["faults"]
        except (OSError, KeyError, ValueError) as error:
            raise Misuse(f"--faults: {options['file']} has no list `faults`: {error}") from error
    kinds = tuple(filter(None, options["kinds"].split(","))) or DRAWN
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise Misuse(f"--kinds: {wrong[0]!r} is none of {', '.join(KINDS)}")
    if not Path(options["script"]).is_file():
        raise Misuse(f"script {options['script']!r} does not exist")
    if options["nodes"] < 3:
        raise Misuse("--nodes: at least 3, so that a quorum is left when one is lost")
    if options["mtbf"] and not options["duration"] > 0:
        raise Misuse("--mtbf needs --duration SECONDS")
    if not (specs or options["rounds"] or options["mtbf"]):
        raise Misuse("nothing to do: give --fault SPEC, --faults FILE, --rounds N or --mtbf S")
    shape = Shape(
        nodes=options["nodes"], workers=options["nproc_per_node"], spares=options["spares"],
        launch=tuple(shlex.split(options["launch_flags"])),
        script=(options["script"], *options["script_args"]),
    )  # fmt: skip
    return DrillConfig(
        shape=shape, out=Path(options["log_dir"]).absolute(), salvos=tuple(map(parse, specs)),
        rounds=options["rounds"], mtbf_s=options["mtbf"], duration_s=options["duration"],
        seed=options["seed"], kinds=kinds if not specs else (), namespaces=options["namespaces"],
        twin=options["twin"], pace_s=options["pace"],
    )  # fmt: skip


class Drill:
    """One job under faults; `struck` is what was done to it so far."""

    def __init__(self, config: DrillConfig, job: DrilledJob, say: Any) -> None:
        self.config, self.job, self.say = config, job, say
        self.generator = random.Random(config.seed)
        planned = bool(config.salvos)
        self.striker = Striker(job, None if planned else self.generator)
        self.struck: list[Struck] = []

    def run(self) -> None:
        """All faults, then the job to its end."""
        self.job.traps.pace_s = self.config.pace_s
        with self.job:
            self.say(f"{len(self.job.names)} nodes start; logs in {self.job.out}")
            if self.config.mtbf_s:
                self.poisson(self.config.duration_s)
            else:
                for salvo in self._salvos():
                    self.job.await_strength(salvo[0].step)
                    if self.config.rounds:  # at any moment of a step
                        time.sleep(self.generator.uniform(0, max(self.config.pace_s, 0.2)))
                    self._strike(salvo)
            self.job.over_is_news = False
            self.job.await_strength()
            if not self.job.ended():
                self.say(f"step {self.job.watch.step}: everything is back; to the end")
            self.job.traps.pace_s = 0.0
            self.job.await_end()

    def _salvos(self) -> Iterator[Salvo]:
        yield from self.config.salvos
        for _ in range(self.config.rounds):
            yield draw(self.generator, self.config.kinds)

    def poisson(self, duration_s: float) -> None:
        """Faults at random moments, `mtbf_s` apart in the mean; the clock starts at full
        strength."""
        job, generator = self.job, self.generator
        job.await_strength()
        began = due = time.monotonic()
        while True:
            due += generator.expovariate(1 / self.config.mtbf_s)
            last = due > began + duration_s
            self.wait_until(min(due, began + duration_s), 0 if last else QUORUM_NODES)
            if last:
                return
            self._strike(draw(generator, self.config.kinds)[:1])

    def wait_until(self, due: float, nodes: int = 0) -> None:
        """Until a moment of the monotonic clock, and so many nodes at work."""
        job = self.job

        def ready() -> bool | None:
            return True if time.monotonic() >= due and len(job.working) >= nodes else None

        limit_s = due - time.monotonic() + RETURN_LIMIT_S
        job.watch.until(ready, f"{nodes} nodes at work", limit_s)

    def _strike(self, salvo: Salvo) -> None:
        self.say(f"step {self.job.watch.step}: {' + '.join(order.kind for order in salvo)}")
        for struck in self.striker.strike(salvo):
            self.struck.append(struck)
            if struck.fault is not None:
                self.say(f"step {self.job.watch.step}: {struck.fault.label}; "
                         + ("took effect" if struck.sign else struck.why))  # fmt: skip
            else:
                self.say(struck.why)


def run_drill(config: DrillConfig, console: Console, as_json: Path | None) -> int:
    """The whole drill; the exit code."""
    if config.namespaces and missing():
        console.print(f"not run: network namespaces: {missing()}", style="yellow")
        return EXIT_NOT_RUN
    clear(config.out)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up

    def say(text: str) -> None:
        console.print(f"[dim]drill[/dim]  {text}", highlight=False)

    drill = None
    failure = ""
    with traps(config.points) as set_traps, ExitStack() as stack:
        network = stack.enter_context(namespaces(config)) if config.namespaces else None
        job = DrilledJob(config.out / "disturbed", config.shape, set_traps, network)
        drill = Drill(config, job, say)
        try:
            drill.run()
        except (DrillFailed, TimeoutError) as error:
            failure = str(error)
        orphans = left_behind(set_traps.path)
        if config.twin and not failure:
            say("the twin: the same command, left alone")
            try:
                run_twin(config, set_traps)
            except (DrillFailed, TimeoutError) as error:
                failure = f"the twin: {error}"
    return conclude(config, drill, (failure, orphans), console, as_json)


@contextmanager
def traps(points: frozenset[str]) -> Iterator[Traps]:
    """Traps with a socket in a directory of their own: its path must be short."""
    temporary = tempfile.TemporaryDirectory(prefix="outlast-drill-")
    with temporary as directory, Traps(Path(directory) / "socket", points) as found:
        yield found


def namespaces(config: DrillConfig) -> Namespaces:
    """One network namespace per node."""
    count = config.shape.nodes + config.shape.spares
    width = len(str(count - 1))
    return Namespaces([f"node{index:0{width}}" for index in range(count)])


def run_twin(config: DrillConfig, set_traps: Traps) -> None:
    """The same command, left alone: fewer processes, the same bits."""
    shape = replace(config.shape, nodes=1, workers=2, spares=0)
    DrilledJob(config.out / "twin", shape, set_traps).run_to_end()


def left_behind(socket: Path) -> list[str]:
    """Processes of the drilled job that are still there after a moment's grace."""
    deadline = time.monotonic() + ORPHAN_LIMIT_S
    while (found := list(_armed(socket))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _armed(socket: Path) -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            if str(socket) in process.environ().get("OUTLAST_DRILL", ""):
                yield f"pid {process.pid}: {' '.join(process.cmdline())[:80]}"
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue


def clear(out: Path) -> None:
    """Make room: what an earlier drill left in `out` is removed, and nothing else."""
    for name in ("disturbed", "twin", "nodes"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("verdict.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


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
    faults = [s.fault for s in drill.struck if s.fault is not None] + drill.striker.repairs
    noted = [dataclasses.asdict(fault) for fault in faults]
    (logs / FAULTS_FILE).write_text(json.dumps(noted), encoding="utf-8")
    run, events = load_run(logs, faults), events_of(logs)
    twin_events = None if twin is None else events_of(twin)
    metrics = list(read_lines(logs / METRICS_FILE))
    violations = promises(run, events, metrics, twin_events, orphans)
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


def conclude(
    config: DrillConfig, drill: Drill, ended: tuple[str, Sequence[str]], console: Console,
    as_json: Path | None,
) -> int:  # fmt: skip
    """Judge, print, write; the exit code."""
    failure, orphans = ended
    twin = config.out / "twin" if config.twin and not failure else None
    result, run = judge(drill, failure, orphans, twin)
    for path in filter(None, (config.out / "verdict.json", as_json)):
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result, config, console, (run, load_run(twin) if twin else None))
    return exit_code(result)


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 1 a promise was broken or a fault without effect, 3 something was not run."""
    not_run = [e for e in result["events"] if e["why"].startswith("not run")]
    failed = [e for e in result["events"] if not e["passed"] and e not in not_run]
    if failed or any(result["violations"].values()):
        return EXIT_VIOLATED
    return EXIT_NOT_RUN if not_run else EXIT_PASSED


def _print(
    result: dict[str, Any], config: DrillConfig, console: Console,
    runs: tuple[RunRecord, RunRecord | None],
) -> None:  # fmt: skip
    console.print(table(result["events"], console.width))
    for entry in result["events"]:
        if entry["why"]:
            console.print(f"{entry['order']}: {entry['why']}", style="yellow", highlight=False)
    for loss in result["unplanned"]:
        console.print(f"not planned, at {loss}", style="yellow", highlight=False)
    for name, wrong in result["violations"].items():
        word = f"[red]NO[/red]: {spelt(wrong)}" if wrong else "[green]yes[/green]"
        console.print(f"{name + '?':35} {word}", highlight=False, soft_wrap=True)
    for name, found in result["sha256"].items():
        console.print(f"sha256 {name:10} {', '.join(found)}", highlight=False, soft_wrap=True)
    bits = result["violations"].get("the bits of the twin")
    if bits is not None:
        style = "bold red" if bits else "bold green"
        console.print("NOT identical" if bits else "identical, bit for bit", style=style)
    try:
        write_report(config.out / "report.html", *runs)
        console.print(f"report: {config.out / 'report.html'}", highlight=False, soft_wrap=True)
    except Misuse as error:
        console.print(str(error), style="yellow")
