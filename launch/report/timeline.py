"""What happened to a run, told from its event log.

Every agent and every worker writes its own events; here they become one story: faults, the views
that followed from them, and the recovery that answered each. Pure: lists of plain dictionaries in,
values out, so the report page, the demo and the tests share one reading of the log.

A phase of a recovery lasts as long as on the slowest rank, for that is what the job waited for.
`detect` runs from the fault (as its injector timed it) to the first agent that knew, `agree` from
there to the last agent that installed the view; the others are measured by the ranks. A fault in
the middle of a recovery ends that recovery, and both are answered by the next one that completes.
Times are of the wall clock, in seconds; those of several machines are as good as their clocks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]

PHASES = ("detect", "agree", "interrupt", "reconnect", "finish", "plan", "move", "resume")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was lost: the killed `agents` (incarnations) or `holders` (workers)."""

    time: float
    kind: str
    label: str
    node: str
    agents: tuple[str, ...] = ()
    holders: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, record: Event) -> "Fault":
        """The fault that `dataclasses.asdict` wrote."""
        lists = {"agents": tuple(record["agents"]), "holders": tuple(record["holders"])}
        return cls(**{**record, **lists})


@dataclass(frozen=True, slots=True)
class Presence:
    """One member of a view."""

    node: str
    agent: str
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A view and how it differs from the one before; workers of a lost member are not repeated."""

    generation: int
    detected: float
    agreed: float
    members: tuple[Presence, ...]
    lost_members: tuple[Presence, ...] = ()
    lost_workers: tuple[tuple[str, int], ...] = ()  # (node, holder)
    joined_members: tuple[Presence, ...] = ()
    joined_workers: tuple[tuple[str, int], ...] = ()

    @property
    def is_loss(self) -> bool:
        return bool(self.lost_members or self.lost_workers)

    def answers(self, fault: Fault) -> bool:
        """Whether this view is the first without what the fault took."""
        gone = {holder for member in self.lost_members for holder in member.holders}
        gone |= {holder for _, holder in self.lost_workers}
        lost_agents = {member.agent for member in self.lost_members}
        return bool(lost_agents & set(fault.agents) or gone & set(fault.holders))

    @property
    def workers(self) -> int:
        """How many ranks the view has."""
        return sum(len(member.holders) for member in self.members)

    @property
    def lost(self) -> str:
        """What went, in words: `node2 (2 workers), 1 worker of node0`."""
        return _words(self.lost_members, self.lost_workers)

    @property
    def joined(self) -> str:
        """What came, in words."""
        return _words(self.joined_members, self.joined_workers)


@dataclass(frozen=True, slots=True)
class Recovery:
    """How the ranks of one generation took up the work: `phases` in ms, `rungs` in bytes.

    ranks: how many have told so; fewer than the view has workers where another fault came between.
    ended, resumed: when the last of them had, and when the next step was committed.
    """

    generation: int
    ranks: int
    step: int
    redone: int
    phases: Mapping[str, float]
    rungs: Mapping[str, int]
    leaves_kept: int
    leaves_missing: int
    ended: float
    resumed: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A fault, or a join where `fault` is None, with the view and the recovery that answered it."""

    fault: Fault | None
    change: Change | None
    recovery: Recovery | None

    @property
    def took_effect(self) -> bool:
        return self.change is not None and self.recovery is not None

    @property
    def took_somebody(self) -> bool:
        """Whether the fault is one that takes an agent or a worker out of the view."""
        return self.fault is not None and bool(self.fault.agents or self.fault.holders)

    @property
    def label(self) -> str:
        if self.fault is not None:
            return self.fault.label
        return f"{self.change.joined} joined" if self.change is not None else ""

    @property
    def time(self) -> float:
        if self.fault is not None:
            return self.fault.time
        return self.change.detected if self.change is not None else 0.0

    @property
    def lost(self) -> str:
        return self.change.lost if self.change is not None else ""

    @property
    def rung(self) -> str:
        """Where the lost state came from, the biggest part first: `memory, replica`."""
        rungs = self.recovery.rungs if self.recovery is not None else {}
        return ", ".join(sorted((n for n, size in rungs.items() if size), key=lambda n: -rungs[n]))

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds of every phase, in order; a phase that nobody timed counts 0."""
        timed = dict(self.recovery.phases) if self.recovery is not None else {}
        if self.change is not None:
            timed["detect"] = max(0.0, self.change.detected - self.time) * 1e3
            timed["agree"] = max(0.0, self.change.agreed - self.change.detected) * 1e3
        return {phase: timed.get(phase, 0.0) for phase in PHASES}

    @property
    def to_commit_ms(self) -> float | None:
        """From the fault to the first step that was committed after the recovery."""
        if self.recovery is None or self.recovery.resumed is None:
            return None
        return (self.recovery.resumed - self.time) * 1e3


@dataclass(frozen=True, slots=True)
class Span:
    """A node was a member with an unchanged number of workers."""

    node: str
    agent: str
    start: float
    stop: float
    workers: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that the logs of one run say. `losses` maps each step to its loss."""

    name: str
    changes: tuple[Change, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    spans: tuple[Span, ...] = ()
    losses: Mapping[int, float] = field(default_factory=dict)
    commits: tuple[tuple[float, int], ...] = ()  # (time, step), ascending
    digest: str | None = None

    def step_at(self, time: float) -> int:
        """The step that was being computed at this time: the first one committed later."""
        return next((s for t, s in self.commits if t > time), max(self.losses, default=-1) + 1)


def tell(
    name: str,
    events: Iterable[Event],
    metrics: Iterable[Event] = (),
    faults: Iterable[Fault] = (),
    digest: str | None = None,
) -> RunRecord:
    """The story of one run; losses that no given fault explains become faults of their own."""
    ordered = sorted(events, key=lambda event: float(event["time"]))
    lines = sorted(metrics, key=lambda line: int(line["step"]))
    commits = tuple((float(line["time"]), int(line["step"])) for line in lines)
    changes = find_changes(ordered)
    recoveries = find_recoveries(ordered, commits)
    return RunRecord(
        name=name,
        changes=changes,
        recoveries=recoveries,
        outcomes=find_outcomes(tuple(faults), changes, recoveries, _first_signs(ordered)),
        spans=find_spans(changes, ordered),
        losses={int(line["step"]): float(line["loss"]) for line in lines if "loss" in line},
        commits=commits,
        digest=digest,
    )


def find_changes(events: Sequence[Event]) -> tuple[Change, ...]:
    """Every view, by generation, compared with the one before."""
    views: dict[int, list[Event]] = {}
    finished: set[str] = set()  # an agent that did all its work is no loss
    for event in events:
        if event["event"] == "finished":
            finished.add(str(event["agent"]))
        elif event["event"] == "view":
            views.setdefault(int(event["generation"]), []).append(event)
    changes: list[Change] = []
    before: dict[str, Presence] = {}
    for generation in sorted(views):
        told = views[generation]
        after = {
            str(m["agent"]): Presence(m["node"], m["agent"], tuple(m["workers"]))
            for m in told[0]["members"]
        }
        changes.append(
            Change(
                generation=generation,
                detected=min(float(view["detected"]) for view in told),
                agreed=max(float(view["agreed"]) for view in told),
                members=tuple(after.values()),
                lost_members=_only_in(before, after.keys() | finished),
                lost_workers=_workers_only_in(before, after),
                joined_members=_only_in(after, before) if changes else (),
                joined_workers=_workers_only_in(after, before) if changes else (),
            )
        )
        before = after
    return tuple(changes)


def find_recoveries(
    events: Sequence[Event], commits: Sequence[tuple[float, int]] = ()
) -> tuple[Recovery, ...]:
    """One recovery per generation that any rank completed, the slowest rank counting."""
    by_generation: dict[int, list[Event]] = {}
    for event in events:
        if event["event"] == "recovered":
            by_generation.setdefault(int(event["generation"]), []).append(event)
    ends = {g: max(float(e["time"]) for e in told) for g, told in by_generation.items()}
    return tuple(
        Recovery(
            generation=generation,
            ranks=len({event.get("rank") for event in told}),
            step=max(int(event["step"]) for event in told),
            redone=max(int(event["redone"]) for event in told),
            phases=_slowest(event["phases"] for event in told),
            rungs=_summed(event["rungs"] for event in told),
            leaves_kept=sum(int(event.get("leaves_kept", 0)) for event in told),
            leaves_missing=max(int(event.get("leaves_missing", 0)) for event in told),
            ended=ends[generation],
            resumed=next((time for time, _ in commits if time > ends[generation]), None),
        )
        for generation, told in sorted(by_generation.items())
    )


def find_outcomes(
    faults: Sequence[Fault],
    changes: Sequence[Change],
    recoveries: Sequence[Recovery],
    signs: Mapping[str | int, float],
) -> tuple[Outcome, ...]:
    """Each fault and each join with what answered it, in order of time.

    `signs` is when the log first speaks of a lost agent or holder: the time of a fault that nobody
    announced.
    """
    answered: set[int] = set()
    found: list[Outcome] = []
    for fault in faults:
        change = next((c for c in changes if c.answers(fault)), None)
        if change is not None:
            answered.add(change.generation)
        found.append(Outcome(fault, change, _recovery_of(change, recoveries)))
    for change in changes:
        if change.generation in answered:
            continue
        if change.is_loss:
            loss = _unannounced(change, signs)
            found.append(Outcome(loss, change, _recovery_of(change, recoveries)))
        elif change.joined_members or change.joined_workers:
            found.append(Outcome(None, change, _recovery_of(change, recoveries)))
    return tuple(sorted(found, key=lambda outcome: outcome.time))


def find_spans(changes: Sequence[Change], events: Sequence[Event]) -> tuple[Span, ...]:
    """The lives of the nodes, cut where the number of workers changed."""
    end = max((float(event["time"]) for event in events), default=0.0)
    spans: list[Span] = []
    current: dict[str, Span] = {}
    for change in changes:
        present = {member.agent: member for member in change.members}
        for agent, span in list(current.items()):
            member = present.get(agent)
            if member is None or len(member.holders) != span.workers:
                left = change.detected if member is None else change.agreed
                spans.append(_until(current.pop(agent), left))
        for agent, member in present.items():
            new = Span(member.node, agent, change.agreed, change.agreed, len(member.holders))
            current.setdefault(agent, new)
    spans += [_until(span, end) for span in current.values()]
    return tuple(sorted(spans, key=lambda span: (span.start, span.node)))


def _until(span: Span, stop: float) -> Span:
    return Span(span.node, span.agent, span.start, max(stop, span.start), span.workers)


def _recovery_of(change: Change | None, recoveries: Sequence[Recovery]) -> Recovery | None:
    if change is None:
        return None
    return next((r for r in recoveries if r.generation >= change.generation), None)


def _unannounced(change: Change, signs: Mapping[str | int, float]) -> Fault:
    agents = tuple(member.agent for member in change.lost_members)
    holders = tuple(holder for _, holder in change.lost_workers)
    keys: tuple[str | int, ...] = (*agents, *holders)
    seen = [signs[key] for key in keys if key in signs]
    nodes = [m.node for m in change.lost_members] + [node for node, _ in change.lost_workers]
    time = min([*seen, change.detected])
    kind = "node" if agents else "worker"
    return Fault(time, kind, f"{change.lost} lost", nodes[0], agents, holders)


def _first_signs(events: Sequence[Event]) -> dict[str | int, float]:
    """When an agent (by its id) or a worker (by its holder) was first spoken of as lost."""
    signs: dict[str | int, float] = {}
    for event in events:
        if event["event"] == "worker_lost" and "holder" in event:
            signs.setdefault(int(event["holder"]), float(event["time"]))
        elif event["event"] == "peer_lost" and "peer" in event:
            signs.setdefault(str(event["peer"]), float(event["time"]))
    return signs


def _only_in(
    these: Mapping[str, Presence], those: Collection[str]
) -> tuple[Presence, ...]:
    return tuple(member for agent, member in these.items() if agent not in those)


def _workers_only_in(
    these: Mapping[str, Presence], those: Mapping[str, Presence]
) -> tuple[tuple[str, int], ...]:
    return tuple(
        (member.node, holder)
        for agent, member in these.items()
        if agent in those
        for holder in member.holders
        if holder not in those[agent].holders
    )


def _words(members: Sequence[Presence], workers: Sequence[tuple[str, int]]) -> str:
    counts: dict[str, int] = {}
    for node, _ in workers:
        counts[node] = counts.get(node, 0) + 1
    parts = [f"{m.node} ({_counted(len(m.holders))})" for m in members]
    parts += [f"{_counted(count)} of {node}" for node, count in counts.items()]
    return ", ".join(parts)


def _counted(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"


def _slowest(phases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    slowest: dict[str, float] = {}
    for timed in phases:
        for name, duration in timed.items():
            slowest[name] = max(float(duration), slowest.get(name, 0.0))
    return slowest


def _summed(rungs: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for used in rungs:
        for name, size in used.items():
            total[name] = total.get(name, 0) + int(size)
    return total
