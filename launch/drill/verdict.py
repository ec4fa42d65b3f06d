"""What a drill says at its end: which faults took effect, and whether every promise was kept.

Pure but for the table's cells: events, metrics and outcomes in, words out. Each promise is a
function that returns what is wrong; an empty list is a promise kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from outlast.launch.drill.strike import Struck
from outlast.launch.report.timeline import PHASES, Fault, Outcome, RunRecord

Event = Mapping[str, Any]
WIDE = 140
REDONE_MAX = 1  # steps that one recovery on an exact rung may make again
SHOWN = 3  # violations of one promise that are spelt out


def same_bits(run: Sequence[Event], twin: Sequence[Event]) -> list[str]:
    """The final sha256 of parameters and optimizer state; every rank 0 that told one agrees."""
    ours, theirs = digests(run), digests(twin)
    if not ours or not theirs:
        return [f"no digest of {'the run' if not ours else 'its twin'}"]
    return [] if ours == theirs and len(ours) == 1 else [f"{sorted(ours)} against {sorted(theirs)}"]


def digests(events: Iterable[Event]) -> set[str]:
    """All final states that a run told of."""
    return {str(event["sha256"]) for event in events if event["event"] == "digest"}


def _results(events: Iterable[Event]) -> dict[int, set[tuple[float, float]]]:
    found: dict[int, set[tuple[float, float]]] = {}
    for event in events:
        if event["event"] == "committed":
            found.setdefault(event["step"], set()).add((event["loss"], event["norm"]))
    return found


def same_steps(run: Sequence[Event], twin: Sequence[Event]) -> list[str]:
    """Loss and gradient norm of every step, on every rank, also where a step was made again."""
    ours, theirs = _results(run), _results(twin)
    shared = sorted(ours.keys() & theirs.keys())
    found = [f"step {s}: {sorted(ours[s])} against {sorted(theirs[s])}"
             for s in shared if ours[s] != theirs[s]]  # fmt: skip
    return found if shared else ["no step in common with the twin"]


def agreed(run: Sequence[Event]) -> list[str]:
    """All ranks have the same loss and norm of a step, whenever they made it."""
    return [f"step {step}: {sorted(told)}" for step, told in _results(run).items() if len(told) > 1]


def once(metrics: Sequence[Event]) -> list[str]:
    """The log of the run has every step exactly once and in order, if the script logs at all."""
    steps = [int(line["step"]) for line in metrics]
    return [f"step {b} follows step {a}" for a, b in pairwise(steps) if b != a + 1]


def monotonic(run: Sequence[Event]) -> list[str]:
    """Within a generation each worker commits the next step, and nobody ever falls far back: not
    by more than a recovery may, and one for the agents that write at the same time."""
    best, last, found = 0, dict[tuple[int, int], int](), []
    for event in (event for event in run if event["event"] == "committed"):
        step, who = int(event["step"]), (event["holder"], event["generation"])
        if step != last.get(who, step - 1) + 1 or step < best - REDONE_MAX - 1:
            found.append(f"worker {who[0]} commits step {step} after {last.get(who, best)}")
        last[who], best = step, max(best, step)
    return found


def one_view(run: Sequence[Event]) -> list[str]:
    """All agents that installed a generation have the same members in it, and none goes back."""
    views: dict[int, Any] = {}
    last: dict[str, int] = {}
    found = []
    for event in run:
        if event["event"] != "view":
            continue
        generation, agent = event["generation"], event["agent"]
        if views.setdefault(generation, event["members"]) != event["members"]:
            found.append(f"generation {generation} differs on {event['node']}")
        if last.get(agent, 0) >= generation:
            found.append(f"{event['node']} installs generation {generation} after {last[agent]}")
        last[agent] = generation
    return found


def bounded(run: RunRecord) -> list[str]:
    """No recovery on an exact rung makes more than one step again."""
    return [f"generation {r.generation}: {r.redone} steps" for r in run.recoveries
            if r.redone > REDONE_MAX and "average" not in r.rungs]  # fmt: skip


def announced(run: Sequence[Event]) -> bool:
    """Whether a lossy rung was taken, and said so."""
    return any(event["event"] == "averaged" for event in run)


def promises(
    run: RunRecord, events: Sequence[Event], metrics: Sequence[Event],
    twin: Sequence[Event] | None,
) -> dict[str, list[str]]:  # fmt: skip
    """Every promise that could be looked at, with what is wrong."""
    lossy = announced(events)
    checked: dict[str, Callable[[], list[str]]] = {
        "each step once and in order": lambda: once(metrics),
        "commits only go forward": lambda: monotonic(events),
        "all ranks agree on every step": lambda: agreed(events),
        "all nodes agree on every view": lambda: one_view(events),
        "at most one step made again": lambda: bounded(run),
        "lossy only where announced": lambda: unannounced(run, events),
    }
    if twin is not None and not lossy:
        checked["every step as in the twin"] = lambda: same_steps(events, twin)
        checked["the bits of the twin"] = lambda: same_bits(events, twin)
    return {name: check() for name, check in checked.items()}


def unannounced(run: RunRecord, events: Sequence[Event]) -> list[str]:
    """A recovery by averaging tells of itself."""
    lossy = [r.generation for r in run.recoveries if "average" in r.rungs]
    return [] if announced(events) else [f"generation {generation}" for generation in lossy]


def told(struck: Struck, run: RunRecord) -> dict[str, Any]:
    """One fault as JSON: what it was, whether it took effect, how the job came back."""
    order = struck.order
    entry: dict[str, Any] = {"order": str(order), "kind": order.kind, "how": order.how}
    if struck.fault is None:
        return {**entry, "took_effect": False, "passed": False, "why": struck.why}
    outcome = outcome_of(struck, run)
    effective = struck.sign is not None and (outcome.took_effect or not outcome.took_somebody)
    why = struck.why or ("" if effective else "no view or no recovery answered it")
    recovery = outcome.recovery
    return {
        **entry, "fault": outcome.label, "node": struck.fault.node, "time": outcome.time,
        "step": run.step_at(outcome.time), "took_effect": effective, "passed": effective,
        "why": why, "lost": outcome.lost, "rung": outcome.rung,
        "phases_ms": {name: round(ms, 1) for name, ms in outcome.phases.items()},
        "to_commit_ms": outcome.to_commit_ms,
        "steps_redone": recovery.redone if recovery else None,
    }  # fmt: skip


def outcome_of(struck: Struck, run: RunRecord) -> Outcome:
    """What answered a fault that was struck."""
    return next(outcome for outcome in run.outcomes if outcome.fault == struck.fault)


def unplanned(run: RunRecord, faults: Sequence[Fault]) -> list[str]:
    """Losses that nobody injected: they are recovered from like any other, and worth a look."""
    return [
        f"step {run.step_at(outcome.time)}: {outcome.label}"
        for outcome in run.outcomes
        if outcome.fault is not None and outcome.fault not in faults
    ]


def table(told_faults: Sequence[Mapping[str, Any]], width: int) -> Table:
    """One row per fault: what was lost, where its state came from, how long each phase took.

    On a terminal of less than WIDE columns the phases are added up; the report has them all.
    """
    wide = width >= WIDE
    phases = [f"{phase} ms" for phase in PHASES] if wide else ["recovery ms"]
    names = ["step", "fault", "lost", "rung", *phases, "to commit ms", "redone", "verdict"]
    shown = Table(title="Faults and recoveries", title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(names):
        right = index == 0 or 3 < index < len(names) - 1
        shown.add_column(name.replace(" ", "\n"), justify="right" if right else "left")
    for entry in told_faults:
        shown.add_row(*_cells(entry, wide))
    return shown


def _cells(entry: Mapping[str, Any], wide: bool) -> list[str]:
    if "fault" not in entry:
        blank = [""] * ((len(PHASES) if wide else 1) + 4)
        word = "not run" if entry["why"].startswith("not run") else "failed"
        return ["", entry["order"], *blank, f"[yellow]{word}[/yellow]"]
    commit, redone = entry["to_commit_ms"], entry["steps_redone"]
    phases = list(entry["phases_ms"].values())
    return [
        str(entry["step"]), entry["fault"], entry["lost"], entry["rung"],
        *(f"{ms:.0f}" for ms in (phases if wide else [sum(phases)])),
        f"{commit:.0f}" if commit is not None else "",
        str(redone) if redone is not None else "",
        "[green]passed[/green]" if entry["passed"] else "[red]no effect[/red]",
    ]  # fmt: skip


def spelt(violations: Sequence[str]) -> str:
    """The first few violations of a promise."""
    more = f" and {len(violations) - SHOWN} more" if len(violations) > SHOWN else ""
    return "; ".join(violations[:SHOWN]) + more
