"""Leaves are computed once, and their sums combine along one tree, whatever the ranks did."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.runtime.fold import combine
from outlast.runtime.leaf_tree import Node, assign, covered, push, push_all

LEVELS = 4
LEAVES = 1 << LEVELS
ROOT = (LEVELS, 0)


@st.composite
def finished(draw: st.DrawFn) -> tuple[dict[int, tuple[Node, ...]], list[float]]:
    """What up to five ranks hold of a step, disjoint, and their weights."""
    size = draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(-1, size - 1), min_size=LEAVES, max_size=LEAVES))
    order = draw(st.permutations(range(LEAVES)))
    kept = {
        rank: push_all((), [leaf for leaf in order if owner[leaf] == rank]) for rank in range(size)
    }
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=size, max_size=size))
    if not any(weights):
        weights[-1] = 1.0
    return kept, weights


def check_assignment(
    kept: Mapping[int, Sequence[Node]], weights: Sequence[float], todo: Sequence[Sequence[int]]
) -> None:
    have = [leaf for nodes in kept.values() for leaf in covered(nodes)]
    made = [leaf for leaves in todo for leaf in leaves]
    assert sorted(have + made) == list(range(LEAVES))
    assert len(todo) == len(weights)
    assert not any(leaves for leaves, weight in zip(todo, weights, strict=True) if weight == 0)


@given(finished())
def test_missing_leaves_are_dealt_exactly_once(
    case: tuple[dict[int, tuple[Node, ...]], list[float]],
) -> None:
    kept, weights = case
    check_assignment(kept, weights, assign(LEAVES, kept, weights))


def test_planted_assignments_are_noticed() -> None:
    kept = {0: ((1, 0),), 1: ((0, 5),)}
    todo = assign(LEAVES, kept, [1.0, 1.0])
    check_assignment(kept, [1.0, 1.0], todo)
    for wrong in (
        [todo[0][1:], todo[1]],
        [[*todo[0], 5], todo[1]],
        [todo[0], [*todo[1], todo[0][0]]],
    ):
        with pytest.raises(AssertionError):
            check_assignment(kept, [1.0, 1.0], wrong)
    with pytest.raises(AssertionError):
        check_assignment(kept, [1.0, 0.0], todo)


@given(st.lists(st.floats(0.1, 8), min_size=1, max_size=7))
def test_shares_follow_the_weights(weights: list[float]) -> None:
    todo = assign(64, {}, weights)
    assert [leaf for leaves in todo for leaf in leaves] == list(range(64))
    for leaves, weight in zip(todo, weights, strict=True):
        assert abs(len(leaves) - 64 * weight / sum(weights)) < 1


def test_survivors_share_what_a_lost_rank_left() -> None:
    todo = assign(8, {0: ((1, 0),), 1: ((1, 2),)}, [1.0, 1.0])
    assert [len(leaves) for leaves in todo] == [2, 2]
    assert assign(8, {0: ((2, 0),), 1: ((2, 1),)}, [1.0, 1.0]) == [[], []]
    with pytest.raises(AssertionError, match="nobody"):
        assign(8, {}, [0.0, 0.0])


@given(st.permutations(range(LEAVES)))
def test_pushed_nodes_cover_each_leaf_once(order: list[int]) -> None:
    nodes: tuple[Node, ...] = ()
    for count, leaf in enumerate(order, 1):
        nodes = push(nodes, leaf)
        assert sum(1 << level for level, _ in nodes) == count
        assert covered(nodes) == set(order[:count])
    assert push_all((), order) == nodes


def test_leaves_in_order_merge_to_the_root() -> None:
    for count in range(1, LEAVES + 1):
        assert len(push_all((), range(count))) == count.bit_count()
    assert push_all((), range(LEAVES)) == (ROOT,)


GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(LEAVES, 50, generator=GENERATOR) * 10.0 ** torch.arange(-8, 8).unsqueeze(1)


def summed(order: Sequence[int], owner: Sequence[int]) -> torch.Tensor:
    """Root of the tree when each rank pushes its leaves in this order."""
    parts: dict[Node, torch.Tensor] = {}
    for rank in set(owner):
        held: dict[Node, torch.Tensor] = {}
        for leaf in (leaf for leaf in order if owner[leaf] == rank):
            value, after = VALUES[leaf].clone(), push(tuple(held), leaf)
            before = list(held.items())
            while len(before) >= len(after):
                value = before.pop()[1].add_(value)
            held = dict([*before, (after[-1], value)])
        parts |= held
    return combine(parts, ROOT)


EXPECTED = summed(range(LEAVES), [0] * LEAVES)
ORDERS = st.permutations(range(LEAVES))
OWNERS = st.lists(st.integers(0, 4), min_size=LEAVES, max_size=LEAVES)


@given(ORDERS, OWNERS)
def test_the_sum_does_not_depend_on_who_pushed_what_when(
    order: list[int], owner: list[int]
) -> None:
    assert torch.equal(summed(order, owner), EXPECTED)


def test_planted_other_association_gives_other_bits() -> None:
    total = VALUES[0].clone()
    for value in VALUES[1:]:
        total += value
    assert not torch.equal(total, EXPECTED)


def test_a_missing_leaf_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="leaf 1 is missing"):
        combine({(0, 0): VALUES[0].clone()}, (1, 0))
