"""In an allocation launch needs no flags, and submit writes what has to stand around it."""

import subprocess
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import OUTLAST, SCRIPT, alone

from outlast.launch.slurm.hostlist import hostnames

SHORT = ("--steps", "5")


@pytest.mark.parametrize(
    "text", ["node[1-6]", "node1", "node[01-03,7],rack2-[9-11]", "a[1-2]b[3-4],c", "n[098-101]"]
)
def test_node_lists_are_read_as_slurm_does(made: Cluster, text: str) -> None:
    theirs = made.run("ctl", "scontrol", "show", "hostnames", text).split()
    assert list(hostnames(text)) == theirs


def test_a_batch_script_of_one_line(cluster: Cluster, tmp_path: Path) -> None:
    script = f"#!/bin/bash\n{OUTLAST} launch {SCRIPT} {' '.join(SHORT)}\n"
    out = tmp_path / "out"
    job = cluster.submit(script, "-N2", "--exclusive", f"--output={out}", f"--chdir={tmp_path}")
    assert cluster.await_job(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", out.read_text()
    assert out.read_text().count(alone(*SHORT)) == 2
    assert (tmp_path / "outlast_logs" / f"slurm-{job}" / "metrics.jsonl").exists()


def test_every_task_of_an_srun_is_an_agent(cluster: Cluster, tmp_path: Path) -> None:
    command = ("srun", "-N3", "--exclusive", OUTLAST, "launch", SCRIPT, *SHORT)
    told = cluster.run("ctl", *command, directory=tmp_path)
    assert told.count(alone(*SHORT)) == 3
    with pytest.raises(RuntimeError, match="--ntasks-per-node=1"):
        cluster.run("ctl", "srun", "-n2", "-N1", OUTLAST, "launch", SCRIPT, directory=tmp_path)


def test_an_interrupt_in_an_allocation_brings_the_state_to_storage(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Ctrl-C reaches the command alone: salloc gives it a foreground of its own."""
    command = ("salloc", "-N2", "--exclusive", OUTLAST, "launch", SCRIPT, "--steps", "10000")
    shell = cluster.start(
        "ctl", *command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    cluster.await_true(lambda: [*tmp_path.glob("outlast_logs/*/metrics.jsonl")])
    cluster.run("ctl", "pkill", "-INT", "-f", f"^[^ ]*python.* {OUTLAST} launch")
    told = shell.communicate(timeout=60)[0]
    assert "is in" in told, told
    assert shell.returncode == 130, told
    assert [*tmp_path.glob("outlast_logs/*/checkpoints/step-*/manifest.json")]


def test_print_shows_the_script_and_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    told = cluster.run(
        "ctl", OUTLAST, "submit", "--nodes", "4", "--spares", "1", "--time", "2:00:00", "--print",
        SCRIPT, directory=tmp_path,
    )  # fmt: skip
    for line in ("--nodes=5", "--time=2:00:00", "--no-kill", "--requeue", "--signal=USR1@90"):
        assert f"#SBATCH {line}\n" in told
    assert not cluster.run("ctl", "squeue", "-h")
    assert not [*tmp_path.iterdir()]
