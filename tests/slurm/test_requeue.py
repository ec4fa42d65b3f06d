"""A job is asked to stop, fails or is lost: what SLURM is told, where the next start goes on."""

import re
from pathlib import Path

from slurm_cluster import Cluster
from slurm_run import SlurmRun

ROOMY = ("--nodes", "4", "--sbatch", "--nodes=2-4", "--time", "5", "--grace", "20")


def stored(run: SlurmRun) -> list[int]:
    """Steps from which starts of the job went on."""
    return [int(step) for step in re.findall(r"training starts at step (\d+)", run.output)]


def test_a_preempted_job_goes_on_at_another_size(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, *ROOMY)
    run.await_step(3)
    urgent = cluster.submit(
        "#!/bin/bash\nsleep 60\n", "--partition=urgent", "--exclusive", "--nodelist=node[3-6]"
    )
    run.await_true(lambda: len(stored(run)) == 2, "another start")
    run.await_steps_more()
    cluster.run("ctl", "scancel", urgent)
    run.hurry()
    run.check_bits()
    first, second = stored(run)
    assert first == 0
    assert second >= 3
    assert sorted(run.members()) == ["node1", "node2"]
    assert cluster.job(run.number)["Restarts"] == "1"


def test_a_job_that_somebody_cancels_is_not_started_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path, *ROOMY)
    run.await_step(3)
    cluster.run("ctl", "scancel", run.number)
    job = run.await_state("CANCELLED")
    assert job["Restarts"] == "0"
    run.await_true(lambda: [*run.directory.glob("checkpoints/step-*/manifest.json")], "its state")


def test_a_crash_loop_stops_with_a_reason(cluster: Cluster, tmp_path: Path) -> None:
    script = ("--steps", "20", "--flaw", "dies")
    run = SlurmRun(cluster, tmp_path, "--nodes", "2", "--time", "5", script=script)
    run.hurry()
    job = run.await_state("FAILED", "COMPLETED")
    assert job["JobState"] == "FAILED", run.output
    assert job["Restarts"] == "1"
    assert "now twice from the start without a new step" in run.output


def test_nodes_that_were_lost_are_excluded_and_drained(cluster: Cluster, tmp_path: Path) -> None:
    """Two at once are more than one parity unit can make good."""
    run = SlurmRun(cluster, tmp_path, "--nodes", "4", "--time", "5", "--drain")
    run.await_step(3)
    cluster.cut("node3", "node4")
    run.await_true(lambda: len(stored(run)) == 2, "another start")
    assert "drain" in cluster.state("node3")
    assert "drain" not in cluster.state("node5")
    cluster.heal("node3", "node4")
    run.await_steps_more()
    run.hurry()
    run.check_bits()
    job = cluster.job(run.number)
    assert job["ExcNodeList"] == "node3,node4"
    assert job["NodeList"] == "node[1-2,5-6]"
    assert job["Restarts"] == "1"
