"""Whole jobs: the same digest on any number of ranks, through losses, and loud misuse."""

import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_job import TrainingJob, alone

STEPS = 7
BF16 = ("--dtype", "bfloat16")
Start = Callable[..., TrainingJob]


def check_same(job: TrainingJob, ranks: int, *script: str) -> None:
    """The job ended well on at least so many ranks, with the bits of one process and each step
    logged once; a killed worker may have come back in time or not."""
    assert job.end() == 0, job.output
    assert len(job.digests) >= ranks, job.output
    assert set(job.digests) == {alone(*script)}, job.output
    assert job.steps == list(range(1, STEPS + 1))
    assert "terminate called" not in job.output, "a thread of gloo outlived the interpreter"


@pytest.mark.parametrize(
    ("nodes", "per_node", "script"),
    [
        (1, 2, ("--zero", "0")),
        (3, 1, ("--zero", "1")),
        (5, 1, ("--zero", "2")),
        (2, 1, ("--zero", "2", *BF16)),
        (1, 3, ("--zero", "0", *BF16)),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits(
    start: Start, nodes: int, per_node: int, script: tuple[str, ...]
) -> None:
    one = BF16 if BF16[0] in script else ()
    check_same(start(nodes, per_node, *script), nodes * per_node, *one)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "zero", "dtype"),
    list(itertools.product([(1, 1), (2, 1), (3, 1), (5, 1), (2, 2)], "012", [(), BF16])),
)
def test_the_whole_grid(
    start: Start, shape: tuple[int, int], zero: str, dtype: tuple[str, ...]
) -> None:
    check_same(start(*shape, "--zero", zero, *dtype), shape[0] * shape[1], *dtype)


@pytest.mark.parametrize("flaw", ["seed by rank", "data by rank"])
def test_planted_dependence_on_the_rank_changes_the_bits(start: Start, flaw: str) -> None:
    job = start(1, 2, "--flaw", flaw, "--steps", "2")
    assert job.end() == 0, job.output
    assert len(set(job.digests)) == 1
    assert job.digests[0] != alone("--steps", "2")


# Losses.

SLOW = ("--pause", "0.05")


def test_a_killed_worker_changes_nothing(start: Start) -> None:
    job = start(2, 2, *SLOW)
    job.wait_for_step(2)
    job.workers("node1")[0].kill()
    check_same(job, 3)
    (lost,) = {entry["holder"] for e in job.events("recovered") for entry in e["lost"]}
    assert lost == job.events("worker_lost")[0]["holder"]


def test_a_killed_node_and_then_another_change_nothing(start: Start) -> None:
    job = start(4, 1, *SLOW)
    job.wait_for_step(2)
    job.kill_node("node2")
    job.wait_for_recovery(2)
    job.wait_for_step(max(job.steps) + 2)
    job.kill_node("node1")
    check_same(job, 2)
    rungs = [e["rungs"] for e in job.events("recovered") if e["generation"] > 1]
    assert any("parity" in rung for rung in rungs)


def test_two_nodes_at_once_change_nothing_under_two_rows(start: Start) -> None:
    job = start(5, 1, *SLOW, "--parity", "2")
    job.wait_for_step(3)
    job.kill_node("node3")
    job.kill_node("node4")
    check_same(job, 3)
    rungs = [e["rungs"] for e in job.events("recovered") if e["generation"] > 1]
    assert any("parity" in rung for rung in rungs)


def test_two_workers_in_a_row_and_their_return_change_nothing(start: Start) -> None:
    job = start(2, 2, *SLOW, launch=("--max-restarts", "2"))
    job.wait_for_step(1)
    job.workers("node0")[1].kill()
    job.wait_for_recovery(2)
    job.workers("node1")[0].kill()
    assert job.end() == 0, job.output
    assert set(job.digests) == {alone()}
    assert job.steps == list(range(1, STEPS + 1))


def test_a_returned_worker_takes_part(start: Start) -> None:
    """The step that the newcomer joins at is made on all ranks; so long the others train on."""
    job = start(2, 1, "--pause", "0.1", "--steps", "40", launch=("--max-restarts", "1"))
    job.wait_for_step(1)
    job.workers("node1")[0].kill()
    job.wait(lambda: [e for e in job.events("recovered") if e["joined"] and e["generation"] > 1],
             "the joiner")  # fmt: skip
    at = max(job.steps)
    job.wait_for_step(at + 2)
    last = job.events("recovered")[-1]
    assert job.events("view")[-1]["generation"] == last["generation"]
    assert job.end() == 0, job.output
    assert job.digests == [alone("--steps", "40")] * 2
    assert job.steps == list(range(1, 41))


def test_a_stopped_worker_is_evicted(start: Start) -> None:
    job = start(2, 1, *SLOW)
    job.wait_for_step(2)
    victim = job.workers("node1")[0]
    victim.send_signal(signal.SIGSTOP)
    check_same(job, 1)
    assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
    assert job.events("worker_lost")[0]["pid"] == victim.pid


# Misuse.


@pytest.mark.parametrize(
    ("flaw", "nodes", "message"),
    [
        ("model by process", 2, "start from different models"),
        ("lamb", 1, "Lamb is not element-wise"),
        ("six leaves", 1, "leaves=6: use a power of two"),
        ("prepare twice", 1, "prepare() was called twice"),
        ("break", 2, "exists once the step is committed"),
    ],
)
def test_misuse_ends_the_job_with_its_reason(
    start: Start, flaw: str, nodes: int, message: str
) -> None:
    job = start(nodes, 1, "--flaw", flaw)
    assert job.end() == 1, job.output
    assert message in job.output
    assert "Misuse" in job.output
    assert not job.digests
