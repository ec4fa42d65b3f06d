"""Spares: they wait, take a lost node's place in the same step, and change no bit."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from training_job import ENVIRONMENT, TrainingJob, alone

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


@pytest.mark.long  # tests/slurm has its like
def test_two_nodes_and_a_spare_lose_both_nodes_in_turn(tmp_path: Path) -> None:
    """Three nodes, each a launch of its own: one is lost and returns as the spare, and then takes
    the place of the first, which two nodes alone could not have lost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--nnodes", "2", "--spares", "1", "--rdzv-id", "spares", "--local-addr", "127.0.0.1",
             f"--rdzv-endpoint=127.0.0.1:{port}"]  # fmt: skip
    environment = {**ENVIRONMENT, "OUTLAST_JOB_KEY": "a key that is long enough for a job"}

    def node(index: int) -> TrainingJob:
        launch = [*flags, "--node-name", f"node{index}"]
        script = ["--pause", "0.15", *STEPS]
        jobs.append(TrainingJob(tmp_path / "logs", launch, script, environment, session=True))
        return jobs[-1]

    def kill(job: TrainingJob, name: str) -> None:
        job.kill_node(name)
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()

    def wait_for_seats(job: TrainingJob, train: list[str], wait: list[str]) -> None:
        job.wait(lambda: seats(job)[-1:] == [(train, wait)], f"{train} with {wait} waiting")

    jobs: list[TrainingJob] = []
    try:
        first = node(0)
        first.wait(lambda: first.events("started"), "the founder")
        second, third = node(1), node(2)
        wait_for_spares(third, 1)
        waiting = seats(third)[0][1][0]
        (lost,) = {"node1", "node2"} - {waiting}
        first.wait_for_step(2)
        kill(second if lost == "node1" else third, lost)
        wait_for_seats(first, ["node0", waiting], [])
        back = node(int(lost[-1]))
        wait_for_seats(first, ["node0", waiting], [lost])
        first.wait_for_step(max(first.steps) + 3)
        kill(first, "node0")
        wait_for_seats(back, ["node1", "node2"], [])
        alive = [back, third if lost == "node1" else second]
        assert [job.end() for job in alive] == [0, 0], back.output
        assert [job.digests for job in alive] == [[alone(*STEPS)]] * 2
        assert back.steps == list(range(1, 81))
        assert len(back.events("spare_promoted")) == 2
    finally:
        for job in jobs:
            job.stop()


def test_spares_alone_do_not_start_over(start: Start) -> None:
    """All that trained are lost, and the spares are a majority: they know that there was a step."""
    job = start(1, 1, "--pause", "0.05", *STEPS, launch=("--spares", "2"))
    wait_for_spares(job, 2)
    job.wait_for_step(2)
    job.kill_node("node0")
    assert job.end() == 1, job.output
    assert "StateLost: no survivor holds any state" in job.output
    assert not [e for e in job.events("recovered") if e["generation"] > 1]
