"""`outlast doctor`: is this node, or every node of an allocation, fit for a run?

In a batch script or salloc's shell it starts itself once on every node and reads what they write;
on a node it measures, meets its neighbours by files in a shared directory, and writes. Whoever
prints judges, see `diagnosis`.
"""

import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.launch.config import host_and_port
from outlast.launch.doctor.diagnosis import Finding, Record, Verdict, absent, diagnose, pair_seconds
from outlast.launch.doctor.examination import EXAMINATION_S, THREADS, examine
from outlast.launch.doctor.neighbours import NUMEL, PAIR_S, Ring
from outlast.launch.interface import ANYWHERE, Interface, choose, own_addresses
from outlast.launch.plan_stripes import byte_count
from outlast.launch.processor import worker_count
from outlast.launch.slurm.supervisor import STEP
from outlast.launch.surroundings import surroundings

MEETING_S = 60.0  # nodes of one step start within seconds, but import torch from one disk
RANKED_MAX = 8  # of as many nodes as there may be
RING_S = 3 * PAIR_S + 5
STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.BAD: "red"}


class Meeting:
    """The files of all nodes in a directory; each writes its own, for its user's eyes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, node: str, record: Record) -> None:
        """Replace what a node says."""
        fresh = self.directory / f".{node}-{secrets.token_hex(4)}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(record, file)
        fresh.replace(self.directory / f"{node}.json")

    def records(self) -> dict[str, Record]:
        """What every node has said so far."""
        return {p.stem: json.loads(p.read_text()) for p in self.directory.glob("[!.]*.json")}

    def wait(self, enough: Callable[[dict[str, Record]], bool], limit_s: float) -> None:
        """Until the records are enough, or so long."""
        deadline = time.monotonic() + limit_s
        while not enough(self.records()) and time.monotonic() < deadline:
            time.sleep(0.1)


def run_doctor(options: Mapping[str, Any], console: Console) -> int:
    """The command behind `options`, as `launch.cli` names them; 0 if all is well, 1 if not."""
    around, slurm = surroundings(), environment().slurm
    node = options["node_name"] or (around.node if around else socket.gethostname())
    nodes = tuple(name for name in options["nodes"].split(",") if name)
    nodes = nodes or (around.nodes if around else (node,))
    log_dir = Path(options["log_dir"] or (around.log_dir if around else "outlast_logs"))
    meet = options["meet"]
    if around and around.supervises and not meet:
        meeting = Meeting(log_dir / f"doctor-{secrets.token_hex(4)}")
        _on_every_node(nodes, meeting)
        return _report(nodes, meeting.records(), options["as_json"], console)
    if node not in nodes:
        raise Misuse(f"--nodes: {node}, this node, is not among them: give --node-name")
    needed = worker_count(options["nproc_per_node"]) * byte_count(options["bytes_per_worker"])
    if alone := len(nodes) == 1 and not meet:
        meet = tempfile.mkdtemp(prefix="outlast-doctor-")
    elif not meet and slurm is None:
        raise Misuse("several nodes need --meet DIRECTORY: a new one that all of them share")
    elif not meet and slurm is not None:
        meet = log_dir / f"doctor-{slurm.restarts}.{slurm.step_id}"
    endpoints = [host_and_port(text) for text in around.endpoints] if around else []
    ports = {port for _, port in endpoints}
    own = [(address, 9) for address in own_addresses()]
    others = [(name, 9) for name in nodes if name != node] or [ANYWHERE, *own, ("localhost", 9)]
    way: Interface | Misuse
    try:
        way = choose(endpoints or others, options["interface"])
    except Misuse as error:
        way = error
    meeting = Meeting(Path(meet))
    record: dict[str, Any] = {"measures": examine(way, sorted(ports), needed, log_dir)}
    _meet(meeting, record, node, nodes, way)
    records = meeting.records()
    if alone:
        shutil.rmtree(meet)
    quiet = node != min(records, key=nodes.index)
    return _report(nodes, records, options["as_json"], Console(quiet=True) if quiet else console)


def _meet(
    meeting: Meeting, record: dict[str, Any], node: str, nodes: Sequence[str],
    way: Interface | Misuse,
) -> None:  # fmt: skip
    """Measure with the neighbours that come; returns when everybody is done, or late."""
    record |= {"pairs": [], "done": False}
    ring = None
    if isinstance(way, Interface) and record["measures"]["torch"][0] is not None:
        ring = Ring(node, way.address)
        record |= {"host": way.address, "port": ring.port, "token": ring.token}
    meeting.write(node, record)
    meeting.wait(lambda found: len(found) == len(nodes), MEETING_S)
    met = {name: found for name, found in meeting.records().items() if "port" in found}
    if ring is not None:
        try:
            pairs = THREADS.submit(lambda: list(ring.measure(nodes, met)))
            record["pairs"] = pairs.result(RING_S)
        except TimeoutError:
            record |= absent("an all-reduce hangs beyond its limit")
    meeting.write(node, record | {"done": True})
    meeting.wait(lambda found: all(found[name]["done"] for name in met), RING_S)


def _on_every_node(nodes: Sequence[str], meeting: Meeting) -> None:
    """Start this very command in a step of its own on each node: one that does not start is no
    trouble of the others, who are told so."""
    command = [sys.executable, *sys.orig_argv[1:], "--meet", str(meeting.directory)]
    command += ["--nodes", ",".join(nodes)]
    steps = {
        node: subprocess.Popen(
            [*STEP, f"--nodelist={node}", *command, "--node-name", node], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for node in nodes
    }  # fmt: skip

    def done(records: Mapping[str, Record]) -> bool:
        for node, step in steps.items():
            if step.poll() is not None and node not in records:
                said = step.communicate()[1].strip().splitlines() or [f"code {step.returncode}"]
                reason = next((line for line in said if "error: " in line), said[-1])
                meeting.write(node, absent(reason.removeprefix("srun: ")) | {"done": True})
        return all(records.get(node, {}).get("done") for node in nodes)

    try:
        meeting.wait(done, EXAMINATION_S + MEETING_S + 2 * RING_S)
    finally:
        for step in steps.values():
            step.kill()  # its task has written all it had to say


def _report(
    nodes: Sequence[str], records: Mapping[str, Record], as_json: str, console: Console
) -> int:
    findings = diagnose(nodes, records)
    sick = sorted({f.node for f in findings if f.verdict == Verdict.BAD}, key=nodes.index)
    shown = [f for f in findings if len(nodes) == 1 or f.verdict != Verdict.OK]
    if shown:
        console.print(_table(shown))
    if len(nodes) > 1:
        console.print(_ranking(nodes, records), highlight=False, soft_wrap=True)
    verdict = f"sick: {', '.join(sick)}" if sick else f"healthy: {', '.join(nodes)}"
    console.print(verdict, style="red" if sick else "green", highlight=False)
    if as_json and not console.quiet:
        body = {"healthy": not sick, "sick": sick, "findings": [asdict(f) for f in findings]}
        try:
            Path(as_json).write_text(json.dumps(body, indent=1), "utf-8")
        except OSError as error:
            raise Misuse(f"--json: {error}") from error
    return int(bool(sick))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("node", "check", "found", "", "what to do", box=SIMPLE_HEAD)
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        if finding.text:
            alike.setdefault(replace(finding, node=""), []).append(finding.node)
    for f, nodes in alike.items():
        row = (", ".join(nodes), f.check, f.text, f.verdict, f.advice)
        table.add_row(*row, style=STYLES[f.verdict])
    return table


def _ranking(nodes: Sequence[str], records: Mapping[str, Record]) -> str:
    """Those that are slowest in the better one of their pairs, then in their product."""
    pairs = pair_seconds(records)
    gemm = {node: took for node, record in records.items()
            if (took := record["measures"].get("gemm", (None,))[0])}  # fmt: skip
    best = {node: min((s for ends, s in pairs.items() if node in ends), default=math.inf)
            for node in nodes}  # fmt: skip
    ranked = sorted(gemm, key=lambda node: (best[node], gemm[node]), reverse=True)
    return "slowest first: " + "; ".join(
        f"{node} {4 * NUMEL / best[node] / 1e6:,.0f} MB/s, gemm {1e3 * gemm[node]:.1f} ms"
        for node in ranked[:RANKED_MAX]
    )


def leave(code: int) -> None:
    """End now: threads that hang must not hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
