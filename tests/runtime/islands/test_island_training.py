"""Whole islands: the bits of the reference at any size and through losses; who is lost is not
waited for, and comes back with the state of another."""

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import island_script as script
from island_job import Island, IslandsJob, one_thread, reference

from outlast.runtime.islands.settings import CODECS, RULES

STEPS = 24
# Whoever is out of reach is not waited for: a patience in which no test ends.
BASE = {"every": 6, "fragment": 2, "patience_s": 1000.0}
Start = Callable[..., IslandsJob]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start two islands of so many nodes and workers on each."""
    jobs: list[IslandsJob] = []

    def run(
        nodes: int, workers: int, settings: dict[str, Any], *options: str,
        launch: tuple[str, ...] = (),
    ) -> IslandsJob:  # fmt: skip
        directory, shape = tmp_path / f"job{len(jobs)}", (nodes, workers)
        jobs.append(IslandsJob(directory, 2, shape, BASE | settings, options, launch))
        return jobs[-1]

    yield run
    for job in jobs:
        job.stop()


def check_same(job: IslandsJob, settings: dict[str, Any]) -> None:
    """It ended well with the bits of the reference, each step logged once."""
    assert job.end() == 0, job.output
    assert job.ends == reference(json.dumps(BASE | settings)), job.output
    for island in job.islands:
        assert island.steps == list(range(1, STEPS + 1))


# The same bits.

DILOCO = {"fragment": 9, "delay": 0, "codec": "none"}
MIXED = {"delay": {"0": 1, "1": 3}, "mixing": 0.5}
GUARDED = {"codec": "topk", "rule": "edit", "delay": 2}


@pytest.mark.parametrize(
    ("nodes", "workers", "settings"), [(1, 1, DILOCO), (2, 1, MIXED), (1, 3, GUARDED)]
)
def test_islands_of_any_size_have_the_bits_of_the_reference(
    start: Start, nodes: int, workers: int, settings: dict[str, Any]
) -> None:
    check_same(start(nodes, workers, settings), settings)


@pytest.mark.long
@pytest.mark.parametrize(
    ("codec", "rule", "workers"),
    [(*pair, 1 + at % 3) for at, pair in enumerate(itertools.product(CODECS, RULES))],
)
def test_every_codec_and_rule(start: Start, codec: str, rule: str, workers: int) -> None:
    settings = {"codec": codec, "rule": rule}
    check_same(start(1, workers, settings), settings)


def alone(settings: dict[str, Any] | None, steps: int = 12) -> torch.Tensor:
    """Parameters of the script in this process, which no agent started."""
    with one_thread():
        text = json.dumps(settings) if settings else ""
        run = script.main("--islands", text, "--steps", str(steps))
    return run.training.model.param


def test_who_never_listens_trains_alone() -> None:
    deaf = {"every": 4, "fragment": 2, "mixing": 1.0}
    assert torch.equal(alone(deaf), alone(None))


def test_one_island_that_exchanges_every_step_at_full_rate_is_its_optimizer() -> None:
    settings = {
        "every": 1, "fragment": 9, "delay": 0, "codec": "none", "outer_lr": 1.0,
        "outer_momentum": 0.0,
    }  # fmt: skip
    # Not bit for bit: outer - (outer - param) is rounded twice.
    torch.testing.assert_close(alone(settings), alone(None), rtol=1e-5, atol=1e-6)


# Losses inside an island.

SLOW = ("--pause", "0.03")
LATE = {"delay": 3}


def test_a_worker_killed_in_one_island_changes_nothing(start: Start) -> None:
    job = start(1, 2, {}, *SLOW)
    job.islands[1].wait_for_step(8)
    job.islands[1].workers("node0")[0].kill()
    check_same(job, {})
    assert job.islands[1].events("worker_lost")
    assert not job.islands[0].events("worker_lost")


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_node_killed_between_sending_and_applying_changes_nothing(
    start: Start, number: int
) -> None:
    job = start(2, 1, LATE, *SLOW)
    island = job.islands[number]
    island.wait_for_step(12)  # fragment 0 is sent after it, and applied after step 15
    island.kill_node("node1")
    check_same(job, LATE)
    assert [e for e in island.events("recovered") if 12 <= e["step"] <= 15 and e["lost"]]


@pytest.mark.long
def test_losses_of_both_islands_change_nothing(start: Start) -> None:
    job = start(2, 2, LATE, *SLOW)
    for number, step in ((0, 6), (1, 9), (0, 12), (1, 14)):
        job.islands[number].wait_for_step(step)
        job.islands[number].workers(f"node{step % 2}")[-1].kill()
    check_same(job, LATE)


# Losses of islands.


def check_return(job: IslandsJob, lost: Island, others: Island, end: Path) -> None:
    """The other island goes on at once and alone, serves who comes back, and goes on with it."""
    at = max(others.steps)
    others.wait_for_step(at + 8)
    job.wait(lambda: others.events("island_served"), "a state that is handed over")
    served = others.events("island_served")[0]["step"]
    job.wait(lambda: [e for e in others.rounds if e["sent"] > served and len(e["islands"]) == 2],
             "a round of both")  # fmt: skip
    end.touch()
    assert job.end() == 0, job.output
    without = [e for e in others.rounds if e["islands"] == [others.number]]
    assert [e for e in without if at < e["sent"] < served]
    assert not others.events("island_missed"), "nobody was waited for"
    assert f"[island {lost.number}] training starts at step {served}" in job.output
    assert {island.number for island in job.islands if job.ends[island.number]} == {0, 1}
    assert len(job.outers) == 1, job.output


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_island_that_is_lost_comes_back_with_the_state_of_the_other(
    start: Start, tmp_path: Path, number: int
) -> None:
    end = tmp_path / "end"
    job = start(1, 1, {}, "--steps", "300", "--pause", "0.05", "--until", str(end))
    job.islands[1].wait_for_step(8)
    job.islands[number].kill()
    check_return(job, job.islands[number], job.islands[1 - number], end)


@pytest.mark.long
def test_an_island_that_stands_still_for_long_costs_the_other_its_contributions_only(
    start: Start, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    settings = {"patience_s": 2.0}
    job = start(1, 2, settings, "--steps", "400", "--pause", "0.05", "--until", str(end))
    frozen, other = job.islands[1], job.islands[0]
    frozen.wait_for_step(8)
    stopped = frozen.processes()
    for process in stopped:
        process.suspend()
    at = max(other.steps)
    job.wait(lambda: len([e for e in other.rounds if e["islands"] == [0]]) > 4, "rounds of one")
    assert max(other.steps) > at + 8
    for process in stopped:
        process.resume()
    since = max(other.steps)
    job.wait(lambda: [e for e in other.rounds if e["sent"] > since and len(e["islands"]) == 2],
             "a round of both")  # fmt: skip
    end.touch()
    assert job.end() == 0, job.output
    assert len(job.outers) == 1, job.output


# Islands that end and are started again.


def saves(directory: Path) -> tuple[str, ...]:
    return ("--checkpoint-dir", str(directory), "--checkpoint-every", "10")


def test_islands_that_are_all_gone_go_on_from_storage_with_the_same_bits(
    start: Start, tmp_path: Path
) -> None:
    job = start(1, 1, LATE, "--pause", "0.05", launch=saves(tmp_path / "saves"))
    for island in job.islands:
        job.wait(lambda island=island: island.events("saved"), "a save")
    assert max(max(island.steps) for island in job.islands) < 20
    job.kill()
    job = start(1, 2, LATE, launch=saves(tmp_path / "saves"))
    assert job.end() == 0, job.output
    assert job.output.count("training starts at step 10") == 2
    assert job.ends == reference(json.dumps(BASE | LATE)), job.output


@pytest.mark.long
def test_islands_that_are_told_to_stop_go_on_together(start: Start, tmp_path: Path) -> None:
    script = ("--steps", "60", "--pause", "0.02")
    job = start(1, 1, LATE, *script, launch=saves(tmp_path / "saves"))
    job.islands[0].wait_for_step(14)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143
    job = start(2, 1, LATE, *script, launch=saves(tmp_path / "saves"))
    assert job.end() == 0, job.output
    assert "training starts at step 0" not in job.output
    assert len(job.outers) == 1, job.output
    for island in job.islands:  # also if they were stopped on either side of a round
        assert island.rounds[-1]["islands"] == [0, 1]
