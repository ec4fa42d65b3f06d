"""Every pattern of lost nodes, up to one more than the code can spare: right bytes or a refusal.

What must survive is said twice: by the promise (any m nodes) and, beyond it, by counting the lost
units of every byte of every stripe, without the ladder."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint import batch as batch_module
from outlast.checkpoint import decode as decode_module
from outlast.checkpoint.batch import batches
from outlast.checkpoint.decode import Decode, Row, windows
from outlast.checkpoint.ladder import Recovery, _Attempt
from outlast.checkpoint.protection import layout_stripes, record_stripes
from outlast.checkpoint.records import Protection, Report
from outlast.checkpoint.stream import stream_parts
from outlast.cluster.errors import StateLost
from outlast.layout.layout import Layout
from outlast.layout.run import Run, intersect, numel, subtract

sys.path.insert(0, str(Path(__file__).parent))
import emulated_job
from emulated_job import ROLES, ROUND, WIDTH, WINDOW, EmulatedJob, small_space

SMALL = small_space((320, 350, 350, 290))
# (nodes, workers of a node, m, largest group)
CASES: list[Any] = [
    *((nodes, 1, m, 16) for m in (1, 2, 3) for nodes in range(2, 11)),
    *((nodes, 1, m, 4) for m in (1, 2, 3) for nodes in (5, 8)),
    (4, 2, 2, 16), (6, 2, 2, 3), (5, 3, 3, 4), (3, 2, 3, 16),
    *(
        pytest.param(nodes, 1, m, group, marks=pytest.mark.long)
        for nodes in (9, 10) for m, group in ((1, 3), (2, 3), (2, 5), (3, 4), (3, 5))
    ),
]  # fmt: skip


def healthy(nodes: int, per_node: int, m: int, group: int = 16) -> EmulatedJob:
    """Steps 1 and 2 are done, the last one is protected."""
    job = EmulatedJob(nodes, per_node, space=SMALL, protection=Protection(m, group))
    job.commit(2)
    job.protect(2)
    return job


def without(job: EmulatedJob, nodes: Iterable[str]) -> EmulatedJob:
    left = job.copy()
    for node in nodes:
        left.lose_node(node)
    return left


def decodable(job: EmulatedJob, reports: list[Report], step: int) -> bool:
    """Whether the only parity of `step` gives back every byte that no slot of it holds."""
    held = {role.name: np.zeros(job.space.numel, bool) for role in ROLES}
    for slot in (slot for report in reports for slot in report.slots if slot.step == step):
        for mask in held.values():
            for run in slot.held:
                mask[run.start : run.stop] = True
    records = [s.record for r in reports for s in r.parity if s.record.step == step]
    rows = {(unit.stripe, unit.row) for record in records for unit in record.units}
    for stripe in record_stripes(job.shape, records[0]) if records else ():
        layout = Layout.from_json(records[0].layout)
        lost = np.zeros((len(stripe.data), stripe.length), bool)
        for unit, piece in enumerate(stripe.data):
            at = 0
            for role, run in stream_parts(
                job.shape, layout.runs(piece.holder), piece.start, piece.stop
            ):
                gone = np.repeat(~held[role][run.start : run.stop], WIDTH[role])
                lost[unit, at : at + gone.size] = gone
                at += gone.size
                left = sum((stripe.index, row) in rows for row in range(len(stripe.parity)))
        good = lost.sum(0) <= left
        for unit, piece in enumerate(stripe.data):  # noqa: B007
            at = 0
            for role, run in stream_parts(
                job.shape, layout.runs(piece.holder), piece.start, piece.stop
            ):
                size = run.numel * WIDTH[role]
                held[role][run.start : run.stop] |= good[at : at + size : WIDTH[role]]
                at += size
    return all(mask.all() for mask in held.values())


def check(job: EmulatedJob, lost: tuple[str, ...], m: int) -> bool:
    """Lose nodes; AssertionError unless right bytes come back exactly when they can."""
    left = without(job, lost)
    possible = len(lost) <= m or decodable(left, left.sources()[2], 2)
    try:
        decision = left.recover()
    except StateLost:
        assert not possible, f"{lost} of {len(job.nodes)} nodes lost the state, m = {m}"
        return False
    assert decision.step == 2
    assert possible, f"{lost} cannot be survived, and it was"
    return True


@pytest.mark.parametrize(("nodes", "per_node", "m", "group"), CASES)
def test_any_m_nodes_come_back_bit_by_bit(nodes: int, per_node: int, m: int, group: int) -> None:
    job, refused = healthy(nodes, per_node, m, group), 0
    spared = min(m, nodes - 1)
    for count in range(1, min(m + 1, nodes - 1) + 1):
        for lost in itertools.combinations(job.nodes, count):
            refused += not check(job, lost, spared)
    one_group = nodes <= group
    assert refused or nodes <= m + 1 or not one_group


@pytest.mark.parametrize(("nodes", "per_node", "m"), [(4, 1, 2), (5, 1, 3), (4, 2, 2), (7, 1, 2)])
def test_losses_one_after_the_other_are_survived_without_new_parity(
    nodes: int, per_node: int, m: int
) -> None:
    """Between them the new parity gets on some nodes at most: the old one must have been kept."""
    lose_in_turn(nodes, per_node, m)


def lose_in_turn(nodes: int, per_node: int, m: int) -> None:
    job, rng = healthy(nodes, per_node, m), np.random.default_rng(nodes)
    for lost in itertools.permutations(job.nodes, m):
        left = job
        for node in lost:
            left = without(left, [node])
            assert left.recover().step == 2
            left.protect(2, [holder for holder in left.ranks if rng.random() < 0.5])


def holes(job: EmulatedJob, rng: np.random.Generator) -> None:
    """Some runs of some halves and some parity units are corrupt: their survey leaves them out."""
    for memory in job.memories.values():
        for index, half in enumerate(memory.halves):
            if half and rng.random() < 0.6:
                start = int(rng.integers(job.space.numel // 2)) * 2
                hole = Run.of(start, start + 2 * int(rng.integers(1, 40)))
                memory.halves[index] = replace(half, held=subtract(half.held, [hole]))
        for index, parity in enumerate(memory.parity):
            if parity:
                sound = tuple(unit for unit in parity.record.units if rng.random() < 0.9)
                record = replace(parity.record, units=sound)
                memory.parity[index] = replace(parity, record=record)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(3, 1, 1), (4, 1, 2), (3, 2, 2), (6, 1, 2), (5, 1, 3)]),
    st.integers(0, 2**32),
    st.integers(0, 2),
)
def test_what_is_corrupt_costs_its_stripe_one_unit_where_it_lies(
    case: tuple[int, int, int], seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    job = EmulatedJob(*case[:2], space=SMALL, protection=Protection(case[2]))
    for step in (1, 2):
        job.protect(step)
        job.commit(step + 1)
    left = without(job, rng.choice(job.nodes, min(count, case[0] - 1), replace=False).tolist())
    holes(left, rng)
    possible = {step: decodable(left, left.sources()[2], step) for step in (2, 3)}
    try:
        step = left.recover().step
    except StateLost:
        assert not any(possible.values())
    else:
        assert step == max(step for step in possible if possible[step])


def decisions() -> Iterator[tuple[EmulatedJob, Recovery]]:
    for nodes, per_node, m, lost in [
        (5, 1, 2, ("node1", "node3")), (4, 2, 2, ("node0", "node2")), (6, 1, 3, ("node4",)),
    ]:  # fmt: skip
        job = without(healthy(nodes, per_node, m), lost)
        job.join(3, "node9")
        yield job, job.ladder.decide(job.sources()[2])


def cost(job: EmulatedJob, decode: Decode, decoder: int, where: dict[int, set[int]]) -> int:
    """Bytes that move where `decoder` decodes, with the parity rows that it has."""
    local = sum(decoder in ranks for ranks in where.values())
    sources = [decoder] * local + [-1] * (len(where) - local)
    parity = tuple(Row(0, src, 0) for src in sources[: len(decode.lost)])
    there = replace(decode, decoder=decoder, parity=parity)
    return sum(n for src, dst, n in there.moved(job.shape) if src != dst)


def test_units_meet_where_the_fewest_bytes_move() -> None:
    for job, decision in decisions():
        assert decision.decodes
        for decode in decision.decodes:
            where: dict[int, set[int]] = {}
            for report in job.sources()[2]:
                for source in (s for s in report.parity if s.record.step == 2):
                    for unit in source.record.units:
                        if unit.stripe == decode.stripe:
                            where.setdefault(unit.row, set()).add(report.rank)

            costs = [cost(job, decode, rank, where) for rank in range(len(job.ranks))]
            assert costs[decode.decoder] == min(costs)
        assert len({decode.decoder for decode in decision.decodes}) > 1


def test_rounds_hold_everything_once_and_little_at_a_time() -> None:
    for job, decision in decisions():
        outputs: dict[tuple[int, str], list[Run]] = {}
        moves: dict[int, list[Run]] = {}
        for some in batches(decision, job.shape, ROUND, WINDOW):
            load: dict[tuple[str, int], int] = {}
            sizes = [
                *((m.src, m.dst, m.run.numel * job.shape.element_bytes) for m in some.moves),
                *(message for decode in some.decodes for message in decode.moved(job.shape)),
            ]
            for src, dst, size in sizes:
                for end in (("sent", src), ("received", dst)):
                    load[end] = load.get(end, 0) + size
            # one round of moves, one of decodes; a window may exceed its own
            assert max(load.values()) <= ROUND + max(ROUND, (len(job.ranks) + 2) * WINDOW)
            for move in some.moves:
                moves.setdefault(move.dst, []).append(move.run)
            for decode in some.decodes:
                assert decode.end - decode.begin <= WINDOW
                for out in decode.outputs:
                    outputs.setdefault((out.dst, out.role), []).append(out.run)
        for rank, runs in moves.items():
            whole = [move.run for move in decision.transfers if move.dst == rank]
            assert numel(runs) == numel(whole)
            assert not subtract(whole, runs)
        for (rank, role), runs in outputs.items():
            whole = [
                out.run for decode in decision.decodes for out in decode.outputs
                if (out.dst, out.role) == (rank, role)
            ]  # fmt: skip
            assert numel(runs) == numel(whole)
            assert not subtract(whole, runs)


def test_the_cost_of_a_recovery_is_what_its_messages_weigh() -> None:
    for job, decision in decisions():
        rounds = batches(decision, job.shape, ROUND, WINDOW)
        sizes = [
            (src, dst, size)
            for some in rounds
            for src, dst, size in [
                *((m.src, m.dst, m.run.numel * job.shape.element_bytes) for m in some.moves),
                *(message for decode in some.decodes for message in decode.moved(job.shape)),
            ]
        ]
        assert sum(n for src, dst, n in sizes if src != dst) == decision.moved(job.shape)


# Copies of single runs


EDGES = (Run.of(0, 70), Run.of(600, 900), Run.of(1200, 1310))


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("racks", [False, True])
def test_copies_cover_the_edges_in_other_domains(m: int, racks: bool) -> None:
    job = EmulatedJob(4, 2, space=SMALL)
    domains = {
        holder: (f"rack{index // 4}/" if racks else "") + job.memories[holder].node
        for index, holder in enumerate(job.ranks)
    }
    made = layout_stripes(job.shape, job.layout, domains, Protection(m, 16, EDGES))
    assert [stripe.index for stripe in made] == list(range(len(made)))
    coded = layout_stripes(job.shape, job.layout, domains, Protection(m, 16))
    assert made[: len(coded)] == coded
    for holder in job.ranks:
        runs = job.layout.runs(holder)
        copied: dict[str, list[Run]] = {role.name: [] for role in ROLES}
        for stripe in (s for s in made[len(coded) :] if s.data[0].holder == holder):
            (piece,), (mirror,) = stripe.data, stripe.parity
            assert domains[mirror] != domains[holder]
            if racks:
                assert domains[mirror].split("/")[0] != domains[holder].split("/")[0]
            for role, run in stream_parts(job.shape, runs, piece.start, piece.stop):
                copied[role].append(run)
        for found in copied.values():
            assert numel(found) == numel(intersect(runs, EDGES))
            assert not subtract(intersect(runs, EDGES), found)


@pytest.mark.parametrize("node", ["node0", "node2", "node3"])
def test_copied_runs_come_back_without_parity(node: str) -> None:
    """With copies of everything any node comes back; with copies of some, exactly those."""
    everything = (Run.of(0, SMALL.numel),)
    for edges in (everything, EDGES):
        job = EmulatedJob(4, 1, space=SMALL, protection=Protection(0, 16, edges))
        job.protect(1)
        left = without(job, [node])
        lost = subtract(everything, [r for h in left.ranks for r in left.layout.runs(h)])
        if edges is everything:
            assert left.recover().step == 1
        else:
            assert _Attempt(left.ladder, left.sources()[2], 1).unrecovered == subtract(lost, EDGES)
            with pytest.raises(StateLost):
                left.recover()


# The checkers must go red.


def everything() -> None:
    """All losses of jobs that are quick to harm in every way."""
    for nodes, m in [(4, 1), (5, 2), (5, 3)]:
        job = healthy(nodes, 1, m)
        for count in range(1, m + 2):
            for lost in itertools.combinations(job.nodes, min(count, nodes - 1)):
                check(job, lost, m)


def test_planted_rows_that_change_places_give_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = emulated_job.Code.decode

    def flawed(self: Any, data: Any, parity: dict[int, Any], lost: Any) -> None:
        rows = list(parity)
        decode(self, data, dict(zip(rows[::-1], parity.values(), strict=True)), lost)

    monkeypatch.setattr(emulated_job.Code, "decode", flawed)
    with pytest.raises(AssertionError, match="wrong bytes"):
        everything()


def test_planted_window_that_slips_gives_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def flawed(decode: Decode, shape: Any, size: int) -> Iterator[Decode]:
        for window in windows(decode, shape, size):
            slip = 64 if window.begin else 0
            yield replace(window, begin=window.begin - slip, end=window.end - slip)

    monkeypatch.setattr(batch_module, "windows", flawed)
    with pytest.raises((AssertionError, ValueError)):
        everything()


def test_planted_corrupt_unit_taken_for_sound_gives_wrong_bytes() -> None:
    job = healthy(4, 1, 2)
    for memory in job.memories.values():
        for half in (half for half in memory.parity if half):
            for unit in half.units.values():
                unit[unit.size // 2] ^= 1
    with pytest.raises(AssertionError, match="wrong bytes"):
        check(job, ("node1",), 2)


def test_planted_one_loss_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder that takes one unit less than it could refuses what the code has."""
    add = decode_module._Decoding._add

    def flawed(self: Any, *given: Any) -> None:
        *rest, rows = given
        add(self, *rest, dict(list(rows.items())[:-1]))

    monkeypatch.setattr(decode_module._Decoding, "_add", flawed)
    with pytest.raises(AssertionError, match="lost the state"):
        everything()


def test_planted_parity_that_is_not_whole_is_relied_on_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def newest(self: _Attempt) -> tuple[int, int]:
        records = [source.record for report in self.reports for source in report.parity]
        return max((record.step, record.generation) for record in records)

    monkeypatch.setattr(_Attempt, "_whole_parity", newest)
    job = healthy(4, 1, 1)
    for holder in (5, 6):
        job.join(holder, f"node{holder}")
        job.recover()
        job.protect(2, job.ranks[:1])
    with pytest.raises(AssertionError, match="lost the state"):
        assert all(check(job, (node,), 1) for node in job.nodes)
