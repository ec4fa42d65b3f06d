"""One handmade run: a worker dies, then a node, and the proposer in the middle of that recovery."""

import dataclasses
from typing import Any

import pytest

from outlast.launch.timeline import PHASES, Fault, RunRecord, tell

A, B, C = ("node0", "aaaa"), ("node1", "bbbb"), ("node2", "cccc")
HOLDERS = {"aaaa": [1, 2], "bbbb": [3, 4], "cccc": [5, 6], "dddd": [7, 8]}


def event(time: float, author: tuple[str, str], name: str, **rest: Any) -> dict[str, Any]:
    return {"time": time, "node": author[0], "agent": author[1], "event": name, **rest}


def view(
    author: tuple[str, str], generation: int, members: dict[tuple[str, str], list[int]],
    detected: float, agreed: float,
) -> dict[str, Any]:  # fmt: skip
    told = [{"node": n, "agent": a, "workers": holders} for (n, a), holders in members.items()]
    times = {"detected": detected, "agreed": agreed}
    return event(agreed, author, "view", generation=generation, members=told, **times)


def recovered(author: tuple[str, str], time: float, generation: int, **rest: Any) -> dict[str, Any]:
    return event(time, author, "recovered", **{"generation": generation, "step": 5, "redone": 0,
                 "rank": 0, "phases": {}, "lost": [], "rungs": {}, **rest})  # fmt: skip


EVERYBODY = {A: [1, 2], B: [3, 4], C: [5, 6]}
EVENTS = [
    view(A, 1, EVERYBODY, 0.0, 0.1),
    view(B, 1, EVERYBODY, 0.0, 0.2),
    # A worker of node1 dies at 10.0; node0 knows at 10.01, node1 at 10.005.
    event(10.005, B, "worker_lost", holder=4, local_rank=1, pid=9, cause="signal 9"),
    view(A, 2, {A: [1, 2], B: [3], C: [5, 6]}, 10.010, 10.030),
    view(B, 2, {A: [1, 2], B: [3], C: [5, 6]}, 10.005, 10.025),
    recovered(A, 10.2, 2, phases={"interrupt": 5.0, "move": 90.0}, rungs={"memory": 100},
              leaves_kept=3, leaves_missing=2),
    recovered(C, 10.3, 2, phases={"interrupt": 8.0, "move": 70.0, "plan": 1.0}, redone=1,
              rungs={"memory": 60, "replica": 500}, leaves_kept=2, leaves_missing=2),
    event(10.5, A, "resumed", generation=2, step=5),
    # The worker comes back.
    view(A, 3, EVERYBODY | {B: [3, 9]}, 14.0, 14.1),
    recovered(A, 14.2, 3),
    # node2 dies, and the proposer while the others recover from that.
    view(B, 4, {A: [1, 2], B: [3, 9]}, 20.5, 20.6),
    view(B, 5, {B: [3, 9]}, 21.0, 21.1),
    recovered(B, 21.4, 5, redone=2, phases={"move": 20.0}, rungs={"parity": 7}),
    event(22.0, B, "resumed", generation=5, step=9),
    # node2 comes back as a new agent.
    view(B, 6, {B: [3, 9], ("node2", "dddd"): [7, 8]}, 30.0, 30.5),
    event(40.0, B, "finished"),
    view(("node2", "dddd"), 7, {("node2", "dddd"): [7, 8]}, 40.1, 40.2),
    event(41.0, ("node2", "dddd"), "finished"),
]  # fmt: skip
METRICS = [{"step": step, "time": 4.0 * step, "loss": 5.0 - step / 10} for step in range(11)]
FAULTS = [
    Fault(9.995, "worker", "kill -9 of a worker", "node1", holders=(4,)),
    Fault(20.0, "node", "kill -9 of a node", "node2", agents=("cccc",)),
    Fault(20.8, "cascade", "kill -9 during recovery", "node0", agents=("aaaa",)),
]


@pytest.fixture
def record() -> RunRecord:
    return tell("handmade", EVENTS, METRICS, FAULTS, digest="ab" * 32)


