"""Jobs with spares, of workers that pretend: what a spare may do, and what its trouble may not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from job import FAKE, Job, all_gone

Start = Callable[..., Job]
FLAGS = ("--standalone", "--heartbeat", "0.2", "--shutdown-timeout", "1", "--nnodes", "2")


def fake(seconds: float, flaw: str = "") -> list[str]:
    return [FAKE, str(int(20 * seconds)), str(time.time()), *([flaw] if flaw else [])]


def agents(job: Job) -> dict[str, int]:
    return {event["node"]: event["pid"] for event in job.events("started")}


def seats(job: Job) -> dict[str, bool]:
    """Whether each node of the newest view waits."""
    return {m["node"]: m["spare"] for m in job.events("view")[-1]["members"]}


def generations(job: Job) -> int:
    return max(int(event["generation"]) for event in job.events("view"))


def settled(job: Job, generation: int) -> None:
    """Wait until two workers are connected in this generation, and no newer one is there."""
    job.wait_for(lambda: generations(job) >= generation)
    assert job.connected(2) == generation


def test_a_spare_waits_to_the_end_and_leaves_in_order(start: Start) -> None:
    job = start(*FLAGS, "--spares", "1", "--nproc-per-node", "2", *fake(6))
    job.wait_for_events("spare_ready")
    assert job.connected(4) == 1
    tree = job.tree()
    assert job.end() == 0, job.output
    assert all_gone(tree, 2)
    assert generations(job) == 1
    assert [event["code"] for event in job.events("finished")] == [0, 0, 0]
    assert not job.events("worker_lost"), "they end by themselves"
    assert "2 nodes, 4 workers, 1 spare;" in job.output


def test_a_ready_spare_takes_a_place_in_the_view_that_loses_a_node(start: Start) -> None:
    job = start(*FLAGS, "--spares", "2", *fake(60))
    job.wait_for_events("spare_ready", 2)
    settled(job, 1)
    os.killpg(agents(job)["node0"], signal.SIGKILL)  # the first member: two others are a quorum
    settled(job, 2)
    assert seats(job) == {"node1": False, "node2": False, "node3": True}
    assert [event["node"] for event in job.events("spare_promoted")] == ["node2"]
    os.killpg(agents(job)["node3"], signal.SIGKILL)
    settled(job, 3)
    assert "lost spare node3" in job.output


def test_a_spare_that_is_not_ready_takes_the_place_when_it_is(start: Start) -> None:
    job = start(*FLAGS, "--spares", "1", *fake(60))
    job.wait_for_events("spare_ready")
    settled(job, 1)
    (worker,) = psutil.Process(agents(job)["node2"]).children()
    worker.kill()
    job.wait_for_events("worker_lost")
    os.killpg(agents(job)["node1"], signal.SIGKILL)
    settled(job, 3)  # the second was without both
    assert seats(job) == {"node0": False, "node2": False}


def test_trouble_on_a_spare_is_nobodys(start: Start) -> None:
    """Its worker dies, comes back and raises: no view changes, and the job ends well."""
    job = start(*FLAGS, "--spares", "1", *fake(12, "spare"))
    job.wait_for_events("spare_ready")
    (worker,) = psutil.Process(agents(job)["node2"]).children()
    worker.kill()
    assert job.end() == 0, job.output
    assert job.output.count("boom in the spare") >= 1
    assert generations(job) == 1


def test_a_plain_script_is_restarted_with_the_spare(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "here = pathlib.Path(sys.argv[1]) / f'{os.environ[\"RANK\"]}-{time.time_ns()}'\n"
        "here.write_text(os.environ['WORLD_SIZE'])\n"
        "time.sleep(3)\n"
    )
    started = tmp_path / "started"
    started.mkdir()
    job = start(*FLAGS, "--spares", "1", str(script), str(started))
    job.wait_for(lambda: len(list(started.iterdir())) == 2)
    assert not psutil.Process(agents(job)["node2"]).children(), "it would train"
    os.killpg(agents(job)["node1"], signal.SIGKILL)
    assert job.end() == 0, job.output
    assert [path.read_text() for path in started.iterdir()] == ["2"] * 4
    assert seats(job) == {"node0": False, "node2": False}


def test_racks_are_known_to_all_and_a_forgotten_node_is_refused(
    start: Start, tmp_path: Path
) -> None:
    topology = tmp_path / "racks.toml"
    topology.write_text('[racks]\nleft = ["node0"]\nright = ["node1", "node2"]\n')
    flags = (*FLAGS, "--topology", str(topology))
    job = start(*flags, "--spares", "1", *fake(3))
    assert job.end() == 0, job.output
    for view in job.events("view"):
        racks = {m["node"]: m["rack"] for m in view["members"]}
        assert racks == {"node0": "left", "node1": "right", "node2": "right"}
    refused = start(*flags, "--spares", "2", *fake(3), name="refused")
    assert refused.end() == 2
    assert "node node3 is in no rack" in refused.output
