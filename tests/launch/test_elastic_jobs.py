"""Jobs whose workers speak the link protocol: losses, returns, silence, ends."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from job import FAKE, KEY, Job, all_gone, free_ports

Start = Callable[..., Job]
STANDALONE = ("--standalone", "--heartbeat", "0.2", "--shutdown-timeout", "1")
LONG = 2000


def fake(steps: int, flaw: str = "") -> list[str]:
    return [FAKE, str(steps), str(time.time()), *([flaw] if flaw else [])]


def workers(job: Job) -> list[dict[str, Any]]:
    """The workers so far, as they announced themselves."""
    return job.events("fake_started")


def agents(job: Job) -> dict[str, int]:
    """node -> process id of its newest agent."""
    return {event["node"]: event["pid"] for event in job.events("started")}


def logged_steps(job: Job) -> list[int]:
    text = (job.directory / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def latency_ms(job: Job, since: float) -> float:
    """From a moment to the first install of the newest generation."""
    newest = max(e["generation"] for e in job.events("view"))
    return 1000 * (min(e["time"] for e in job.events("view") if e["generation"] == newest) - since)


def test_steps_are_logged_once_and_the_job_finishes(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", "--nproc-per-node", "2", *fake(40, "garbage"))
    assert job.end() == 0, job.output
    steps = logged_steps(job)
    assert steps == list(range(steps[0], 40))
    assert len(job.events("malformed")) >= 4 * 4
    assert job.output.splitlines()[-1] == "outlast: job finished"
    assert len({e["generation"] for e in job.events("view")}) == 1
    assert len(job.events("finished")) == 2


def test_a_killed_worker_is_lost_and_its_memory_kept(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", "--nproc-per-node", "2", *fake(LONG))
    job.connected(4)
    victim = workers(job)[-1]
    began = time.time()
    psutil.Process(victim["pid"]).kill()
    generation = job.connected(3)
    print(f"kill to view: {latency_ms(job, began):.1f} ms")
    (lost,) = job.events("worker_lost")
    assert (lost["holder"], lost["cause"]) == (victim["holder"], "killed by SIGKILL")
    assert any(victim["holder"] in e["holders"] for e in job.events("fake_memories"))
    assert job.wait_for_events("released")[0]["generation"] == generation
    assert f"generation {generation}: lost worker" in job.output
    assert not job.events("peer_lost")


def test_a_killed_worker_comes_back_while_restarts_are_left(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", "--max-restarts", "1", *fake(100))
    job.connected(2)
    victim = workers(job)[0]
    psutil.Process(victim["pid"]).kill()
    (again,) = job.wait_for_events("fake_started", 3)[2:]
    assert (again["node"], again["restarts"]) == (victim["node"], 1)
    assert again["holder"] != victim["holder"]
    job.connected(2)
    assert "is back" in job.output
    assert job.end() == 0
    steps = logged_steps(job)
    assert steps == list(range(steps[0], 100))


@pytest.mark.parametrize("flaw", ["raise", "abort", "exit"])
def test_an_exception_fails_the_job(start: Start, flaw: str) -> None:
    job = start(*STANDALONE, "--nnodes", "2", *fake(LONG, flaw))
    assert job.end() == 1
    # In the traceback twice, and where it says why the job failed.
    assert job.output.count("boom in the script") == (0 if flaw == "exit" else 3)
    assert "job failed: rank 1 (node1, local rank 0" in job.output


def test_a_stopped_worker_is_fenced(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", *fake(LONG))
    job.connected(2)
    victim = workers(job)[-1]
    psutil.Process(victim["pid"]).suspend()
    job.connected(1)
    assert "stopped: no answer" in job.events("worker_lost")[0]["cause"]
    assert not psutil.pid_exists(victim["pid"])


def test_a_worker_that_does_not_read_is_fenced(start: Start) -> None:
    job = start(*STANDALONE, *fake(LONG, "mute"))
    assert job.end() == 1
    assert "hung: no answer" in job.events("worker_lost")[0]["cause"]
    assert "every worker was lost" in job.output


def test_a_killed_agent_is_a_lost_node(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "3", "--nproc-per-node", "2", *fake(100))
    job.connected(6)
    first = agents(job)["node0"]  # the founder and writer of the metrics
    children = psutil.Process(first).children()
    began = time.time()
    psutil.Process(first).kill()
    job.connected(4)
    print(f"agent's kill to view: {latency_ms(job, began):.1f} ms")
    assert all_gone(children, 2)
    assert job.end() == 0
    assert "lost node0" in job.output
    steps = logged_steps(job)
    assert steps == list(range(steps[0], 100))


def test_a_suspended_node_is_evicted_and_joins_again(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "3", *fake(LONG))
    job.connected(3)
    agent = psutil.Process(agents(job)["node2"])
    agent.suspend()
    job.connected(2)
    agent.resume()
    job.wait_for_events("evicted")
    job.connected(3)
    assert len(job.events("started")) == 4
    assert job.events("joined")[0]["node"] == "node2"
    assert agent.is_running()


def node_arguments(ports: list[int], name: str, steps: list[str]) -> list[str]:
    endpoints = ",".join(f"127.0.0.1:{port}" for port in ports)
    return ["--nnodes", "2:3", "--rdzv-endpoint", endpoints, "--rdzv-id", "job", "--heartbeat",
            "0.2", "--local-addr", "127.0.0.1", "--node-name", name, *steps]  # fmt: skip


def test_nodes_come_and_go(start: Start) -> None:
    """Three `outlast launch` as on three machines; one dies and is started again."""
    ports, steps = free_ports(2), fake(160)
    jobs = {n: start(*node_arguments(ports, n, steps), OUTLAST_JOB_KEY=KEY) for n in "abc"}
    job = jobs["a"]
    job.connected(3)
    tree = jobs["b"].tree()
    jobs["b"].process.kill()
    job.connected(2)
    assert all_gone(tree[1:], 2)
    jobs["b"] = start(*node_arguments(ports, "b", steps), OUTLAST_JOB_KEY=KEY)
    job.connected(3)
    jobs["c"].process.terminate()
    assert jobs["c"].end() == 143
    job.connected(2)
    assert (jobs["a"].end(), jobs["b"].end()) == (0, 0)
    logged = logged_steps(job)
    assert logged == list(range(logged[0], 160))
    assert "the secret" not in job.output
    assert KEY not in "".join(path.read_text() for path in job.directory.rglob("events*"))


def test_a_newcomer_joins_when_its_workers_are_ready(start: Start) -> None:
    ports, steps = free_ports(1), fake(LONG)
    jobs = [start(*node_arguments(ports, n, steps), OUTLAST_JOB_KEY=KEY) for n in "ab"]
    assert jobs[0].connected(2) == 1
    start(*node_arguments(ports, "c", steps), OUTLAST_JOB_KEY=KEY)
    assert jobs[0].connected(3) == 2
    (joined,) = jobs[0].events("joined")
    assert workers(jobs[0])[-1]["node"] == joined["node"] == "c"
    assert workers(jobs[0])[-1]["time"] < joined["time"]


def test_a_newcomer_that_cannot_start_is_not_the_jobs_failure(start: Start) -> None:
    ports, steps = free_ports(1), fake(LONG)
    jobs = [start(*node_arguments(ports, n, steps), OUTLAST_JOB_KEY=KEY) for n in "ab"]
    jobs[0].connected(2)
    broken = start(*node_arguments(ports, "c", [FAKE, "not a number", "0"]), OUTLAST_JOB_KEY=KEY)
    assert broken.end() == 2, broken.output
    assert "cannot join the job: rank 2 (c, local rank 0" in broken.output
    time.sleep(1)
    assert [job.process.poll() for job in jobs] == [None, None]
    assert max(view["generation"] for view in jobs[0].events("view")) == 1


def test_a_signal_to_one_agent_ends_all_in_the_grace(start: Start) -> None:
    """Also those that got none, where storage takes for ever."""
    ports, steps = free_ports(1), ["--shutdown-timeout", "1", *fake(LONG, "stuck")]
    jobs = [start(*node_arguments(ports, n, steps), OUTLAST_JOB_KEY=KEY) for n in "ab"]
    jobs[0].connected(2)
    jobs[0].wait_for_events("resumed", 2)
    jobs[1].process.send_signal(signal.SIGUSR1)
    assert [job.end() for job in jobs] == [128 + signal.SIGUSR1] * 2
    late = "stopped by SIGUSR1: the state was not on storage within 1 s"
    assert [event["cause"] for event in jobs[0].events("stopped")] == [late, late]


def test_another_job_at_the_same_place_is_refused(start: Start) -> None:
    ports, steps = free_ports(1), fake(LONG)
    jobs = [start(*node_arguments(ports, n, steps), OUTLAST_JOB_KEY=KEY) for n in "abc"]
    jobs[0].connected(3)
    full = start(*node_arguments(ports, "d", steps), name="other", OUTLAST_JOB_KEY=KEY)
    stranger = start(*node_arguments(ports, "e", steps), name="other", OUTLAST_JOB_KEY=KEY[::-1])
    assert full.end() == 2
    assert "already runs" in full.output
    assert stranger.end() == 2
    assert "job id and key" in stranger.output
    assert jobs[0].connected(3)
    assert max(e["generation"] for e in jobs[0].events("view")) == 1


def test_noise_on_the_control_port_disturbs_nobody(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", *fake(60))
    job.connected(2)
    ports = {c.laddr.port for pid in agents(job).values()
             for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}  # fmt: skip
    noise = []
    for port in ports:
        for data in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\xff" * 8):
            noise.append(socket.create_connection(("127.0.0.1", port), 2))
            noise[-1].send(data) if data else None
    assert job.end() == 0
    assert len({e["generation"] for e in job.events("view")}) == 1
    for connection in noise:
        connection.close()


def test_nothing_is_left_of_an_elastic_job(start: Start) -> None:
    job = start(*STANDALONE, "--nnodes", "2", *fake(LONG))
    job.connected(2)
    tree = job.tree()
    key_fd_only = [argument for process in tree for argument in process.cmdline()]
    assert not any(len(argument) == 64 and argument.isalnum() for argument in key_fd_only)
    job.process.send_signal(signal.SIGTERM)
    assert job.end(5) == 143
    assert all_gone(tree, 1)
    assert not list(Path("/dev/shm").glob("outlast*"))


def test_a_launch_that_cannot_begin_says_why(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/nowhere\n")
    program.chmod(0o755)
    broken = start(*STANDALONE, "--no-python", str(program))
    assert broken.end() == 1
    assert f"cannot start {program}" in broken.output
    busy = socket.create_server(("127.0.0.1", 0))
    ports = [busy.getsockname()[1]]
    job = start(*node_arguments(ports, "a", fake(5)), OUTLAST_JOB_KEY=KEY)
    assert job.end() == 2
    assert "something else answers" in job.output
    busy.close()
