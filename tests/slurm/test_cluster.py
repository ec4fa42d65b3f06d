"""The cluster under the other tests is what it pretends to be, and SLURM what we take it for.

Each fault of a node has its own look from outside, and recovery from it rests on that look.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster

SAY = """
import socket, sys, time
with socket.create_server(("", 7000)) as server:
    print("up", flush=True)
    peer = server.accept()[0]
    while True:
        peer.send(b".")
        time.sleep(0.1)
"""
LISTEN = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 7000), timeout=3)
print("connected", flush=True)
try:
    while peer.recv(1):
        pass
    print("closed")
except TimeoutError:
    print("silence")
except ConnectionError:
    print("closed")
"""
REACH = """
import socket, sys
socket.create_connection((sys.argv[1], 6818), timeout=1).close()  # slurmd's port
"""
POUR = """
import socket, sys, time
start = time.time()
with socket.create_connection((sys.argv[1], 7000)) as peer:
    print(time.time() - start)
    peer.sendall(bytes(1 << 20))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
print(time.time() - start)
"""
DRINK = """
import socket
with socket.create_server(("", 7000)) as server:
    print("up", flush=True)
    peer = server.accept()[0]
    while peer.recv(1 << 16):
        pass
"""
ALIVE = "while :; do date +%s.%N > {}.$SLURMD_NODENAME; sleep 0.2; done"


def python(cluster: Cluster, node: str, program: str, *arguments: str) -> subprocess.Popen[str]:
    return cluster.start(
        node, "python3", "-c", program, *arguments, stdout=subprocess.PIPE, bufsize=1
    )


@pytest.fixture
def listener(cluster: Cluster) -> Iterator[subprocess.Popen[str]]:
    """A process on node1 that hears node2 tick, and will tell how that ended."""
    server = python(cluster, "node2", SAY)
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    peer = python(cluster, "node1", LISTEN, "node2")
    assert peer.stdout is not None
    assert peer.stdout.readline() == "connected\n"
    yield peer
    cluster.heal("node2", wait=False)
    cluster.stop(server)
    cluster.stop(peer)


def told(listener: subprocess.Popen[str]) -> str:
    return listener.communicate(timeout=20)[0].strip()


def reaches(cluster: Cluster, node: str, other: str) -> bool:
    return cluster.stop(cluster.start(node, "python3", "-c", REACH, other), 0) == 0


def beats(path: Path, node: str, age_s: float = 1.5) -> bool:
    beat = path.with_name(f"{path.name}.{node}")
    return beat.exists() and time.time() - beat.stat().st_mtime < age_s


def test_every_node_is_a_machine_of_its_own(cluster: Cluster) -> None:
    names = cluster.run("ctl", "srun", "-N6", "hostname").split()
    assert sorted(names) == list(cluster.nodes)
    cluster.run("node1", "touch", "/dev/shm/mine")
    assert "mine" not in cluster.run("node2", "ls", "/dev/shm")
    assert "10.77.0.2/24" in cluster.run("node2", "ip", "-o", "address", "show", "eth0")


def test_a_power_cut_is_silence(cluster: Cluster, listener: subprocess.Popen[str]) -> None:
    cluster.kill("node2", "power")
    assert told(listener) == "silence"
    cluster.heal("node2")
    assert cluster.run("ctl", "srun", "-w", "node2", "hostname") == "node2"


def test_a_crash_is_heard(cluster: Cluster, listener: subprocess.Popen[str]) -> None:
    cluster.kill("node2", "crash")
    assert told(listener) == "closed"


def test_a_frozen_node_is_silent_but_acknowledges(
    cluster: Cluster, listener: subprocess.Popen[str]
) -> None:
    cluster.freeze("node2")
    assert reaches(cluster, "node1", "node2")
    assert told(listener) == "silence"


def test_an_island_talks_to_itself(cluster: Cluster) -> None:
    cluster.cut("node5", "node6", place="island1")
    assert reaches(cluster, "node5", "node6")
    assert not reaches(cluster, "node1", "node5")
    cluster.heal("node5", "node6")
    cluster.await_true(lambda: reaches(cluster, "node1", "node5"), 10)


def test_tasks_outlive_slurmd(cluster: Cluster, tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    cluster.submit(f"#!/bin/bash\n{ALIVE.format(beat)}", "-w", "node3")
    cluster.await_true(lambda: beats(beat, "node3"))
    cluster.kill("node3", "slurmd")
    time.sleep(2)
    assert beats(beat, "node3")


def test_the_step_number_tells_a_batch_script_from_a_step(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = f"#!/bin/bash\nenv > {tmp_path}/batch\nsrun -N1 -n1 -w node2 env > {tmp_path}/step\n"
    job = cluster.submit(script, "-N2", "-w", "node[1-2]")
    cluster.await_job(job, "COMPLETED")
    batch, step = (tmp_path.joinpath(name).read_text() for name in ("batch", "step"))
    for text in (batch, step):
        assert f"SLURM_JOB_ID={job}\n" in text
        assert "SLURM_JOB_NODELIST=node[1-2]\n" in text
        assert "SLURM_LOCALID=0\n" in text
    assert "SLURM_STEP_ID=" not in batch
    assert "SLURM_STEP_ID=0\n" in step
    assert "SLURMD_NODENAME=node2\n" in step


def test_steps_outlive_the_batch_host_and_the_job_runs_on_for_ever(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Why the last agent has to end the job: nobody else does."""
    beat = tmp_path / "beat"
    tmp_path.joinpath("alive.sh").write_text(ALIVE.format(beat))
    step = f"srun --nodes=1 --ntasks=1 --nodelist=node2 bash {tmp_path}/alive.sh"
    job = cluster.submit(f"#!/bin/bash\n{step}\n", "-N2", "-w", "node[1-2]", "--no-kill")
    cluster.await_true(lambda: beats(beat, "node2"))
    cluster.kill("node1", "crash")
    cluster.await_true(lambda: cluster.state("node1") == "down*", 40)
    assert beats(beat, "node2")
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert cluster.job(job)["NodeList"] == "node2"


def test_a_remote_site_is_as_far_away_as_asked(made: Cluster) -> None:
    """At least so far, and at most so fast: the machine may be slow itself."""
    with Cluster(nodes=2) as cluster:
        cluster.move(1, "node2", rate_mbit=8, delay_ms=30)
        server = python(cluster, "node2", DRINK)
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        connected, poured = map(float, cluster.run("node1", "python3", "-c", POUR, "node2").split())
        cluster.stop(server)
    assert connected > 2 * 0.030
    assert poured > 1.0, "a MiB takes at least a second"
