"""Laws of dealing, filling, evening out and settling, against a dictionary per element."""

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout import layout as module
from outlast.layout.layout import Layout, deal, fill_hole, rebalance, replicate, settle
from outlast.layout.run import Run, canonical
from outlast.layout.space import Space, Tensor, chains
from outlast.tests.layout.oracle import (
    elements,
    held,
    holder_lists,
    layouts,
    partitions,
    run_sets,
    spaces,
)

EXAMPLES = settings(max_examples=150, deadline=None)
GRAINS = st.integers(1, 9)


def check_partition(layout: Layout, space: Space) -> None:
    """Every address has exactly one holder."""
    owned = sorted(address for addresses in held(layout).values() for address in addresses)
    assert owned == list(range(space.numel))
    assert layout.is_partition(space.numel)


def check_cuts(layout: Layout, space: Space, grain: int, more: Sequence[int] = ()) -> None:
    """Runs begin and end at allowed cuts (or at `more`) only."""
    allowed = {*space.cuts(grain).tolist(), *more}
    for holder in layout.holders:
        for run in layout.runs(holder):
            assert {run.start, run.stop} <= allowed


def check_even(layout: Layout, space: Space, slack: int) -> None:
    """Every share is within `slack` of the mean."""
    mean = Fraction(space.numel, len(layout.holders))
    assert all(abs(layout.numel(holder) - mean) <= slack for holder in layout.holders)


def check_only_lost_moved(before: Layout, after: Layout, space: Space) -> None:
    """The holders of `after` keep what they had and receive exactly what none of them had."""
    had, has = held(before), held(after)
    survivors = {holder: had.get(holder, set()) for holder in after.holders}
    lost = set(range(space.numel)).difference(*survivors.values())
    received = [has[holder] - survivors[holder] for holder in after.holders]
    assert all(survivors[holder] <= has[holder] for holder in after.holders)
    assert sorted(a for addresses in received for a in addresses) == sorted(lost)


def check_level(before: Layout, after: Layout, slack: int) -> None:
    """Whoever received ends within `slack` of the least."""
    least = min(after.numel(holder) for holder in after.holders)
    for holder in after.holders:
        if after.numel(holder) > before.numel(holder):
            assert after.numel(holder) - least <= slack


@EXAMPLES
@given(st.data(), GRAINS)
def test_views_of_a_layout(data: st.DataObject, grain: int) -> None:
    holders = data.draw(holder_lists())
    layout = data.draw(layouts(holders))
    table, top = held(layout), 70
    everything = set().union(*table.values())
    assert set(elements(layout.missing(top))) == set(range(top)) - everything
    assert layout.covers(top) == (set(range(top)) <= everything)
    some = data.draw(st.lists(st.sampled_from(holders), unique=True))
    part = layout.restrict([*some, -1])
    assert held(part) == {holder: table[holder] for holder in some} | {-1: set()}
    assert Layout.from_json(json.loads(json.dumps(layout.as_json()))) == layout
    assert layout.runs(-1) == ()
    assert Layout.of({holder: layout.runs(holder) for holder in holders}) == layout
    assert (part == layout) == (part.holders == layout.holders)


@EXAMPLES
@given(st.data(), GRAINS)
def test_deal(data: st.DataObject, grain: int) -> None:
    space, holders = data.draw(spaces()), data.draw(holder_lists())
    layout = deal(space, holders, grain)
    check_partition(layout, space)
    check_cuts(layout, space, grain)
    check_even(layout, space, grain * (1 + len(space.units)))  # a tail may cost a grain per unit
    for index, unit in enumerate(space.units):  # contiguous, in the order given, one further
        owners = [h for a in range(unit.start, unit.stop) for h in holders if a in held(layout)[h]]
        turn = -index % len(holders)
        assert owners == sorted(owners, key=[*holders[turn:], *holders[:turn]].index)


def stacked(before: int, blocks: int, block: int, after: int) -> Space:
    """A unit, a chain of equal blocks, and another unit, of so many elements."""
    tensors = [Tensor("in", (before,), "float32")]
    tensors += [Tensor(f"h.{index}.weight", (block,), "float32") for index in range(blocks)]
    return Space.of([*tensors, Tensor("out", (after,), "float32")], lambda n: n[:-7] or n)


