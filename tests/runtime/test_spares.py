"""Spares: they wait, take a lost node's place in the same step, and change no bit."""

from collections.abc import Callable

from training_job import TrainingJob, alone

Start = Callable[..., TrainingJob]
STEPS = ("--steps", "80")


def seats(job: TrainingJob) -> list[tuple[list[str], list[str]]]:
    """(nodes that train, nodes that wait) of each generation."""
    views = {view["generation"]: view["members"] for view in job.events("view")}
    return [
        tuple(sorted(m["node"] for m in views[g] if m["spare"] is spare) for spare in (False, True))
        for g in sorted(views)
    ]  # type: ignore[misc]


def wait_for_spares(job: TrainingJob, count: int) -> None:
    """Until so many spares are ready."""
    job.wait(lambda: len(job.events("spare_ready")) >= count, "the spares")


def test_a_spare_takes_a_lost_nodes_place_in_the_same_step(start: Start) -> None:
    job = start(3, 1, "--pause", "0.1", *STEPS, launch=("--spares", "1"))
    wait_for_spares(job, 1)
    job.wait_for_step(2)
    spare = job.workers("node3")[0]
    job.kill_node("node1")
    job.wait_for_recovery(2)
    assert seats(job)[:2] == [
        (["node0", "node1", "node2"], ["node3"]),
        (["node0", "node2", "node3"], []),
    ]
    (promoted,) = job.events("spare_promoted")
    assert (promoted["node"], promoted["generation"]) == ("node3", 2)
    assert job.workers("node3")[0].pid == spare.pid, "warm: the process that had waited"
    assert "lost node1" in job.output
    assert "spare node3 takes a place" in job.output
    assert job.end() == 0, job.output
    recovered = [e for e in job.events("recovered") if e["generation"] == 2]
    assert len(recovered) == 3, "the others and the spare, in one change"
    assert len({e["step"] for e in recovered}) == 1
    assert max(e["redone"] for e in recovered) <= 1
    assert job.digests == [alone(*STEPS)] * 3
    assert job.steps == list(range(1, 81))
