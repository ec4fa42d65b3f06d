"""What else goes wrong on a machine: flipped bits, deaths while starting, a full /dev/shm."""

import mmap
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_job import ENVIRONMENT, LAUNCH, SCRIPT, WAIT_S, TrainingJob, alone

Start = Callable[..., TrainingJob]
RECORDS = 4 * (4 << 20)  # bytes of the records at the front of a state memory
SLOW = ("--pause", "0.1", "--steps", "30")


def flip_parity(agent: int, holder: int) -> None:
    """Flip one bit in both parity halves of a worker, in the memory that its agent holds."""
    for descriptor in Path(f"/proc/{agent}/fd").iterdir():
        if f"outlast-{holder}" in os.readlink(descriptor):
            with descriptor.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                half = (size - RECORDS) // 4
                with mmap.mmap(file.fileno(), size) as memory:
                    for start in (RECORDS + 2 * half, RECORDS + 3 * half):
                        memory[start + 100] ^= 1
            return
    raise AssertionError(f"agent {agent} holds no memory of {holder}")


def test_a_flipped_bit_in_parity_is_found_and_another_source_is_used(start: Start) -> None:
    """The parity that a lost worker needs is bad on one node: its own memory is read instead, by
    the worker that replaces it."""
    job = start(3, 1, *SLOW)
    job.wait_for_step(4)
    victim, encoder = job.workers("node1")[0], job.workers("node2")[0]
    members = {m["node"]: m["workers"] for m in job.events("view")[-1]["members"]}
    generation = job.events("view")[-1]["generation"]
    encoder.send_signal(signal.SIGSTOP)
    flip_parity(job.agents()["node2"], members["node2"][0])
    victim.kill()
    job.wait(lambda: job.events("view")[-1]["generation"] > generation, "the next view")
    encoder.send_signal(signal.SIGCONT)
    assert job.end() == 0, job.output
    corrupt = job.events("corrupt")
    assert {entry["role"] for entry in corrupt} == {"parity"}
    assert {entry["holder"] for entry in corrupt} == {members["node2"][0]}
    assert set(job.digests) == {alone("--steps", "30")}
    assert job.steps == list(range(1, 31))


def test_a_worker_killed_while_it_starts_costs_nothing(start: Start) -> None:
    job = start(2, 2)
    job.wait(lambda: "node1" in job.agents() and job.workers("node1"), "a worker")
    job.workers("node1")[0].kill()
    assert job.end() == 0, job.output
    assert set(job.digests) == {alone()}
    assert job.steps == list(range(1, 8))


def test_a_full_dev_shm_does_not_matter(tmp_path: Path) -> None:
    """State memory is anonymous: containers give /dev/shm 64 MiB, and others fill it."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("not run: needs unshare and root for a mount of its own")
    shape = ["--standalone", "--nnodes", "2", "--nproc-per-node", "1", "--log-dir", str(tmp_path)]
    job = shlex.join([*LAUNCH, *shape, SCRIPT])
    full = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 1M /dev/zero > /dev/shm/x; "
    command = ["unshare", "--mount", "sh", "-c", f"{full} exec {job}"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=WAIT_S
    )
    if "mount:" in done.stderr:
        pytest.skip(f"not run: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"digest {alone()}") == 2


@pytest.mark.long  # tests/slurm has its like
def test_a_node_that_returns_takes_part(tmp_path: Path) -> None:
    """Three nodes, each a launch of its own; one is killed and started again."""
    port = _free_port()
    flags = ["--nnodes", "3", "--rdzv-id", "returns", f"--rdzv-endpoint=127.0.0.1:{port}"]
    environment = {**ENVIRONMENT, "OUTLAST_JOB_KEY": "a key that is long enough for a job"}
    script = ["--pause", "0.15", "--steps", "60"]

    def node(index: int) -> TrainingJob:
        launch = [*flags, "--node-name", f"node{index}"]
        return TrainingJob(tmp_path / "logs", launch, script, environment, session=True)

    jobs = [node(index) for index in range(3)]
    try:
        jobs[0].wait_for_step(3)
        os.killpg(jobs[1].process.pid, signal.SIGKILL)
        jobs[1].process.wait()
        jobs[0].wait(lambda: len(jobs[0].events("view")[-1]["members"]) == 2, "the loss")
        jobs.append(node(1))
        jobs[0].wait(lambda: len(jobs[0].events("view")[-1]["members"]) == 3, "the return")
        assert [jobs[index].end() for index in (0, 2, 3)] == [0, 0, 0]
        digests = [digest for index in (0, 2, 3) for digest in jobs[index].digests]
        assert digests == [alone("--steps", "60")] * 3
        assert jobs[0].steps == list(range(1, 61))
        assert any("heal" in entry["rungs"] for entry in jobs[0].events("recovered"))
    finally:
        for job in jobs:
            job.stop()
    assert not [p for p in psutil.process_iter(["cmdline"]) if _of(p, str(port))]


def _of(process: psutil.Process, text: str) -> bool:
    return any(text in part for part in process.info["cmdline"] or ())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