@EXAMPLES
@given(st.data(), st.integers(1, 8))
def test_neighbouring_blocks_lie_with_neighbouring_holders(data: st.DataObject, count: int) -> None:
    """Whoever holds an element of a block, the next holder round the circle holds it of the next
    one; totals are even to a grain, and one for the chain."""
    before, block, after = (data.draw(st.integers(0, 30)) * 4 for _ in range(3))
    space = stacked(before, data.draw(st.integers(2, 9)), block + 4, after)
    holders = data.draw(st.permutations(range(count)))
    layout = deal(space, holders, 4)
    check_partition(layout, space)
    check_cuts(layout, space, 4)
    totals = [layout.numel(holder) for holder in holders]
    assert max(totals) - min(totals) <= 8
    owner = {address: holder for holder, mine in held(layout).items() for address in mine}
    (chain,) = chains(space)
    for here, there in pairwise(space.units[index] for index in chain):
        for offset in range(here.numel):
            next_one = holders.index(owner[there.start + offset]) + 1
            assert holders[next_one % count] == owner[here.start + offset]


@EXAMPLES
@given(st.data())
def test_deal_whole_grains(data: st.DataObject) -> None:
    space, holders = data.draw(spaces(multiple=4)), data.draw(holder_lists())
    totals = [deal(space, holders, 4).numel(holder) for holder in holders]
    assert max(totals) - min(totals) <= 4
    weights = data.draw(st.lists(st.integers(0, 9), min_size=len(holders), max_size=len(holders)))
    if sum(weights):
        layout = deal(space, holders, 4, weights)
        check_partition(layout, space)
        for holder, weight in zip(holders, weights, strict=True):
            share = Fraction(space.numel * weight, sum(weights))
            assert abs(layout.numel(holder) - share) <= 8
            assert weight or not layout.numel(holder)


@EXAMPLES
@given(st.data(), GRAINS)
def test_fill_hole(data: st.DataObject, grain: int) -> None:
    space, holders = data.draw(spaces()), data.draw(holder_lists(2))
    before = data.draw(partitions(space, holders, grain))
    survivors = [*data.draw(st.permutations(holders))[1:], *data.draw(holder_lists(0, 2))]
    survivors = list(dict.fromkeys(survivors))
    after = fill_hole(before, survivors, space, grain)
    check_partition(after, space)
    check_cuts(after, space, grain)
    check_only_lost_moved(before, after, space)
    check_level(before, after, 3 * grain)
    assert fill_hole(after, survivors, space, grain) == after


@EXAMPLES
@given(st.data())
def test_fill_hole_whole_grains(data: st.DataObject) -> None:
    space, holders = data.draw(spaces(multiple=4)), data.draw(holder_lists(2))
    before = data.draw(partitions(space, holders, 4))
    check_level(before, fill_hole(before, holders[1:], space, 4), 4)


@EXAMPLES
@given(st.data(), GRAINS)
def test_fill_hole_of_anything(data: st.DataObject, grain: int) -> None:
    space, holders = data.draw(spaces()), data.draw(holder_lists())
    top = max(space.numel - 50, 1)
    before = data.draw(layouts(holders, top=top)) if space.numel > 100 else Layout.of({})
    after = fill_hole(before, holders, space, grain)
    assert after.covers(space.numel)
    check_only_lost_moved(before, after, space)


@EXAMPLES
@given(st.data(), GRAINS)
def test_rebalance(data: st.DataObject, grain: int) -> None:
    space, holders = data.draw(spaces()), data.draw(holder_lists())
    before = data.draw(partitions(space, holders, grain))
    chosen = list(
        dict.fromkeys([*holders[data.draw(st.integers(0, 2)) :], *data.draw(holder_lists())])
    )
    after = rebalance(before, chosen, space, grain)
    assert set(after.holders) == set(chosen)
    check_partition(after, space)
    check_cuts(after, space, grain)
    check_even(after, space, 2 * grain)


@EXAMPLES
@given(st.data())
def test_rebalance_whole_grains(data: st.DataObject) -> None:
    space, holders = data.draw(spaces(multiple=4)), data.draw(holder_lists())
    before = data.draw(partitions(space, holders, 4))
    chosen = list(
        dict.fromkeys([*holders[data.draw(st.integers(0, 2)) :], *data.draw(holder_lists())])
    )
    after = rebalance(before, chosen, space, 4)
    check_even(after, space, 4)
    assert rebalance(after, chosen, space, 4) == after
    had, has = held(before), held(after)
    for holder in chosen:  # nobody gives and takes: nothing moves in vain
        old = had.get(holder, set())
        assert old <= has[holder] or has[holder] <= old


def test_rebalance_needs_a_partition() -> None:
    space = Space.of([Tensor("a", (8,), "float32")])
    with pytest.raises(ValueError, match="partition"):
        rebalance(replicate(space, [1, 2]), [1, 2], space, 2)


