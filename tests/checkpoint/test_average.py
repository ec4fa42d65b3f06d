"""What is averaged from what, when, and what an averaging makes void."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint import ladder as ladder_module
from outlast.checkpoint.average import (
    WEIGHTS,
    Averager,
    blend,
    cohorts,
    edges,
    extended,
    merged,
    shares,
    superseded,
)
from outlast.checkpoint.decode import decodes
from outlast.checkpoint.ladder import Recovery, Rung
from outlast.checkpoint.records import Averaging, Protection, Report, SlotRecord
from outlast.cluster.errors import StateLost
from outlast.layout.layout import Layout, deal
from outlast.layout.run import Run, intersect, numel, subtract, union
from outlast.layout.space import Space, Tensor, chains

sys.path.insert(0, str(Path(__file__).parent))
from emulated_job import EmulatedJob

BLOCKS, BLOCK, EDGE = 6, 700, 500
NAMES = ["in", *(f"h.{index}" for index in range(BLOCKS)), "out"]
SPACE = Space.of(
    [Tensor(f"{n}.weight", (BLOCK if "h" in n else EDGE,), "float32") for n in NAMES],
    unit_of=lambda name: name.removesuffix(".weight"),
)
STACK = Run.of(EDGE, EDGE + BLOCKS * BLOCK)


# The formula.


def test_weights_are_squared_norms_or_norms() -> None:
    norms = [3.0, 0.0, 4.0]
    assert shares("squared", norms, 0, 2) == pytest.approx([9 / 25, 16 / 25])
    assert shares("plain", norms, 0, 2) == pytest.approx([3 / 7, 4 / 7])
    assert shares("squared", [0.0, 0.0, 0.0], 0, 2) == [0.5, 0.5]
    assert shares("squared", [], 0, 2) == [0.5, 0.5]
    assert shares("squared", [float("inf"), 0.0, 1.0], 0, 2) == [0.5, 0.5]
    assert shares("squared", norms, None, 2) == [0.0, 1.0]
    assert shares("squared", norms, 0, None) == [1.0, 0.0]


@given(st.floats(0, 1e300), st.floats(0, 1e300), st.sampled_from(sorted(WEIGHTS)))
def test_weights_add_up(first: float, second: float, kind: str) -> None:
    shared = shares(kind, [first, second], 0, 1)
    assert sum(shared) == pytest.approx(1.0)
    assert min(shared) >= 0
    assert (shared[0] >= shared[1]) == (first >= second) or shared[0] == shared[1]


@pytest.mark.parametrize(
    "make", [partial(torch.tensor, dtype=torch.float32), partial(np.array, dtype=np.float32)]
)
def test_the_mean_keeps_the_precision_and_a_copy_the_bits(make: Any) -> None:
    x, y = make([0.1, 5.0]), make([0.3, -5.0])
    assert blend([x, y], [0.25, 0.75]).dtype == x.dtype
    assert blend([x, y], [0.25, 0.75]).tolist() == pytest.approx([0.25, -2.5])
    assert blend([x], [1.0]).tolist() == x.tolist()


def test_edges_are_all_that_is_no_block() -> None:
    assert edges(SPACE) == (Run.of(0, EDGE), Run.of(STACK.stop, SPACE.numel))


# Who fills what from whom.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 2), st.sampled_from([16, 64, 100]), st.data())
def test_a_lost_node_leaves_the_neighbours_of_all_it_held(
    nodes: int, per_node: int, grain: int, data: st.DataObject
) -> None:
    ranks = [(node, lane) for lane in range(per_node) for node in range(nodes)]
    before = deal(SPACE, range(len(ranks)), grain)
    gone = data.draw(st.integers(0, nodes - 1))
    left = [rank for rank, (node, _) in enumerate(ranks) if node != gone]
    lost_runs = before.restrict(left).missing(SPACE.numel)
    after = deal(SPACE, left, grain)
    lost = {rank: intersect(intersect(after.runs(rank), lost_runs), [STACK]) for rank in left}
    averager = Averager(SPACE, "squared", after, lost, [1.0] * len(SPACE.units))
    assert not averager.refusal()
    units = {index: SPACE.units[index] for index in chains(SPACE)[0]}
    for rank in left:
        mine = [fill.run for fill in averager.fills if fill.dst == rank]
        assert union((), mine) == union((), lost[rank])
        assert sum(run.numel for run in mine) == numel(lost[rank])
    for fill in averager.fills:
        (place,) = (i for i, u in units.items() if u.start <= fill.run.start < u.stop)
        near = [n for n in (place - 1, place + 1) if n in units]
        assert [side.run.start - fill.run.start for side in fill.sides] == [
            (n - place) * BLOCK for n in near
        ]
        assert [side.weight for side in fill.sides] == [1 / len(near)] * len(near)
        for side in fill.sides:
            assert side.run.numel == fill.run.numel
            assert not subtract([side.run], after.runs(side.src))
            assert not intersect([side.run], lost_runs)


def test_two_adjacent_blocks_are_refused_and_what_is_no_block_too() -> None:
    whole = Layout.of({0: [Run.of(0, SPACE.numel)]})
    both = {0: (Run.of(EDGE + 50, EDGE + 60), Run.of(EDGE + BLOCK + 55, EDGE + BLOCK + 90))}
    averager = Averager(SPACE, "plain", whole, both, [])
    assert "two adjacent blocks are lost at the same place" in averager.refusal()
    apart = {0: (Run.of(EDGE + 50, EDGE + 60), Run.of(EDGE + BLOCK + 60, EDGE + BLOCK + 90))}
    assert not Averager(SPACE, "plain", whole, apart, []).refusal()
    edge = Averager(SPACE, "plain", whole, {0: (Run.of(3, 9),)}, [])
    assert edge.refusal().endswith("next to what is lost (in.weight)")


# The ladder.


def job_of(nodes: int, per_node: int = 1, m: int = 0) -> EmulatedJob:
    """Step 2 is done and protected; embedding and head are kept twice."""
    job = EmulatedJob(nodes, per_node, space=SPACE, protection=Protection(m, 16, edges(SPACE)))
    job.ladder = replace(job.ladder, average="squared")
    job.recover()  # deals the runs as a job that may average does; as if it always had been so
    for memory in job.memories.values():
        memory.halves = [None, None]
    job.commit(1)
    job.protect(1)
    job.commit(2)
    job.protect(2)
    return job


def lost(job: EmulatedJob, *nodes: str) -> EmulatedJob:
    left = job.copy()
    for node in nodes:
        left.lose_node(node)
    return left


def decide(job: EmulatedJob, done: int = 2) -> Recovery:
    """As decided where the survivors have gathered the parameters of step `done`."""
    return job.ladder.decide([replace(report, done=done) for report in job.sources()[2]])


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 1), (3, 1), (5, 1), (3, 2), (4, 2)])
def test_any_one_node_may_go_without_parity(nodes: int, per_node: int) -> None:
    job = job_of(nodes, per_node)
    for node in job.nodes:
        left = lost(job, node)
        gone = [h for h in job.ranks if h not in left.ranks]
        held = union((), [run for holder in gone for run in job.layout.runs(holder)])
        decision = decide(left)
        assert decision.step == 2
        assert decision.fills
        assert decision.lineage[-1].runs == intersect(held, [STACK])
        assert decision.lineage[-1].step == 2
        exact = [output.run for decode in decision.decodes for output in decode.outputs]
        assert union((), exact) == subtract(held, [STACK])  # the edges
        assert set(decision.rungs(job.shape)) >= {Rung.AVERAGE, Rung.PARITY}
        assert decision.layout.is_partition(SPACE.numel)
        assert all(decision == decide(left) for _ in left.ranks)


def test_two_neighbours_are_refused_by_name() -> None:
    job = job_of(4)
    with pytest.raises(StateLost, match=r"step 2: (two adjacent blocks|no block of the same kind)"):
        decide(lost(job, "node1", "node2"))
    with pytest.raises(StateLost, match=r"step 2: [0-9]+ elements are in no memory or parity"):
        decide(lost(job, "node1", "node2"))


def test_without_asking_nothing_is_averaged() -> None:
    job = job_of(4)
    job.ladder = replace(job.ladder, average=None)
    with pytest.raises(StateLost):
        decide(lost(job, "node1"))


def test_exact_rungs_come_first_also_of_the_step_before() -> None:
    job = job_of(4, m=1)
    assert not decide(lost(job, "node1")).fills
    job.commit(3)  # its parity is not there yet
    decision = decide(lost(job, "node1"), done=3)
    assert decision.step == 2
    assert not decision.fills
    assert not decision.lineage


def test_of_two_steps_the_one_that_misses_less_is_averaged() -> None:
    """Half of the ranks have committed step 3; what the others lack of it is no loss of theirs."""
    job = job_of(4)
    job.begin(3, job.ranks[:2])
    job.commit(3, job.ranks[2:])
    decision = decide(lost(job, "node0"))
    assert decision.step == 2
    assert decision.fills
    assert decision.lineage[-1].runs == intersect(job.layout.runs(job.ranks[0]), [STACK])


def test_what_was_done_is_not_undone_to_average_less() -> None:
    """The half of step 1 still holds some of what was lost, from before it was dealt anew."""
    job = job_of(3)
    left = lost(job, "node1")
    gone = intersect(job.layout.runs(job.ranks[1]), [STACK])
    halves = left.memories[left.ranks[0]].halves
    halves[:] = [replace(h, held=union(h.held, gone[:1])) if h and h.step == 1 else h
                 for h in halves]  # fmt: skip
    assert decide(left).step == 2
    assert decide(left, done=-1).step == 1


# What comes after.


def averaged_reports(job: EmulatedJob, ahead: int) -> list[Report]:
    """Step 3 was committed by rank `ahead` alone when a node was lost; step 2 was averaged, and
    then all others committed step 3 anew."""
    job.begin(3, [job.ranks[0]])
    job.commit(3, [job.ranks[ahead]])
    left = lost(job, "node0")
    decision = decide(left)
    assert decision.step == 2
    assert decision.fills
    lineage = decision.lineage
    reports = []
    for report in left.sources()[2]:
        owned = decision.layout.runs(report.holder)
        (old,) = (slot for slot in report.slots if slot.step == 2)
        slots = [replace(old, generation=9, owned=owned, held=owned, lineage=lineage)]
        if report.holder == job.ranks[ahead]:
            (early,) = (slot for slot in report.slots if slot.step == 3)
            slots.append(replace(early, owned=owned, held=owned))
        else:
            slots.append(replace(slots[0], step=3))
        reports.append(replace(report, slots=tuple(slots)))
    return reports


def test_a_step_from_before_an_averaging_is_not_mixed_with_one_from_after() -> None:
    job = job_of(4)
    reports = averaged_reports(job, ahead=2)
    decision = job.ladder.decide(reports)
    assert decision.step == 2
    assert not decision.fills
    assert len(decision.lineage) == 1


def test_planted_mixing_of_two_pasts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module, "superseded", lambda *_: False)
    job = job_of(4)
    assert job.ladder.decide(averaged_reports(job, ahead=2)).step == 3


def test_parity_from_before_an_averaging_takes_what_was_averaged_for_lost() -> None:
    job = job_of(4, m=1)
    left = lost(job, "node2")
    _, _, reports = left.sources()
    held = [
        run for report in reports for slot in report.slots if slot.step == 2 for run in slot.held
    ]
    strange = job.layout.runs(job.ranks[0])[:1]
    missing = {0: subtract([Run.of(0, SPACE.numel)], held)}
    averaging = Averaging(2, 5, "squared", (), (), strange, {})
    plain = decodes(job.shape, reports, 2, missing)
    careful = decodes(job.shape, reports, 2, missing, (averaging,))
    read = lambda made: [p.run for d in made for p in d.inputs]  # noqa: E731
    assert intersect(read(plain), strange)
    assert not intersect(read(careful), strange)
    gained = numel(output.run for d in careful for output in d.outputs)
    assert 0 < gained < numel(output.run for d in plain for output in d.outputs)


# Lineage.


def entry(step: int, generation: int, runs: tuple[Run, ...], steps: int = 0) -> Averaging:
    scalars = {"step": float(steps)} if steps else {}
    return Averaging(step, generation, "squared", ("h.1",), ((0.25, 0.75),), runs, scalars)


def test_lineage_travels_in_records() -> None:
    one = entry(3, 2, (Run.of(4, 9),), 5)
    record = SlotRecord(8, 4, (), (), {}, {"step": 8.0}, [0.5], (1.0, 2.0), (one,))
    assert SlotRecord.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_what_is_averaged_again_leaves_the_older_entry() -> None:
    old, new = entry(3, 2, (Run.of(0, 10),), 2), entry(5, 4, (Run.of(4, 6),))
    assert extended((old,), new)[0].runs == (Run.of(0, 4), Run.of(6, 10))
    assert merged([(old,), extended((old,), new), ()]) == extended((old,), new)
    runs, members = cohorts([Run.of(2, 12)], extended((old,), new))
    assert runs == [Run.of(2, 4), Run.of(4, 6), Run.of(6, 10), Run.of(10, 12)]
    assert members == [1, 2, 1, 0]


def test_the_numbers_of_a_cohort_come_from_whoever_has_them() -> None:
    empty, full = entry(3, 2, (Run.of(0, 4),)), entry(3, 2, (Run.of(0, 4),), 2)
    assert merged([(empty,), (full,)]) == merged([(full,), (empty,)]) == (full,)


def test_only_later_steps_of_earlier_generations_are_void() -> None:
    lineage = (entry(3, 5, (Run.of(0, 4),)),)
    assert superseded(lineage, 4, 4)
    assert not superseded(lineage, 3, 4)
    assert not superseded(lineage, 4, 5)
    assert not superseded((), 4, 4)
