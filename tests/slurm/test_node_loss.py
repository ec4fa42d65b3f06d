"""Nodes die in a job: it stays, goes on in place, and a spare takes the seat; the bits are the
undisturbed twin's."""

from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import SlurmRun

WITH_SPARE = ("--nodes", "3", "--spares", "1", "--time", "5")


def training(run: SlurmRun) -> list[str]:
    """Nodes with workers in the newest view."""
    return sorted(member["node"] for member in run.view["members"] if not member["spare"])


@pytest.mark.parametrize("how", ["crash", "power"])
def test_a_spare_takes_the_place_of_a_dead_node(
    cluster: Cluster, tmp_path: Path, how: str
) -> None:
    run = SlurmRun(cluster, tmp_path, *WITH_SPARE)
    run.await_step(3)
    cluster.kill("node2", how)
    run.await_true(lambda: training(run) == ["node1", "node3", "node4"], "the spare's promotion")
    run.await_steps_more()
    run.hurry()
    run.check_bits()
    assert cluster.job(run.number)["Restarts"] == "0"


def test_the_batch_host_and_then_the_next_proposer_die(cluster: Cluster, tmp_path: Path) -> None:
    """The first node runs the batch script, founded the job and proposes its views."""
    run = SlurmRun(cluster, tmp_path, "--nodes", "5", "--time", "5")
    run.await_step(3)
    assert cluster.job(run.number)["BatchHost"] == "node1"
    cluster.kill("node1", "power")
    run.await_members("node2", "node3", "node4", "node5")
    run.await_steps_more()
    second = run.proposer()
    cluster.kill(second, "crash")
    run.await_members(*{"node2", "node3", "node4", "node5"} - {second})
    run.await_steps_more()
    run.hurry()
    job = run.await_state("CANCELLED", "COMPLETED", "FAILED")
    run.check_result()
    assert job["JobState"] in ("CANCELLED", "COMPLETED"), "the last agent has ended it"


def test_a_node_that_is_added_takes_a_place(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, "--nodes", "3", "--time", "5")
    run.await_step(3)
    run.outlast("submit", "--join", run.number, "--time", "5")
    cluster.kill("node2", "crash")
    run.await_members("node1", "node3", "node4")
    run.await_steps_more()
    run.hurry()
    run.check_bits()