def test_a_joiner_gets_few_runs_from_all_over_the_space() -> None:
    space = Space.of((Tensor(f"{n}", (1000,), "float32") for n in range(12)), unit_of=str)
    after = rebalance(deal(space, [1, 2, 3, 4], 5), [1, 2, 3, 4, 5], space, 5)
    assert len(after.runs(5)) <= 15
    assert len(space.names(after.runs(5))) >= 9


@EXAMPLES
@given(st.data(), GRAINS)
def test_settle(data: st.DataObject, grain: int) -> None:
    space, holders = data.draw(spaces()), data.draw(holder_lists())
    top = max(space.numel - 1, 0)
    claimants = st.sampled_from([*holders, -1])
    drawn = data.draw(st.lists(st.tuples(st.integers(1, 3), claimants, run_sets(top)), max_size=5))
    room = [Run.of(0, space.numel)] if space.numel else []
    claims = [(g, h, module_intersect(runs, room)) for g, h, runs in drawn]
    winner: dict[int, int] = {}
    for generation, holder, runs in sorted(claims, key=lambda c: (c[0], -rank(holders, c[1]))):
        if holder in holders and generation:
            winner |= dict.fromkeys(elements(runs), holder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rebalance", lambda layout, *_: layout)
        settled = settle(claims, holders, space, grain)
    assert all(address in held(settled)[holder] for address, holder in winner.items())
    check_partition(settled, space)
    final = settle(claims, holders, space, grain)
    check_partition(final, space)
    assert final == settle(data.draw(st.permutations(claims)), holders, space, grain)
    assert final == rebalance(settled, holders, space, grain)


def module_intersect(runs: Sequence[Run], room: Sequence[Run]) -> tuple[Run, ...]:
    """Claims stay inside the space."""
    return canonical(run for run in canonical(runs) if room and run.stop <= room[0].stop)


def rank(holders: Sequence[int], holder: int) -> int:
    """Position among the live, behind them all for the dead."""
    return holders.index(holder) if holder in holders else len(holders)


def test_replicate() -> None:
    space = Space.of([Tensor("a", (8,), "float32")])
    assert held(replicate(space, [4, 2])) == {2: set(range(8)), 4: set(range(8))}


@pytest.mark.parametrize(("holders", "grain"), [([], 1), ([1, 1], 1), ([1], 0)])
def test_nonsense_is_refused(holders: list[int], grain: int) -> None:
    space = Space.of([Tensor("a", (8,), "float32")])
    with pytest.raises(ValueError, match="holders"):
        deal(space, holders, grain)
    with pytest.raises(ValueError, match="weights"):
        deal(space, [1, 2], 1, [0, 0])


SPACE = Space.of([Tensor("a", (16,), "float32")])
BEFORE = Layout.of({1: [Run.of(0, 8)], 2: [Run.of(8, 12)], 3: [Run.of(12, 16)]})
RIGHT = Layout.of({1: [Run.of(0, 8)], 2: [Run.of(8, 16)]})


def test_the_right_answer_passes() -> None:
    check_partition(RIGHT, SPACE)
    check_cuts(RIGHT, SPACE, 4)
    check_even(RIGHT, SPACE, 0)
    check_only_lost_moved(BEFORE, RIGHT, SPACE)
    check_level(BEFORE, RIGHT, 0)


@pytest.mark.parametrize(
    "planted",
    [
        lambda: check_partition(Layout.of({1: [Run.of(0, 8)], 2: [Run.of(9, 16)]}), SPACE),
        lambda: check_partition(Layout.of({1: [Run.of(0, 9)], 2: [Run.of(8, 16)]}), SPACE),
        lambda: check_cuts(Layout.of({1: [Run.of(0, 7)], 2: [Run.of(7, 16)]}), SPACE, 4),
        lambda: check_even(Layout.of({1: [Run.of(0, 4)], 2: [Run.of(4, 16)]}), SPACE, 3),
        lambda: check_only_lost_moved(
            BEFORE, Layout.of({1: [Run.of(8, 16)], 2: [Run.of(0, 8)]}), SPACE
        ),
        lambda: check_level(
            BEFORE,
            Layout.of({1: [Run.of(0, 8), Run.of(12, 16)], 2: [Run.of(8, 12)]}),
            SPACE.numel // 4,
        ),
    ],
)
def test_planted_bugs_are_seen(planted) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError):
        planted()


def test_planted_deal_that_knows_no_chains_puts_neighbours_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut as other units are, blocks overlap by a grain with what their holder has next door."""
    monkeypatch.setattr(module, "chains", lambda space: ())
    space = stacked(12, 5, 40, 8)
    owner = [held(deal(space, range(4), 4))[holder] for holder in range(4)]
    pairs = [(a, a + 40) for a in range(12, 12 + 4 * 40)]
    assert any({a, b} <= mine for a, b in pairs for mine in owner)
