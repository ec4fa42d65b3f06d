"""The story of the handmade run is told as it was."""

import dataclasses

import pytest
from handmade_run import EVENTS, FAULTS, METRICS

from outlast.launch.report.timeline import PHASES, Fault, RunRecord, tell


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
    assert (first.ended, first.resumed) == (10.3, 12.0)


def test_a_fault_is_timed_from_its_injection(record: RunRecord) -> None:
    kill = record.outcomes[0]
    assert kill.took_effect
    assert tuple(kill.phases) == PHASES
    assert kill.phases["detect"] == pytest.approx(10.0)
    assert kill.phases["agree"] == pytest.approx(25.0)
    assert kill.phases["move"] == 90.0
    assert kill.phases["reconnect"] == 0.0
    assert kill.rung == "replica, memory"
    assert kill.to_commit_ms == pytest.approx(2005.0)


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
