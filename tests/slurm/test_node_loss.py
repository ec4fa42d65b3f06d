"""Nodes die in a job: it stays, goes on in place, and a spare takes the seat; the bits are the
undisturbed twin's."""

import json
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import STEPS, RunLog, SlurmRun, alone


def training(run: SlurmRun) -> list[str]:
    """Nodes with workers in the newest view."""
    return sorted(member["node"] for member in run.view["members"] if not member["spare"])


@pytest.mark.parametrize("planted", ["", "bit", "step"])
def test_a_wrong_bit_and_a_repeated_step_are_seen(tmp_path: Path, planted: str) -> None:
    digest, steps = alone(*STEPS), [1, 2, 3]
    if planted == "bit":
        digest = f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"
    if planted == "step":
        steps = [1, 2, 2, 3]
    log = tmp_path / "node1" / "agent" / "attempt_0" / "0" / "stdout.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"digest {alone(*STEPS)}\ndigest {digest}\n")
    metrics = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    if not planted:
        RunLog(tmp_path).check_result()
        return
    with pytest.raises(AssertionError):
        RunLog(tmp_path).check_result()


def test_spares_take_the_places_of_dead_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, "--nodes", "3", "--spares", "2", "--time", "5")
    run.await_step(3)
    assert training(run) == ["node1", "node2", "node3"]
    cluster.kill("node2", "crash")
    run.await_true(lambda: training(run) == ["node1", "node3", "node4"], "a spare's promotion")
    # Back before SLURM has noticed: a step of several nodes would be aborted as a whole now.
    cluster.heal("node2", wait=False)
    run.await_steps_more()
    cluster.kill("node3", "power")
    run.await_true(lambda: len({*training(run)} - {"node3"}) == 3, "another promotion")
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
