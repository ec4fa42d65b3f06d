"""What the demo says at its end: the table of events and whether the result is the same."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from outlast.launch.timeline import PHASES, Fault, Outcome, RunRecord

WIDE = 140


def took_effect(outcome: Outcome, earlier: Sequence[Outcome]) -> bool:
    """Whether a fault changed the view and was recovered from.

    One that was to strike within a recovery must also have come before that recovery was over.
    """
    if not outcome.took_effect or outcome.fault is None:
        return False
    if outcome.fault.kind != "cascade":
        return True
    before = [o for o in earlier if o.time < outcome.time]
    return bool(before) and not _is_over(before[-1], outcome.time)


def _is_over(outcome: Outcome, time: float) -> bool:
    """Whether every rank of the view that answered the fault had recovered at this time."""
    change, recovery = outcome.change, outcome.recovery
    if change is None:
        return True
    if recovery is None or recovery.generation > change.generation:
        return False
    return recovery.ranks == change.workers and recovery.ended <= time


def planned_outcomes(run: RunRecord, faults: Sequence[Fault]) -> list[Outcome]:
    """The outcomes of the faults that were injected, in order of time."""
    return [outcome for outcome in run.outcomes if outcome.fault in faults]


def verdict(run: RunRecord, twin: RunRecord, faults: Sequence[Fault]) -> dict[str, Any]:
    """The result as JSON: `identical` is about the bits of the final state of both runs."""
    outcomes = planned_outcomes(run, faults)
    return {
        "identical": run.digest is not None and run.digest == twin.digest,
        "losses_identical": bool(run.losses) and run.losses == twin.losses,
        "sha256": {"disturbed": run.digest, "twin": twin.digest},
        "events": [
            {
                "fault": outcome.label,
                "kind": outcome.fault.kind if outcome.fault else "join",
                "time": outcome.time,
                "step": run.step_at(outcome.time),
                "took_effect": took_effect(outcome, outcomes),
                "lost": outcome.lost,
                "rung": outcome.rung,
                "phases_ms": {name: round(ms, 1) for name, ms in outcome.phases.items()},
                "to_commit_ms": outcome.to_commit_ms,
                "steps_redone": outcome.recovery.redone if outcome.recovery else None,
            }
            for outcome in outcomes
        ],
        "unplanned": unplanned(run, faults),
    }


def passed(result: dict[str, Any], planned: int) -> bool:
    """Whether the bits agree and every one of the planned faults took effect."""
    effective = [event for event in result["events"] if event["took_effect"]]
    same = result["identical"] and result["losses_identical"]
    return bool(same) and len(effective) == planned


def table(run: RunRecord, faults: Sequence[Fault], width: int) -> Table:
    """One row per fault: what was lost, where its state came from, how long each phase took.

    On a terminal of less than WIDE columns the same table is shown on its side.
    """
    names = ["step", "event", "lost", "rung", *(f"{phase} ms" for phase in PHASES)]
    names += ["to commit ms", "steps redone"]
    outcomes = planned_outcomes(run, faults)
    rows = [_cells(run, outcome, took_effect(outcome, outcomes)) for outcome in outcomes]
    shown = Table(title="Faults and recoveries", title_justify="left", box=SIMPLE_HEAD)
    if width >= WIDE:
        for index, name in enumerate(names):
            right = index == 0 or index > 3
            shown.add_column(name.replace(" ", "\n"), justify="right" if right else "left")
        for row in rows:
            shown.add_row(*row)
    else:
        shown.add_column("")
        for row in rows:
            shown.add_column(f"step {row[0]}")
        for index, name in enumerate(names[1:], 1):
            shown.add_row(name, *(row[index] for row in rows))
    return shown


def _cells(run: RunRecord, outcome: Outcome, effective: bool) -> list[str]:
    commit, recovery = outcome.to_commit_ms, outcome.recovery
    return [
        str(run.step_at(outcome.time)),
        outcome.label,
        outcome.lost if effective else "[red]no effect[/red]",
        outcome.rung,
        *(f"{ms:.0f}" for ms in outcome.phases.values()),
        f"{commit:.0f}" if commit is not None else "",
        str(recovery.redone) if recovery is not None else "",
    ]


def unplanned(run: RunRecord, faults: Sequence[Fault]) -> list[str]:
    """Losses that nobody injected: they are recovered from like any other, and worth a look."""
    return [
        f"step {run.step_at(outcome.time)}: {outcome.label}"
        for outcome in run.outcomes
        if outcome.fault is not None and outcome.fault not in faults
    ]
