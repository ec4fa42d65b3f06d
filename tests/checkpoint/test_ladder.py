"""The ladder against every loss of up to two nodes or workers, byte by byte."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast.checkpoint import decode as module
from outlast.checkpoint.ladder import Recovery, Rung
from outlast.cluster.errors import StateLost
from outlast.layout.layout import deal, rebalance
from outlast.layout.run import numel

sys.path.insert(0, str(Path(__file__).parent))
from emulated_job import GRAIN, EmulatedJob, small_space, unreadable

SIZES = [(nodes, per_node) for nodes in range(2, 7) for per_node in (1, 2)]
Loss = tuple[str | int, ...]


def losses(job: EmulatedJob, most: int = 2) -> Iterator[Loss]:
    """Every choice of up to `most` nodes (names) and workers (holders), of which some survive."""
    things: list[str | int] = [*job.nodes, *job.ranks]
    for count in range(1, most + 1):
        for loss in itertools.combinations(things, count):
            if after(job, loss).ranks:
                yield loss


def after(job: EmulatedJob, loss: Loss) -> EmulatedJob:
    left = job.copy()
    for thing in loss:
        if isinstance(thing, str):
            left.lose_node(thing)
    for thing in loss:
        if isinstance(thing, int):
            left.lose_worker(thing)
    return left


def healthy(nodes: int, per_node: int, **options: object) -> EmulatedJob:
    """Step 3 is done, the parity of 2 and 3 is complete."""
    job = EmulatedJob(nodes, per_node, **options)  # type: ignore[arg-type]
    job.protect(1)
    for step in (2, 3):
        job.commit(step)
        job.protect(step)
    return job


def check(job: EmulatedJob, most: int = 2) -> tuple[int, int]:
    """Lose everything there is to lose: right bytes or a refusal, and no refusal within the code.

    Returns:
        how many losses were survived and how many refused.
    """
    survived = refused = 0
    for loss in losses(job, most):
        left = after(job, loss)
        try:
            left.recover()
        except StateLost:
            assert unreadable(left, job) > 1, f"{loss} lost the state"
            refused += 1
        else:
            survived += 1
    return survived, refused


@pytest.mark.parametrize(
    ("nodes", "per_node"),
    [
        pytest.param(*size, marks=[pytest.mark.long] if size in ((5, 2), (6, 2)) else [])
        for size in SIZES
    ],
)
def test_every_loss_of_two_ends_with_right_bytes_or_a_refusal(nodes: int, per_node: int) -> None:
    survived, refused = check(healthy(nodes, per_node))
    assert survived >= nodes
    assert refused or nodes == 2  # of two nodes one is left, and one loss is always survived


def interrupted(nodes: int, per_node: int, phase: str, seed: int) -> EmulatedJob:
    """A job in the middle of a step, as far as the commit rule lets ranks be apart."""
    job = healthy(nodes, per_node)
    rng = np.random.default_rng(seed)
    some = [holder for holder in job.ranks if rng.random() < 0.5]
    if phase == "parity":  # step 4 is done, its parity is on some ranks
        job.commit(4)
        job.protect(4, some)
    elif phase == "no parity":
        job.commit(4)
    else:  # step 4 is committed on some ranks, the others are writing it
        job.begin(4, [holder for holder in job.ranks if holder not in some])
        job.commit(4, some)
    return job


@pytest.mark.parametrize("phase", ["parity", "no parity", "update"])
@pytest.mark.parametrize(("nodes", "per_node"), SIZES)
def test_no_instant_of_a_step_is_open_to_a_loss(nodes: int, per_node: int, phase: str) -> None:
    for seed in range(2):
        job = interrupted(nodes, per_node, phase, seed)
        check(job, most=2 if nodes * per_node <= 4 else 1)


@pytest.mark.parametrize(("nodes", "per_node"), [(3, 1), (3, 2), (5, 1)])
def test_an_incomplete_parity_sends_the_job_back_to_the_step_before(
    nodes: int, per_node: int
) -> None:
    job = interrupted(nodes, per_node, "no parity", 0)
    assert job.copy().recover().step == 4
    for node in job.nodes:
        left = after(job, (node,))
        decision = left.recover()
        assert decision.step == 3
        assert decision.decodes
    if per_node > 1:  # the memory of a dead worker needs no parity
        assert after(job, (job.ranks[0],)).recover().step == 4


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("nodes", "per_node"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
def test_old_parity_serves_until_the_new_one_is_whole(
    nodes: int, per_node: int, back: bool
) -> None:
    """A join changes the layout and loses nothing; then a loss comes at any point of the new
    parity. With `back` the job has fallen back a step before that."""
    job = interrupted(nodes, per_node, "update" if back else "no parity", 3)
    if not back:
        job.protect(4)
    job.join(5, "node9")
    step = job.recover().step
    assert job.layout.numel(5)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        left = job.copy()
        left.protect(step, [holder for holder in left.ranks if rng.random() < 0.5])
        check(left, most=1)


def test_parity_of_the_restored_step_survives_its_own_renewal() -> None:
    """Step 4 and half of its parity exist when a worker dies whose memory cannot be read: back
    to 3, whose parity is made again, half way, when the next worker joins and a node is lost."""
    job = interrupted(4, 1, "no parity", 0)
    job.protect(4, job.ranks[:2])
    for holder in job.ranks:  # 4 is lost by a flipped bit: everybody still holds 3
        halves = job.memories[holder].halves
        halves[:] = [half if half and half.step == 3 else None for half in halves]
    job.join(5, "node9")
    assert job.recover().step == 3
    for count in range(1, 5):
        left = job.copy()
        left.protect(3, left.ranks[:count])
        check(left, most=1)


@pytest.mark.parametrize("encoders", [0, 1, 2, 3, 4])
def test_changes_while_parity_is_on_its_way_leave_a_whole_one(encoders: int) -> None:
    """Parity of 4 is half made when a worker joins, half made again when the next one joins, and
    half made once more when a node is lost: the parity of 3 is still whole."""
    job = interrupted(4, 1, "no parity", 0)
    job.protect(4, job.ranks[:encoders])
    for holder in (5, 6):
        job.join(holder, f"node{holder}")
        assert job.recover().step == 4
        job.protect(4, job.ranks[: max(0, encoders - 1)])
    check(job, most=1)


@pytest.mark.parametrize(("nodes", "per_node"), [(3, 1), (3, 2), (4, 1)])
def test_after_one_loss_the_next_is_survived_once_parity_is_whole(
    nodes: int, per_node: int
) -> None:
    for first in losses(healthy(nodes, per_node), most=1):
        job = after(healthy(nodes, per_node), first)
        step = job.recover().step
        exposed = job.copy()
        exposed.protect(step, exposed.ranks[:1])
        for second in losses(exposed, most=1):
            try:
                after(exposed, second).recover()  # right bytes, or ...
            except StateLost:
                continue
        job.protect(step)
        job.memories = {h: m for h, m in job.memories.items() if h in job.ranks}
        check(job, most=1)


@pytest.mark.parametrize("replicated", [False, True])
def test_joiners_take_their_share(replicated: bool) -> None:
    job = healthy(2, 2, replicated=replicated)
    job.join(3, "node7")
    job.join(4, "node7")
    decision = job.recover()
    assert {move.rung for move in decision.transfers} == {Rung.HEAL}
    assert {move.dst for move in decision.transfers} == {4, 5}
    if not replicated:
        shares = [job.layout.numel(holder) for holder in job.ranks]
        assert max(shares) - min(shares) <= 2 * GRAIN
    assert not decision.decodes


def test_a_joiner_comes_with_the_loss() -> None:
    for loss in losses(healthy(3, 2), most=1):
        job = after(healthy(3, 2), loss)
        job.join(3, "node1")
        job.recover()
        assert job.layout.numel(3)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 1), (3, 2), (6, 1)])
def test_replicas_survive_all_but_one(nodes: int, per_node: int) -> None:
    job = healthy(nodes, per_node, replicated=True)
    for survivor in job.nodes:
        left = after(job, tuple(node for node in job.nodes if node != survivor))
        decision = left.recover()
        assert decision.step == 3
        assert not decision.transfers
    left = after(interrupted_replicas(nodes, per_node), ())
    assert left.recover().step == 4


def interrupted_replicas(nodes: int, per_node: int) -> EmulatedJob:
    job = healthy(nodes, per_node, replicated=True)
    job.begin(4, job.ranks[1:])
    job.commit(4, job.ranks[:1])
    return job


def test_more_workers_than_grains() -> None:
    job = healthy(4, 2, space=small_space((100, 70)))
    assert not all(job.layout.numel(holder) for holder in job.ranks)
    check(job)


def test_memory_of_a_dead_worker_is_preferred_to_parity() -> None:
    job = healthy(3, 2)
    victim = job.ranks[1]
    left = after(job, (victim,))
    decision = left.recover()
    assert not decision.decodes
    moved = [move for move in decision.transfers if move.rung is Rung.MEMORY]
    assert sum(move.run.numel for move in moved) == numel(job.layout.runs(victim))
    elements = sum(move.run.numel for move in decision.transfers)
    assert sum(decision.rungs(job.shape).values()) == elements * job.shape.element_bytes


def test_parity_gives_exactly_the_lost_share() -> None:
    job = healthy(4, 1)
    lost = job.layout.numel(job.ranks[2])
    decision = after(job, ("node2",)).recover()
    assert decision.rungs(job.shape)["parity"] == lost * job.shape.element_bytes


def torn(job: EmulatedJob, count: int) -> EmulatedJob:
    for holder in job.ranks[:count]:
        job.tear(holder)
    return job


def test_flipped_bits_of_one_worker_come_back_and_of_two_are_refused() -> None:
    decision = torn(healthy(4, 1), 1).recover()
    assert decision.step == 3
    assert decision.decodes
    with pytest.raises(StateLost):
        torn(healthy(4, 1), 2).recover()


def test_nothing_lost_nothing_moved() -> None:
    decision = healthy(3, 1, space=small_space((960, 960))).recover()
    assert (decision.step, decision.transfers, decision.decodes) == (3, (), ())


def test_a_new_job_is_fresh_and_a_hopeless_one_is_refused() -> None:
    job = EmulatedJob(2, 1)
    job.memories.clear()
    job.ranks.clear()
    for holder in (9, 8):
        job.join(holder, f"node{holder}")
    reports = job.sources()[2]
    decision = job.ladder.decide(reports)
    assert decision.fresh
    assert decision.layout == deal(job.space, [9, 8], GRAIN)
    left = after(healthy(4, 1), ("node1", "node2"))
    with pytest.raises(StateLost, match=r"step 3: \d+ elements are in no memory or parity \(block"):
        left.recover()


def test_every_rank_decides_the_same() -> None:
    job = after(interrupted(3, 2, "parity", 1), ("node1", interrupted(3, 2, "parity", 1).ranks[0]))
    decisions: list[Recovery | str] = []
    for _ in job.ranks:
        try:
            decisions.append(job.ladder.decide(job.sources()[2]))
        except StateLost as refusal:
            decisions.append(str(refusal))
    assert all(decision == decisions[0] for decision in decisions)


# The checker must go red.


def test_planted_wrong_stripe_map_gives_wrong_bytes() -> None:
    job = EmulatedJob(4, 1)
    other = rebalance(job.layout, job.ranks[:3], job.space, GRAIN)
    other = rebalance(other, job.ranks, job.space, GRAIN)
    assert other != job.layout
    job.protect(1, flaw=other)
    with pytest.raises(AssertionError, match="wrong bytes"):
        check(job, most=1)


def test_planted_decode_of_two_lost_units_gives_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where two units of a stripe are lost, each is rebuilt as if the other were zeros."""
    add = module._Decoding._add

    def flawed(self: Any, stripe: Any, inputs: Any, outputs: Any, gaps: Any, rows: Any) -> None:
        for lost in {unit for _, _, unit in gaps}:
            mine = [out for out in outputs if out.unit == lost]
            add(self, stripe, inputs, mine, [gap for gap in gaps if gap[2] == lost], rows)

    monkeypatch.setattr(module._Decoding, "_add", flawed)
    with pytest.raises(AssertionError, match="wrong bytes"):
        torn(healthy(4, 1), 2).recover()


def test_planted_flipped_state_is_noticed() -> None:
    job = healthy(3, 1)
    half = job.memories[job.ranks[0]].halves[0]
    assert half is not None
    half.data["exp_avg"][2 * half.held[0].start] ^= 1
    with pytest.raises(AssertionError, match="wrong bytes"):
        check(job)