def test_every_view_is_compared_with_the_one_before(record: RunRecord) -> None:
    founding, worker, back, node, proposer, joined, done = record.changes
    assert (founding.detected, founding.agreed) == (0.0, 0.2)
    assert not founding.is_loss
    assert not founding.joined
    assert (worker.detected, worker.agreed, worker.lost) == (10.005, 10.030, "1 worker of node1")
    assert (back.lost, back.joined) == ("", "1 worker of node1")
    assert node.lost == "node2 (2 workers)"
    assert proposer.lost == "node0 (2 workers)"
    assert joined.joined == "node2 (2 workers)"
    assert not done.is_loss, "who finished is not lost"


def test_ranks_are_merged_by_the_slowest(record: RunRecord) -> None:
    first = record.recoveries[0]
    assert first.phases == {"interrupt": 8.0, "move": 90.0, "plan": 1.0}
    assert first.rungs == {"memory": 160, "replica": 500}
    assert (first.redone, first.leaves_kept, first.leaves_missing) == (1, 5, 2)
    assert (first.ended, first.resumed) == (10.3, 10.5)


def test_a_fault_is_timed_from_its_injection(record: RunRecord) -> None:
    kill = record.outcomes[0]
    assert kill.took_effect
    assert tuple(kill.phases) == PHASES
    assert kill.phases["detect"] == pytest.approx(10.0)
    assert kill.phases["agree"] == pytest.approx(25.0)
    assert kill.phases["move"] == 90.0
    assert kill.phases["reconnect"] == 0.0
    assert kill.rung == "replica, memory"
    assert kill.to_commit_ms == pytest.approx(505.0)


def test_a_fault_within_a_recovery_shares_the_one_that_completes(record: RunRecord) -> None:
    node, cascade = record.outcomes[2:4]
    assert [node.label, cascade.label] == ["kill -9 of a node", "kill -9 during recovery"]
    assert node.recovery is cascade.recovery is record.recoveries[2]
    assert node.phases["detect"] == pytest.approx(500.0)
    assert cascade.phases["detect"] == pytest.approx(200.0)
    assert node.rung == "parity"


def test_joins_are_told_and_the_end_is_not(record: RunRecord) -> None:
    labels = [outcome.label for outcome in record.outcomes if outcome.fault is None]
    assert labels == ["1 worker of node1 joined", "node2 (2 workers) joined"]
    assert len(record.outcomes) == len(FAULTS) + 2


def test_an_unannounced_loss_becomes_a_fault() -> None:
    record = tell("alone", EVENTS, METRICS)
    first = record.outcomes[0]
    assert first.fault is not None
    assert (first.fault.kind, first.fault.node, first.fault.holders) == ("worker", "node1", (4,))
    assert first.fault.time == 10.005
    assert first.phases["detect"] == 0.0


def test_a_fault_without_effect_is_not_hidden() -> None:
    missed = Fault(50.0, "node", "kill -9 of nobody", "node7", agents=("zzzz",))
    outcome = tell("missed", EVENTS, METRICS, [missed]).outcomes[-1]
    assert outcome.fault == missed
    assert not outcome.took_effect
    assert sum(outcome.phases.values()) == 0.0


def test_lives_of_the_nodes(record: RunRecord) -> None:
    lives = [(s.node, s.start, s.stop, s.workers) for s in record.spans if s.node != "node0"]
    assert lives == [
        ("node1", 0.2, 10.030, 2),
        ("node2", 0.2, 20.5, 2),
        ("node1", 10.030, 14.1, 1),
        ("node1", 14.1, 40.1, 2),
        ("node2", 30.5, 41.0, 2),
    ]


def test_steps_and_losses(record: RunRecord) -> None:
    assert record.losses[3] == 4.7
    assert [record.step_at(t) for t in (0.0, 9.995, 12.0, 99.0)] == [1, 3, 4, 11]


def test_nothing_happened() -> None:
    assert tell("empty", []).outcomes == ()
    assert tell("empty", []).step_at(1.0) == 0


def test_faults_survive_json() -> None:
    for fault in FAULTS:
        assert Fault.from_json(dataclasses.asdict(fault)) == fault
