"""`outlast doctor`: is this node, or every node of an allocation, fit for a run?

In a batch script or salloc's shell it starts itself once on every node and reads what they write;
on a node it measures, meets its neighbours, and writes. Whoever prints judges, see `diagnosis`.
"""

import json
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.launch.config import host_and_port
from outlast.launch.diagnosis import ANSWER, Finding, Record, Verdict, diagnose, pair_seconds
from outlast.launch.examination import EXAMINATION_S, Patient, examine, numerics, within
from outlast.launch.interface import ANYWHERE, Interface, choose, own_addresses
from outlast.launch.neighbours import MEETING_S, NUMEL, PAIR_S, Meeting, Ring
from outlast.launch.plan_stripes import byte_count
from outlast.launch.processor import worker_count
from outlast.launch.surroundings import Surroundings, surroundings

NODE_S = EXAMINATION_S + MEETING_S + 4 * PAIR_S  # the longest that a node takes
STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.BAD: "red"}


def run_doctor(options: Mapping[str, Any], console: Console) -> int:
    """The command behind `options`, as `launch.cli` names them; 0 if all is well, 1 if not."""
    around = surroundings()
    nodes = tuple(name for name in options["nodes"].split(",") if name)
    nodes = nodes or (around.nodes if around else (options["node_name"] or socket.gethostname(),))
    log_dir = Path(options["log_dir"] or (around.log_dir if around else "outlast_logs"))
    if around and around.supervises and not options["meet"]:
        directory = log_dir / f"doctor-{secrets.token_hex(4)}"
        records = _on_every_node(nodes, directory)
        return _report(nodes, records, options["as_json"], console)
    node = options["node_name"] or (around.node if around else socket.gethostname())
    if node not in nodes:
        raise Misuse(f"--nodes: {node}, this node, is not among them: give --node-name")
    patient = Patient(
        node=node,
        nodes=nodes,
        endpoints=around.endpoints if around else (),
        workers=worker_count(options["nproc_per_node"]),
        worker_bytes=byte_count(options["bytes_per_worker"]),
        log_dir=log_dir,
    )
    records = _on_this_node(patient, _meeting(options["meet"], nodes, around), options["interface"])
    quiet = node != min(records, key=nodes.index)
    return _report(nodes, records, options["as_json"], Console(quiet=True) if quiet else console)


def _meeting(given: str, nodes: Sequence[str], around: Surroundings | None) -> Path:
    """The directory where the nodes find each other."""
    step = environment().slurm
    if given or len(nodes) == 1:
        return Path(given or tempfile.mkdtemp(prefix="outlast-doctor-"))
    if around is None or step is None:
        raise Misuse("several nodes need --meet DIRECTORY: a new one that all of them share")
    return Path(around.log_dir, f"doctor-{step.restarts}.{step.step_id}")


def _on_this_node(patient: Patient, directory: Path, wanted: str) -> dict[str, Record]:
    """Measure, meet, measure with the neighbours; all records when everybody is done."""
    way: Interface | Misuse
    try:
        way = choose(_targets(patient), wanted)
    except Misuse as error:
        way = error
    directory.mkdir(parents=True, exist_ok=True)
    meeting = Meeting(directory, patient.node)
    record: dict[str, Any] = {"measures": examine(patient, way), "pairs": [], "done": False}
    healthy = not record["measures"]["torch"][1].startswith("failed")
    record["numerics"] = numerics() if healthy else ""
    if isinstance(way, Interface) and healthy:
        ring = Ring(patient.node, way)
        record |= {"host": way.address, "port": ring.port, "token": ring.token}
    meeting.write(record)
    meeting.wait(lambda found: len(found) == len(patient.nodes), MEETING_S)
    met = {node: found for node, found in meeting.records().items() if "port" in found}
    if "port" in record:
        pairs = ring.measure(patient.nodes, met)
        try:
            within(3 * PAIR_S + 5, lambda: record["pairs"].extend(pairs))
        except TimeoutError:
            record["measures"]["interface"] = None, "failed: an all-reduce hangs beyond its limit"
    meeting.write(record | {"done": True})
    meeting.wait(lambda found: all(found[node]["done"] for node in met), 3 * PAIR_S)
    return dict(meeting.records())


