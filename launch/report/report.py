"""The report page: what happened to a run and whether it changed the result.

One HTML file that needs nothing from outside: styles and pictures are inside. It is made from the
logs of a run's directory alone, so it can be made again, or later, or of a run that failed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.launch.report.timeline import PHASES, Fault, Outcome, RunRecord, tell

TEMPLATE = Path(__file__).with_name("report.html")
FAULTS_FILE = "faults.json"  # a list of faults, where they were injected on purpose
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the run ended in the bits of its twin; None where there is nothing to compare."""

    identical: bool | None
    run: str | None
    twin: str | None

    @property
    def title(self) -> str:
        if self.identical is None:
            return "No twin to compare with"
        return "Identical, bit for bit" if self.identical else "The results differ"


def judge(run: RunRecord, twin: RunRecord | None) -> Verdict:
    """Compare the final states of two runs by their sha256."""
    if twin is None or run.digest is None or twin.digest is None:
        return Verdict(None, run.digest, twin.digest if twin is not None else None)
    return Verdict(run.digest == twin.digest, run.digest, twin.digest)


def load_run(directory: Path, faults: Sequence[Fault] | None = None) -> RunRecord:
    """Read the logs of one run; `faults` default to those noted in the directory itself.

    Raises Misuse where the directory holds no events.
    """
    logs = sorted(directory.glob("events-*.jsonl"))
    if not logs:
        raise Misuse(f"{directory} holds no events-*.jsonl: give the --log-dir of a run")
    events = [event for log in logs for event in read_lines(log)]
    if faults is None:
        noted = _read_json(directory / FAULTS_FILE) or []
        faults = [Fault.from_json(record) for record in noted]
    told = [event["sha256"] for event in events if event["event"] == "digest"]
    digest = told[-1] if len(set(told)) == 1 else None
    metrics = read_lines(directory / METRICS_FILE)
    return tell(directory.name, events, metrics, faults, digest=digest)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log; the last line may be torn, its writer may have been killed."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: it was being written
                return
            raise Misuse(f"{path}, line {number}: not a line of a log: {error}") from error
        yield record


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_report(path: Path, run: RunRecord, twin: RunRecord | None = None) -> None:
    """Write the page about `run`, compared with its undisturbed `twin` where there is one.

    Raises Misuse where matplotlib or jinja2 are not installed.
    """
    try:
        import jinja2
        import markupsafe

        from outlast.launch.report import plots

        pictures = _pictures(plots, run, twin)
    except ModuleNotFoundError as error:
        raise Misuse(f"the report needs {error.name}: pip install outlast[report]") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        run=run,
        twin=twin,
        verdict=judge(run, twin),
        facts=facts(run),
        phases=PHASES,
        rows=[row(number, outcome) for number, outcome in enumerate(run.outcomes, 1)],
        pictures={name: markupsafe.Markup(svg) for name, svg in pictures.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _pictures(plots: Any, run: RunRecord, twin: RunRecord | None) -> dict[str, str]:
    """The figures for which there is something to show."""
    pictures = {}
    if run.losses:
        pictures["loss"] = plots.loss_curves(run, twin)
    if run.spans:
        pictures["membership"] = plots.membership(run)
    if any(outcome.change is not None for outcome in run.outcomes):
        pictures["phases"] = plots.recovery_phases(run)
    return pictures


def facts(run: RunRecord) -> dict[str, str]:
    """The numbers at the top of the page."""
    faults = [outcome for outcome in run.outcomes if outcome.fault is not None]
    waits = sorted(o.to_commit_ms for o in faults if o.to_commit_ms is not None)
    wait = f"{waits[len(waits) // 2]:.0f} ms" if waits else "none"
    return {
        "steps committed": str(len(run.losses)),
        "generations": str(len(run.changes)),
        "faults": str(len(faults)),
        "fault to next commit, median": wait,
        "steps redone": str(sum(r.redone for r in run.recoveries)),
    }


def row(number: int, outcome: Outcome) -> dict[str, Any]:
    """One line of the table of events."""
    recovery = outcome.recovery
    return {
        "number": number,
        "label": outcome.label,
        "is_fault": outcome.fault is not None,
        "lost": outcome.lost or ("nothing" if outcome.fault is None else "no effect"),
        "rung": outcome.rung or "none needed",
        "phases": {name: f"{ms:.0f}" for name, ms in outcome.phases.items()},
        "total": f"{sum(outcome.phases.values()):.0f}",
        "redone": recovery.redone if recovery is not None else "",
        "leaves": f"{recovery.leaves_kept} / {recovery.leaves_missing}" if recovery else "",
    }
