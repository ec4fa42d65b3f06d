"""Jobs over several nodes that MPI launchers start, and what is left of them when a node dies."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster

TESTS = Path(__file__).parents[1]
FAKE = str(TESTS / "launch" / "fake_worker.py")
TRAIN = str(TESTS / "runtime" / "training_script.py")
OUTLAST = (sys.executable, "-c", "from outlast.launch.cli import main; main()", "launch")
OPEN_MPI = ("env", "MPI4PY_LIBMPI=libmpi.so.40", "OMPI_ALLOW_RUN_AS_ROOT=1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")  # fmt: skip
LASTING = ("srun", "--no-kill", "--kill-on-bad-exit=0")
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "pmi2": (*LASTING, "--mpi=pmi2"),
    "pmix": (*OPEN_MPI, *LASTING, "--mpi=pmix"),
    "hydra": (f"{sys.prefix}/bin/mpiexec.hydra",),
    "open-mpi": (*OPEN_MPI, "mpirun.openmpi", "--enable-recovery",
                 "--mca", "plm_slurm_args", "--no-kill"),
}


class MpiJob:
    """Four processes on three nodes, two of them on the first, in an allocation of their own."""

    def __init__(self, cluster: Cluster, launcher: str, *arguments: str) -> None:
        self.cluster, self.directory = cluster, cluster.directory / f"mpi-{time.time_ns()}"
        self.directory.mkdir()
        self._out = self.directory / "out"
        # Open MPI names files there after nodes, and other clusters here have nodes of that name.
        temporary = ("env", f"TMPDIR={cluster.directory}")
        command = (*temporary, "salloc", "-Q", "-N3", "-n4", "--exclusive", "--no-kill",
                   *LAUNCHERS[launcher], *OUTLAST, "--log-dir", str(self.directory), *arguments)
        with self._out.open("w") as out:
            self.process = cluster.start("ctl", *command, stdout=out, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._out.read_text()

    def events(self, name: str) -> list[dict[str, object]]:
        lines = (line for path in self.directory.glob("events-*.jsonl") for line in path.open())
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def await_steps(self, count: int) -> None:
        log = self.directory / "metrics.jsonl"
        self.cluster.await_true(
            lambda: log.exists() and log.read_text().count("\n") >= count, hint=self.output
        )

    def await_finished(self, nodes: int) -> None:
        """As the agents say: a launcher that has lost a node may wait for it for ever."""
        self.cluster.await_true(lambda: len(self.events("finished")) == nodes, hint=self.output)


@pytest.fixture
def launch(cluster: Cluster) -> Iterator[type[MpiJob]]:
    yield MpiJob
    cluster.run("ctl", "scancel", "--user=root")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nodes_find_each_other_through_mpi(
    launch: type[MpiJob], cluster: Cluster, launcher: str
) -> None:
    job = launch(cluster, launcher, FAKE, "20", str(time.time()))
    assert job.process.wait(60) == 0, job.output
    workers = [event["node"] for event in job.events("fake_started")]
    first, second, third = sorted({event["node"] for event in job.events("started")})
    assert sorted(workers) == [first, first, second, third]


def test_hydra_lets_the_job_end_with_its_node(launch: type[MpiJob], cluster: Cluster) -> None:
    """Documented, not wanted: when this fails, docs/mpi.md is out of date."""
    job = launch(cluster, "hydra", FAKE, "200", str(time.time()))
    job.await_steps(10)
    cluster.kill(str(job.events("view")[0]["members"][-1]["node"]), "crash")
    assert job.process.wait(30) != 0
    assert not job.events("finished")


def test_the_job_outlasts_a_node_under_open_mpi(launch: type[MpiJob], cluster: Cluster) -> None:
    job = launch(cluster, "open-mpi", FAKE, "150", str(time.time()))
    job.await_steps(10)
    cluster.kill(str(job.events("view")[0]["members"][-1]["node"]), "crash")
    job.await_finished(2)


def test_the_job_outlasts_a_node_with_the_same_bits(
    launch: type[MpiJob], cluster: Cluster
) -> None:
    script = (TRAIN, "--steps", "8", "--pause", "0.05")
    twin = cluster.run("ctl", *OUTLAST, "--standalone",
                       "--log-dir", str(cluster.directory / "twin"), *script)  # fmt: skip
    job = launch(cluster, "pmi2", *script)
    job.await_steps(3)
    cluster.kill(str(job.events("view")[0]["members"][-1]["node"]), "crash")
    job.await_finished(2)
    (expected,) = set(re.findall("digest ([0-9a-f]{64})", twin))
    assert set(re.findall("digest ([0-9a-f]{64})", job.output)) == {expected}
