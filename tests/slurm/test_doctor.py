"""`outlast doctor` in an allocation: every node is asked, and the bad one is named."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster

DOCTOR = (sys.executable, "-c", "from outlast.launch.cli import main; main()", "doctor")
LIMIT_S = 200


def findings(folder: Path, found: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found.returncode == (0 if told["healthy"] else 1), found.stdout
    return told


def in_salloc(
    cluster: Cluster, folder: Path, nodes: int, before: str = "", launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a salloc shell of so many nodes, after a shell command."""
    words = [*launcher, *DOCTOR, "--log-dir", "logs", "--json", "found.json"]
    script = f"cd {folder}; {before}\n{shlex.join(words)}"
    process = cluster.start(
        "ctl", "salloc", f"-N{nodes}", "--exclusive", "--no-kill", "bash", "-c", script,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=LIMIT_S)[0]
    finally:
        cluster.stop(process)
    return subprocess.CompletedProcess(words, process.returncode, output)


def test_a_healthy_allocation(cluster: Cluster, tmp_path: Path) -> None:
    done = in_salloc(cluster, tmp_path, 3)
    told = findings(tmp_path, done)
    assert told["healthy"], done.stdout
    assert "healthy: node1, node2, node3" in done.stdout
    asked = {(found["node"], found["check"]) for found in told["findings"]}
    checks = ("memory", "interface", "gemm", "ports", "clock")
    assert {(f"node{n}", check) for n in (1, 2, 3) for check in checks} <= asked


def test_an_allocation_of_one_node(cluster: Cluster, tmp_path: Path) -> None:
    done = in_salloc(cluster, tmp_path, 1)
    assert findings(tmp_path, done)["healthy"], done.stdout
    assert "healthy: node1" in done.stdout


def test_every_task_of_a_step_is_one_node(cluster: Cluster, tmp_path: Path) -> None:
    done = in_salloc(cluster, tmp_path, 2, launcher=["srun", "-N2"])
    assert findings(tmp_path, done)["healthy"], done.stdout
    assert done.stdout.count("healthy: node1, node2") == 1, "one of them prints"


def test_a_node_that_is_gone_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """Before SLURM knows of it."""
    gate = tmp_path / "gate"
    words = f"touch {gate}.open; while [ ! -e {gate} ]; do sleep 0.1; done"
    script = f"cd {tmp_path}; {words}\n{shlex.join([*DOCTOR, '--json', 'found.json'])}"
    with cluster.start(
        "ctl", "salloc", "-N4", "--exclusive", "--no-kill", "bash", "-c", script,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        cluster.await_true(lambda: Path(f"{gate}.open").exists())
        cluster.kill("node3", "power")
        gate.touch()
        output = process.communicate(timeout=LIMIT_S)[0]
    told = findings(tmp_path, subprocess.CompletedProcess((), process.returncode, output))
    assert told["sick"] == ["node3"], output
