"""Ranks that live and must go, for wrong gradients and endless loops; slow ones, which may stay."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_job import ENVIRONMENT, TrainingJob, alone

from outlast.cluster.timing import Timing
from outlast.launch.drill.trap import Facts, Trap, Traps

STEPS = 7
SCRIPT = ("--pause", "0.05", "--spot-check", "1")


Run = Callable[..., TrainingJob]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a job in which leaves with the given facts are poisoned `how`, as long as it lasts."""
    with ExitStack() as stack:

        def start(
            nodes: int, per_node: int, *script: str, launch: tuple[str, ...] = (),
            how: str = "", bad: Callable[[Facts], bool] = lambda facts: False,
        ) -> TrainingJob:  # fmt: skip
            traps = stack.enter_context(Traps(tmp_path / "drill", frozenset({"leaf"})))
            traps.set(Trap("leaf", bad, {"poison": how}, lasting=True))
            shape = ["--standalone", "--nnodes", str(nodes), "--nproc-per-node", str(per_node)]
            environment = {**ENVIRONMENT, **traps.environment}
            job = TrainingJob(tmp_path / "job", [*shape, *launch], list(script), environment)
            stack.callback(job.stop)
            return job

        yield start


def on_node1(steps: range = range(3, 99)) -> Callable[[Facts], bool]:
    return lambda facts: facts["node"] == "node1" and facts["step"] in steps


def check_same(job: TrainingJob, ranks: int) -> None:
    assert job.end() == 0, job.output
    assert job.digests == [alone()] * ranks
    assert job.steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("how", ["nan", "scale", "flip"])
def test_a_rank_that_computes_wrong_is_evicted_and_nothing_of_it_stays(run: Run, how: str) -> None:
    job = run(3, 1, *SCRIPT, how=how, bad=on_node1())
    check_same(job, 2)
    told = job.events("poisoned")
    assert {(e["peer_node"], e["action"]) for e in told} == {("node1", "evicted")}
    assert {e["how"] for e in told} == {"not finite" if how == "nan" else "differs"}
    (lost,) = job.events("worker_lost")
    assert (lost["node"], lost["cause"]) == ("node1", "computed a wrong gradient")
    assert "node1 (rank 1) computed a gradient that is" in job.output
    assert max(e["generation"] for e in job.events("view")) == 2  # its place stays empty


def test_planted_without_a_check_a_flipped_sign_becomes_the_model(run: Run) -> None:
    job = run(3, 1, how="flip", bad=on_node1(range(3, 4)))
    assert job.end() == 0, job.output
    assert set(job.digests) != {alone()}
    assert not job.events("poisoned")


def test_where_nobody_is_evicted_others_compute_the_leaf(run: Run) -> None:
    launch = ("--poison", "report")
    job = run(3, 1, *SCRIPT, launch=launch, how="nan", bad=on_node1(range(2, 5)))
    check_same(job, 3)
    assert {e["action"] for e in job.events("poisoned")} == {"replaced"}
    assert not job.events("worker_lost")


def test_a_rank_whose_state_nobody_else_has_is_not_evicted(run: Run) -> None:
    job = run(2, 1, *SCRIPT, "--parity", "0", how="nan", bad=on_node1(range(3, 4)))
    check_same(job, 2)
    assert {e["action"] for e in job.events("poisoned")} == {"replaced"}


def test_two_ranks_of_one_node_are_told_apart(run: Run) -> None:
    holders: list[int] = []

    def bad(facts: Facts) -> bool:
        if facts["step"] == 3 and facts["node"] == "node0" and not holders:
            holders.append(facts["holder"])
        return facts["holder"] in holders

    job = run(2, 2, *SCRIPT, how="scale", bad=bad)
    check_same(job, 3)
    assert {e["holder"] for e in job.events("worker_lost")} == set(holders)


def test_a_model_that_diverges_says_so_and_blames_nobody(run: Run) -> None:
    job = run(3, 1, *SCRIPT, how="nan", bad=lambda facts: facts["step"] == 3)
    assert job.end() == 1
    assert "Diverged: step 3, leaf" in job.output
    assert "not finite on every rank that computed it" in job.output
    assert job.events("diverged")
    assert not job.events("poisoned")
    assert job.steps == [1, 2, 3]


# Hung.

BEAT_S = 0.3
FAST = ("--heartbeat", str(BEAT_S))


@pytest.mark.parametrize(
    "flaw",
    ["endless loop", "endless call", pytest.param("never comes back", marks=pytest.mark.long)],
)
def test_a_rank_that_does_not_come_is_evicted(run: Run, flaw: str) -> None:
    job = run(3, 1, *SCRIPT, "--flaw", flaw, launch=FAST)
    check_same(job, 2)
    (lost,) = job.events("worker_lost")
    assert lost["node"] == "node1"
    assert "hung: others have waited" in lost["cause"]
    timing = Timing(heartbeat_s=BEAT_S)
    assert float(lost["cause"].split()[-2]) < timing.collective_s


def test_a_slow_rank_stays_and_is_told_of(run: Run) -> None:
    job = run(3, 1, "--flaw", "slow", "--pause", "0.1", "--steps", "14")
    assert job.end() == 0, job.output
    assert job.digests == [alone("--steps", "14")] * 3
    (told,) = job.events("slow_rank")
    assert told["peer_node"] == "node1"
    assert told["ratio"] > 1.5
    assert not job.events("rebalanced")
    assert not job.events("worker_lost")


def test_leaves_move_away_from_a_slow_rank_and_change_no_bit(run: Run) -> None:
    script = ("--flaw", "slow", "--pause", "0.1", "--steps", "14")
    job = run(3, 1, *script, launch=("--rebalance",))
    assert job.end() == 0, job.output
    assert job.digests == [alone("--steps", "14")] * 3
    weights = job.events("rebalanced")[-1]["weights"]
    assert weights[1] < 0.7 * min(weights[0], weights[2])
