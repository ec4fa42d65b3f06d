"""Jobs that are asked to stop: the state is on storage, and a later start goes on, same bits."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_job import TrainingJob, alone

STEPS = 12
SCRIPT = ("--steps", str(STEPS))
SLOW = (*SCRIPT, "--pause", "0.06")
Start = Callable[..., TrainingJob]


def checkpoints(directory: Path) -> tuple[str, ...]:
    return ("--checkpoint-dir", str(directory))


def stopped(job: TrainingJob, number: int, step: int) -> int:
    """Stop the job when it has come to `step`; returns the step that it stored."""
    job.wait_for_step(step)
    job.process.send_signal(number)
    assert job.end() == 128 + number, job.output
    assert job.steps[-1] == stored(job), "what is stored was logged"
    return stored(job)


def stored(job: TrainingJob) -> int:
    (line,) = [line for line in job.output.splitlines() if "is in" in line]
    return int(line.split("step ")[1].split()[0])


def check_goes_on(job: TrainingJob, step: int, *script: str) -> None:
    assert job.end() == 0, job.output
    assert f"training starts at step {step}" in job.output
    assert set(job.digests) == {alone(*SCRIPT, *script)}, job.output
    assert job.steps == list(range(step + 1, STEPS + 1)), "each step once, none before"


@pytest.mark.parametrize(
    ("number", "before", "after", "zero"),
    [
        (signal.SIGUSR1, (3, 1), (1, 2), ("2", "0")),
        (signal.SIGTERM, (1, 2), (4, 1), ("0", "2")),
        (signal.SIGINT, (2, 1), (3, 1), ("1", "2")),
    ],
)
def test_a_stopped_job_goes_on_at_any_size(
    start: Start, tmp_path: Path, number: int, before: tuple[int, int], after: tuple[int, int],
    zero: tuple[str, str],
) -> None:  # fmt: skip
    where = checkpoints(tmp_path / "steps")
    step = stopped(start(*before, *SLOW, "--zero", zero[0], launch=where), number, 3)
    assert 3 <= step < STEPS
    check_goes_on(start(*after, *SCRIPT, "--zero", zero[1], launch=where), step)


def test_a_master_in_full_precision_comes_back(start: Start, tmp_path: Path) -> None:
    where, bf16 = checkpoints(tmp_path / "steps"), ("--dtype", "bfloat16")
    step = stopped(start(2, 1, *SLOW, *bf16, launch=where), signal.SIGUSR1, 3)
    check_goes_on(start(3, 1, *SCRIPT, *bf16, launch=where), step, *bf16)


def test_a_node_that_dies_while_the_job_stops_costs_nothing(start: Start, tmp_path: Path) -> None:
    where = checkpoints(tmp_path / "steps")
    job = start(4, 1, *SLOW, launch=where)
    job.wait_for_step(3)
    job.process.send_signal(signal.SIGUSR1)
    job.kill_node("node2")
    assert job.end() == 128 + signal.SIGUSR1, job.output
    step = stored(job)
    assert step in (job.steps[-1] - 1, job.steps[-1]), "a loss may have to make a step again"
    check_goes_on(start(2, 1, *SCRIPT, launch=where), step)


def test_one_node_that_has_to_leave_does_not_stop_the_job(start: Start, tmp_path: Path) -> None:
    job = start(3, 1, *SLOW, launch=checkpoints(tmp_path / "steps"))
    job.wait_for_step(3)
    os.kill(job.agents()["node1"], signal.SIGTERM)
    assert job.end() == 0, job.output
    assert set(job.digests) == {alone(*SCRIPT)}
    assert "lost node1" in job.output
    assert not (tmp_path / "steps").exists()


def test_a_damaged_step_gives_way_to_the_one_before(start: Start, tmp_path: Path) -> None:
    directory = tmp_path / "steps"
    where = checkpoints(directory)
    first = stopped(start(2, 1, *SLOW, launch=where), signal.SIGUSR1, 2)
    second = stopped(start(2, 1, *SLOW, launch=where), signal.SIGUSR1, first + 2)
    flip(directory / f"step-{second:012}" / "exp_avg_sq" / "position" / "c.0.0")
    check_goes_on(start(3, 1, *SCRIPT, launch=where), first)
    flip(directory / f"step-{first:012}" / "param" / "embedding.weight" / "c.0.0")
    job = start(3, 1, *SCRIPT, launch=where)
    assert job.end() == 1, "a run never starts over by itself where it has been further"
    assert "is not what was written" in job.output
    assert "remove it to start over" in job.output


def test_storage_that_is_none_is_refused_before_anything_is_trained(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    job = start(2, 1, *SLOW, launch=checkpoints(tmp_path / "file"))
    assert job.end() == 1, job.output
    assert "cannot be listed" in job.output
    assert "is it the right --checkpoint-dir?" in job.output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
