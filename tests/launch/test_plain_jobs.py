"""Scripts that know nothing of outlast run as under torchrun."""

import json
import signal
import socket
import time
from collections.abc import Callable

import psutil
import pytest
from job import Job, all_gone

from outlast.cluster.view import Member, View, Worker
from outlast.launch.torch_environment import master_port

Start = Callable[..., Job]
Script = Callable[[str], str]

ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1); dist.all_reduce(ones)
os.write(1, f"SUM {int(ones)} {dist.get_rank()} {os.environ['GROUP_RANK']}\\n".encode())
dist.destroy_process_group()
"""
SLEEPS = """
import os, sys, time
said = ("up", os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], str(os.getpid()))
os.write(1, " ".join(said).encode() + b"\\n")  # print() writes a line in pieces
"""
TWO_BY_TWO = ("--standalone", "--nnodes", "2", "--nproc-per-node", "2", "--heartbeat", "0.2")


def pids(job: Job, restart: int) -> dict[int, int]:
    """rank -> process id of the workers of that restart."""
    lines = [line.split() for line in job.output.splitlines() if line.startswith("up ")]
    return {int(rank): int(pid) for _, rank, count, pid in lines if int(count) == restart}


def test_a_torchrun_script_runs_unchanged(start: Start, script: Script) -> None:
    job = start(*TWO_BY_TWO, script(ALL_REDUCE))
    assert job.end(60) == 0
    sums = sorted(line for line in job.output.splitlines() if line.startswith("SUM"))
    assert sums == ["SUM 4 0 0", "SUM 4 1 0", "SUM 4 2 1", "SUM 4 3 1"]


def test_an_exception_is_shown_once_and_fails_the_job(start: Start, script: Script) -> None:
    text = SLEEPS + "if os.environ['RANK'] == '3': raise ValueError('boom')\ntime.sleep(60)\n"
    job = start(*TWO_BY_TWO, script(text))
    assert job.end() == 1
    assert job.output.count("ValueError: boom") == 1
    assert job.output.count("job failed: rank 3 (node1, local rank 1") == 1


def test_a_recorded_exception_comes_from_the_error_file(start: Start, script: Script) -> None:
    trace = {"message": {"message": "boom", "extraInfo": {"py_callstack": "Traceback: boom"}}}
    text = f"""
import os, sys
open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").write({json.dumps(trace)!r})
sys.exit(3)
"""
    job = start("--standalone", script(text))
    assert job.end() == 1
    assert job.output.count("Traceback: boom") == 1
    assert "exited with code 3" in job.output


def test_a_killed_worker_restarts_all(start: Start, script: Script) -> None:
    text = SLEEPS + "time.sleep(60 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 0.2)\n"
    job = start(*TWO_BY_TWO, "--max-restarts", "1", script(text))
    job.wait_for(lambda: len(pids(job, 0)) == 4)
    psutil.Process(pids(job, 0)[2]).kill()
    assert job.end() == 0
    assert sorted(pids(job, 1)) == [0, 1, 2, 3]
    assert "killed by SIGKILL" in job.output
    assert not any(psutil.pid_exists(pid) for pid in pids(job, 0).values())


def test_restarts_come_to_an_end(start: Start, script: Script) -> None:
    job = start(*TWO_BY_TWO, "--max-restarts", "2", script(SLEEPS + "sys.exit(5)\n"))
    assert job.end() == 1
    assert pids(job, 2)
    assert not pids(job, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_everything(
    start: Start, script: Script, number: signal.Signals, code: int
) -> None:
    child = "import subprocess\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)\n"
    job = start(*TWO_BY_TWO, script(SLEEPS + child))
    job.wait_for(lambda: len(pids(job, 0)) == 4)
    job.wait_for(lambda: len(job.tree()) == 1 + 2 + 4 + 4)
    tree = job.tree()
    ports = [c.laddr.port for p in tree for c in p.net_connections() if c.status == "LISTEN"]
    assert ports
    began = time.monotonic()
    job.process.send_signal(number)
    assert job.end(5) == code
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert all_gone(tree, 1)  # with them their descriptors: memories, sockets
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_worker_that_ignores_sigterm_is_killed(start: Start, script: Script) -> None:
    text = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + SLEEPS
    job = start("--standalone", "--shutdown-timeout", "0.3", script(text + "time.sleep(60)\n"))
    job.wait_for(lambda: pids(job, 0))
    tree = job.tree()
    job.process.terminate()
    assert job.end(5) == 143
    assert all_gone(tree, 1)


def test_killing_the_launcher_ends_the_tree(start: Start, script: Script) -> None:
    job = start(*TWO_BY_TWO, script(SLEEPS + "time.sleep(60)\n"))
    job.wait_for(lambda: len(pids(job, 0)) == 4)
    tree = job.tree()
    job.process.kill()
    assert all_gone(tree, 5)


def test_a_killed_agent_takes_its_workers_with_it(start: Start, script: Script) -> None:
    text = SLEEPS + "time.sleep(60 if os.environ['WORLD_SIZE'] == '2' else 0.2)\n"
    job = start("--standalone", "--nnodes", "1:2", "--heartbeat", "0.2", script(text))
    job.wait_for(lambda: len(pids(job, 0)) == 2)
    agents = {event["node"]: event["pid"] for event in job.events("started")}
    tree = psutil.Process(agents["node1"]).children()
    assert len(tree) == 1
    psutil.Process(agents["node1"]).kill()
    assert all_gone(tree, 2)
    assert job.end() == 0  # the node that is left starts over, and finishes
    assert "lost node1" in job.output


def test_streams_go_where_they_are_told(start: Start, script: Script) -> None:
    text = "import os, sys\nprint('to out')\nprint('to err', file=sys.stderr)\n"
    job = start("--standalone", "--nproc-per-node", "2", "--tee", "0:1", "--redirects", "1:3",
                script(text))  # fmt: skip
    assert job.end() == 0
    lines = job.output.splitlines()
    assert "[node0/0]:to out" in lines
    assert lines.count("to err") == 1
    files = {p.relative_to(job.directory).parts[-2:]: p.read_text()
             for p in job.directory.rglob("*.log")}  # fmt: skip
    assert files == {("0", "stdout.log"): "to out\n", ("1", "stdout.log"): "to out\n",
                     ("1", "stderr.log"): "to err\n"}  # fmt: skip


def test_two_jobs_do_not_share_a_log_directory(start: Start, script: Script) -> None:
    job = start("--standalone", script(SLEEPS + "time.sleep(60)\n"))
    job.wait_for(lambda: pids(job, 0))
    second = start("--standalone", script(SLEEPS))
    assert second.end() == 2
    assert "belongs to a running job" in second.output


def test_a_taken_rendezvous_port_is_replaced(start: Start, script: Script) -> None:
    """The port is derived, so somebody else may have it: the round is replaced."""
    import outlast.launch.plain_job as plain_job

    view = View(1, (Member("a", "n", "127.0.0.1", 1, (Worker(1, 0),)),))
    port = master_port(view, "j")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", port))
        taken.listen()
        assert not plain_job.is_free(port)
    assert plain_job.is_free(port)