def _targets(patient: Patient) -> list[tuple[str, int]]:
    """Endpoints to which the way is sought; for a node alone the default route."""
    others = [name for name in patient.nodes if name != patient.node]
    if patient.endpoints:
        return [host_and_port(text) for text in patient.endpoints]
    own = [(address, 9) for address in own_addresses()]
    return [(name, 9) for name in others] or [ANYWHERE, *own, ("localhost", 9)]


def _on_every_node(nodes: Sequence[str], directory: Path) -> dict[str, Record]:
    """Start this very command in a step of its own on each node: one that does not start is no
    trouble of the others, who are told so."""
    directory.mkdir(parents=True)
    flags = ["--nodes=1", "--ntasks=1", "--overlap", "--no-kill", "--unbuffered"]
    command = [*sys.orig_argv, "--meet", str(directory), "--nodes", ",".join(nodes)]
    steps = {
        node: subprocess.Popen(
            ["srun", f"--nodelist={node}", *flags, *command, "--node-name", node], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for node in nodes
    }  # fmt: skip
    deadline, meeting = time.monotonic() + NODE_S, Meeting(directory, "")
    try:
        while time.monotonic() < deadline and not all(
            meeting.records().get(node, {}).get("done") for node in nodes
        ):
            for node, step in steps.items():
                if step.poll() is not None and node not in meeting.records():
                    said = step.communicate()[1].strip().splitlines() or [f"code {step.returncode}"]
                    Meeting(directory, node).write(_absent(said[-1]))
            time.sleep(0.2)
    finally:
        for step in steps.values():
            step.kill()  # its task has written all it had to say
    return dict(meeting.records())


def _absent(reason: str) -> Record:
    return {"measures": {ANSWER: (None, f"failed: {reason}")}, "pairs": [], "done": True,
            "numerics": ""}  # fmt: skip


def _report(
    nodes: Sequence[str], records: Mapping[str, Record], as_json: str, console: Console
) -> int:
    findings = diagnose(nodes, records)
    sick = [node for node in nodes
            if any(f.node == node and f.verdict == Verdict.BAD for f in findings)]  # fmt: skip
    if len(nodes) > 1:
        console.print(_ranking(nodes, records, sick))
    shown = [f for f in findings if len(nodes) == 1 or f.verdict != Verdict.OK]
    if shown:
        console.print(_table(shown))
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
        table.add_row(", ".join(nodes), f.check, f.text, f.verdict, f.advice,
                      style=STYLES[f.verdict])  # fmt: skip
    return table


def _ranking(nodes: Sequence[str], records: Mapping[str, Record], sick: Sequence[str]) -> Table:
    """All nodes, the slowest first, each with the better one of its pairs."""
    table = Table("node", "gemm ms", "all-reduce MB/s", "", box=SIMPLE_HEAD)
    pairs = pair_seconds(records)

    def speeds(node: str) -> tuple[float, float]:
        seconds = records.get(node, {}).get("measures", {}).get("gemm", (None, ""))[0]
        best = min((took for ends, took in pairs.items() if node in ends), default=math.inf)
        return best, seconds or 0.0

    for node in sorted(nodes, key=speeds, reverse=True):
        pair, gemm = speeds(node)
        rate = f"{4 * NUMEL / pair / 1e6:,.0f}" if pair < math.inf else "-"
        table.add_row(node, f"{1e3 * gemm:.1f}" if gemm else "-", rate,
                      "bad" if node in sick else "ok")  # fmt: skip
    return table


def leave(code: int) -> None:
    """End now: threads that hang must not hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
