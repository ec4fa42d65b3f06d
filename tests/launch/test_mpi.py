"""Launches by MPI on one machine; several nodes are in tests/slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from job import FAKE, Job, all_gone

from outlast.cluster.environment import environment
from outlast.launch.mpi import meeting_places

SCRIPT = str(Path(__file__).parents[1] / "runtime" / "training_script.py")
HYDRA = (str(Path(sys.prefix) / "bin" / "mpiexec.hydra"),)
OPEN_MPI = ("/usr/bin/mpirun.openmpi", "--oversubscribe")
OPEN_MPI_VARIABLES = {
    "MPI4PY_LIBMPI": "libmpi.so.40",  # of the two that are installed here
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
LAUNCHERS = {"hydra": (HYDRA, {}), "open-mpi": (OPEN_MPI, OPEN_MPI_VARIABLES)}
QUICK = ("--heartbeat", "0.2", "--shutdown-timeout", "1")

Launcher = tuple[tuple[str, ...], dict[str, str]]


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """A launcher and the variables it needs here."""
    command, variables = LAUNCHERS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"not run: {command[0]} is not installed")
    return command, variables


def ended_by(start: Callable[..., Job], launcher: Launcher, count: int, *arguments: str) -> Job:
    """A job of so many processes of the launcher, when it has ended."""
    job = start(*QUICK, *arguments, by=(*launcher[0], "-n", str(count)), **launcher[1])
    job.end(60)
    return job


def digest(job: Job) -> str:
    (found,) = set(re.findall(r"digest ([0-9a-f]{64})", job.output))
    return found


def test_one_agent_for_the_processes_of_a_node(
    start: Callable[..., Job], launcher: Launcher
) -> None:
    """The same bits as without MPI; every process leaves, and the launcher is content."""
    job = ended_by(start, launcher, 3, SCRIPT, "--steps", "3")
    twin = start(*QUICK, "--standalone", "--nproc-per-node", "3", SCRIPT, "--steps", "3",
                 name="twin")  # fmt: skip
    assert (job.process.returncode, twin.end(60)) == (0, 0), job.output + twin.output
    assert len(job.events("started")) == 1
    assert digest(job) == digest(twin)


def test_flags_come_before_mpi(start: Callable[..., Job], launcher: Launcher) -> None:
    job = ended_by(start, launcher, 2, "--nproc-per-node", "1", FAKE, "4", str(time.time()))
    assert job.process.returncode == 0, job.output
    assert len(job.events("fake_started")) == 1


def test_a_worker_is_no_process_of_the_launchers(
    start: Callable[..., Job], script: Callable[[str], str], launcher: Launcher
) -> None:
    text = "print(f'alone among {MPI.COMM_WORLD.size}\\n', end='', flush=True)"
    job = ended_by(start, launcher, 2, script(f"from mpi4py import MPI\n{text}"))
    assert job.process.returncode == 0, job.output
    assert job.output.count("alone among 1") == 2


def test_a_failure_is_the_launchers(start: Callable[..., Job], launcher: Launcher) -> None:
    job = ended_by(start, launcher, 2, FAKE, "2000", str(time.time()), "raise")
    assert job.process.returncode == 1, job.output
    assert "job failed: rank 1" in job.output


def test_the_launchers_signal_stops_the_job_in_order(
    start: Callable[..., Job], launcher: Launcher
) -> None:
    command, variables = launcher
    job = start(*QUICK, FAKE, "2000", str(time.time()), by=(*command, "-n", "2"), **variables)
    job.connected(2)
    tree = job.tree()
    job.process.send_signal(signal.SIGUSR1)
    job.end()
    assert job.events("stopped")[0]["cause"] == "stopped by SIGUSR1"
    assert "on signal" not in job.output  # those that wait for the agent do not die of it
    assert all_gone(tree, 2)


def test_a_stop_by_the_launcher_is_durable(start: Callable[..., Job], launcher: Launcher) -> None:
    """The state is in storage when the launcher has ended, and the next launch goes on from it."""
    command, variables = launcher
    script = (SCRIPT, "--steps", "8", "--pause", "0.05")
    twin = start(*QUICK, "--standalone", "--nproc-per-node", "2", *script, name="twin")
    job = start("--heartbeat", "0.2", *script, by=(*command, "-n", "2"), **variables)
    log = job.directory / "metrics.jsonl"
    job.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
    job.process.send_signal(signal.SIGUSR1)
    job.end(60)
    assert list(job.directory.glob("checkpoints/step-*/manifest.json")), job.output
    again = ended_by(start, launcher, 3, *script)
    assert (again.process.returncode, twin.end(60)) == (0, 0), again.output
    assert digest(again) == digest(twin)


def test_the_launcher_of_another_mpi_is_refused(start: Callable[..., Job]) -> None:
    if shutil.which(OPEN_MPI[0]) is None:
        pytest.skip(f"not run: {OPEN_MPI[0]} is not installed")
    job = ended_by(start, (HYDRA, OPEN_MPI_VARIABLES), 2, FAKE, "4", str(time.time()))
    assert job.process.returncode != 0
    assert "MPI started 2 processes, and mpi4py sees 1 of them through Open MPI" in job.output


def test_without_mpi4py_a_sentence_says_what_to_do(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')")
    job = start(FAKE, "4", str(time.time()), PYTHONPATH=str(tmp_path), PMI_SIZE="2")
    assert job.end() == 2
    assert job.output.count("\n") == 1
    assert "pip install 'outlast[mpi]'" in job.output


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "1"}, 1),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 0),  # srun --mpi=none
    ],
)
def test_what_tells_of_mpi(variables: dict[str, str], size: int) -> None:
    assert environment(variables).mpi_size == size


def test_alone_nothing_of_mpi_is_loaded() -> None:
    program = (
        "import sys; from outlast.launch.mpi import surroundings; "
        "assert surroundings() is None; assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PMI_SIZE": "1"})


BRIDGE = "172.17.0.1/16"  # of containers: the same on every node


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([["10.0.0.7/24"]], ["127.0.0.1"]),
        ([[BRIDGE, "10.0.0.7/24"], ["10.0.0.8/24", BRIDGE]], ["10.0.0.7", "10.0.0.8"]),
        ([["10.0.0.7/24", "10.1.0.7/24"], ["10.1.0.8/24"]], ["10.1.0.7", "10.1.0.8"]),
        ([["10.0.0.7/31"], ["10.0.0.9/31"]], ["10.0.0.7", "10.0.0.9"]),  # routed, no choice
        ([["10.0.0.7/31", BRIDGE], ["10.0.0.9/31", BRIDGE]], []),
        ([[BRIDGE], [BRIDGE]], []),
        ([[], []], []),
    ],
)
def test_where_nodes_can_meet(nodes: list[list[str]], expected: list[str]) -> None:
    assert meeting_places(nodes) == expected
