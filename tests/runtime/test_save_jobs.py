"""Jobs that save while they train: at any size, through losses, with stores that fail or hang."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from outlast.checkpoint.source import digest
from outlast.checkpoint.steps import Steps

sys.path.insert(0, str(Path(__file__).parent))
from training_job import TrainingJob, alone

STEPS = 12
SCRIPT = ("--steps", str(STEPS))
SLOW = (*SCRIPT, "--pause", "0.05")
Start = Callable[..., TrainingJob]


def saves(directory: Path | str, every: str = "3") -> tuple[str, ...]:
    return ("--checkpoint-dir", str(directory), "--checkpoint-every", every)


def check_listed(directory: Path) -> list[int]:
    """Everything that is listed is whole; the steps, newest first."""
    steps, found = Steps(str(directory)), []
    for name in steps.names():
        with closing(steps.open(name)) as source:
            for array in source.contents.arrays:
                assert digest(source, array) == source.stored_digest(array)
            found.append(source.contents.step)
    return found


def check_ends(job: TrainingJob, *script: str) -> None:
    assert job.end() == 0, job.output
    assert set(job.digests) == {alone(*SCRIPT, *script)}, job.output
    assert job.steps == sorted(set(job.steps)), "each step once"


def plug_pulled(job: TrainingJob) -> None:
    for pid in job.agents().values():
        os.killpg(pid, signal.SIGKILL)
    job.process.kill()
    job.process.wait()


@pytest.mark.parametrize(
    ("before", "after", "zero", "dtype"),
    [
        ((3, 1), (2, 1), ("2", "0"), ()),
        pytest.param((1, 2), (3, 1), ("1", "2"), ("--dtype", "bfloat16"), marks=pytest.mark.long),
    ],
)
def test_a_job_that_is_gone_goes_on_at_any_size(
    start: Start, tmp_path: Path, before: tuple[int, int], after: tuple[int, int],
    zero: tuple[str, str], dtype: tuple[str, ...],
) -> None:  # fmt: skip
    where = tmp_path / "steps"
    job = start(*before, *SLOW, *dtype, "--zero", zero[0], launch=saves(where))
    job.wait(lambda: job.events("saved"), "a save")
    plug_pulled(job)
    step = check_listed(where)[0]
    job = start(*after, *SCRIPT, *dtype, "--zero", zero[1], launch=saves(where))
    check_ends(job, *dtype)
    assert f"training starts at step {step}" in job.output
    assert check_listed(where)[0] == STEPS, "the last step is saved before the end"


@pytest.mark.long  # test_saving.py has it of ranks that are threads
def test_the_files_are_the_same_whoever_writes_them(start: Start, tmp_path: Path) -> None:
    shapes = [(1, 1, "2"), (1, 2, "1"), (3, 1, "2")]
    jobs = [
        start(nodes, workers, "--steps", "4", "--zero", zero, launch=saves(tmp_path / f"{n}", "4"))
        for n, (nodes, workers, zero) in enumerate(shapes)
    ]
    trees = []
    for n, job in enumerate(jobs):
        assert job.end() == 0, job.output
        directory = tmp_path / f"{n}"
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        trees.append({path.relative_to(directory): path.read_bytes() for path in files
                      if path.name != "manifest.json"})  # fmt: skip
    assert len(trees[0]) > 100
    assert all(tree == trees[0] for tree in trees)


def test_a_rank_dies_while_a_save_hangs(start: Start, tmp_path: Path) -> None:
    mood, where = tmp_path / "mood", tmp_path / "steps"
    job = start(3, 1, *SLOW, "--mood", str(mood), launch=saves(f"moody://{where}"))
    job.wait(lambda: job.events("saved"), "a save")
    mood.write_text("hangs")
    begun = len(job.events("saving"))
    job.wait(lambda: len(job.events("saving")) > begun, "another save")
    listed = check_listed(where)
    job.workers("node2")[0].kill()
    job.wait_for_recovery(2)
    job.wait(lambda: job.steps[-1] >= listed[0] + 6, "training to go on")
    assert check_listed(where) == listed, "none half"
    mood.unlink()
    check_ends(job)
    assert check_listed(where)[0] == STEPS


def test_a_full_store_is_told_and_one_that_hangs_does_not_keep_the_job(
    start: Start, tmp_path: Path
) -> None:
    mood, where = tmp_path / "mood", tmp_path / "steps"
    mood.write_text("full")
    launch = (*saves(f"moody://{where}", "2"), "--heartbeat", "0.1")
    job = start(2, 1, *SLOW, "--mood", str(mood), launch=launch)
    job.wait(lambda: job.events("save_failed"), "a failure")
    mood.unlink()
    job.wait(lambda: job.events("saved"), "a save")
    mood.write_text("hangs")
    check_ends(job)
    assert "No space left" in job.events("save_failed")[0]["cause"]
    assert "is not on storage:" in job.output
    assert job.events("save_failed")[-1]["cause"] == "nothing got on for 5 s"
    assert check_listed(where)[0] == job.events("saved")[-1]["step"] < STEPS


def test_a_store_that_hangs_does_not_keep_a_job_that_is_stopped(
    start: Start, tmp_path: Path
) -> None:
    mood, where = tmp_path / "mood", tmp_path / "steps"
    mood.write_text("hangs")
    launch = (*saves(f"moody://{where}", "2"), "--shutdown-timeout", "3")
    job = start(2, 1, *SLOW, "--mood", str(mood), launch=launch)
    job.wait(lambda: job.events("save_skipped"), "a save that could not begin")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 128 + signal.SIGUSR1, job.output
    assert "not on storage within 3 s" in job.events("stopped")[0]["cause"]
    assert check_listed(where) == []


def test_a_loss_beyond_all_memory_goes_back_to_the_newest_save(
    start: Start, tmp_path: Path
) -> None:
    where = tmp_path / "steps"
    job = start(3, 1, *SLOW, "--parity", "0", launch=saves(where, "2"))
    job.wait(lambda: job.events("saved"), "a save")
    job.kill_node("node2")
    check_ends(job)
    back = [event for event in job.events("recovered") if event["generation"] == 2]
    assert {rung for event in back for rung in event["rungs"]} == {"checkpoint"}
    assert {event["step"] for event in back} <= {event["step"] for event in job.events("saved")}
    assert job.steps == list(range(1, STEPS + 1)), "each step once, also those made again"
    assert check_listed(where)[0] == STEPS
