"""The finished leaves of one rank: sums by node, buffers that are used again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.runtime.fold import combine
from outlast.runtime.leaf_stack import LeafStack
from outlast.runtime.leaf_tree import push_all

NUMEL, LEAVES = 33, 8
CPU = torch.device("cpu")


def gradient(leaf: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(leaf)) * 10.0**leaf


def push(stack: LeafStack, leaf: int) -> None:
    buffer = stack.buffer()
    buffer.copy_(gradient(leaf))
    stack.push(leaf, buffer, float(leaf))


def filled(leaves: list[int]) -> LeafStack:
    stack = LeafStack(NUMEL, CPU)
    stack.start(0)
    for leaf in leaves:
        push(stack, leaf)
    return stack


def root(stack: LeafStack) -> torch.Tensor:
    return combine({node: total.clone() for node, total in stack.sums.items()}, (3, 0))


@given(st.permutations(range(LEAVES)))
def test_any_order_gives_the_same_bits(order: list[int]) -> None:
    stack = filled(order)
    assert stack.nodes == push_all((), order)
    assert torch.equal(root(stack), root(filled(list(range(LEAVES)))))
    assert stack.losses == {leaf: float(leaf) for leaf in range(LEAVES)}


def test_leaves_in_order_need_few_buffers() -> None:
    stack, seen = filled([]), set()
    for leaf in range(LEAVES):
        buffer = stack.buffer()
        seen.add(buffer.data_ptr())
        buffer.copy_(gradient(leaf))
        stack.push(leaf, buffer, 0.0)
    assert len(seen) <= 4
    stack.start(1)
    assert stack.nodes == ()
    again = {stack.buffer().data_ptr() for _ in range(len(seen))}
    assert again == seen


def test_buffers_never_alias_what_is_held() -> None:
    stack = filled([0, 1, 4, 6])
    held = {total.data_ptr() for total in stack.sums.values()}
    assert not held & {stack.buffer().data_ptr() for _ in range(6)}


def test_kept_nodes_keep_their_sums_and_others_free_their_buffers() -> None:
    stack = filled([0, 1, 4, 6])
    assert stack.nodes == ((1, 0), (0, 4), (0, 6))
    kept, freed = stack.sums[1, 0].clone(), stack.sums[0, 4].data_ptr()
    stack.keep(((1, 0), (0, 6)))
    assert stack.nodes == ((1, 0), (0, 6))
    assert torch.equal(stack.sums[1, 0], kept)
    assert stack.buffer().data_ptr() == freed


def test_a_step_that_is_started_again_keeps_its_leaves() -> None:
    stack = filled([0, 1, 2])
    stack.start(0)
    assert stack.nodes == ((1, 0), (0, 2))
    stack.start(5)
    assert (stack.nodes, stack.losses, stack.step) == ((), {}, 5)


def test_leaves_after_a_loss_join_the_kept_ones() -> None:
    stack = filled([4, 5])
    for leaf in (6, 7, 0, 1, 2, 3):
        push(stack, leaf)
    assert torch.equal(root(stack), root(filled(list(range(LEAVES)))))


def test_release_drops_everything() -> None:
    stack = filled([0, 1, 2])
    stack.release()
    assert (stack.nodes, stack.step) == ((), -1)
    assert not stack._free


def test_what_has_a_forgotten_leaf_in_it_is_dropped_whole() -> None:
    stack = filled([0, 1, 2])
    stack.found = {leaf: (1.0, None) for leaf in range(3)}
    freed = stack.sums[1, 0].data_ptr()
    stack.forget(1)
    assert (stack.nodes, stack.losses) == (((0, 2),), {2: 2.0})
    assert stack.found.keys() == {2}
    assert stack.buffer().data_ptr() == freed
    stack.forget(7)  # of another rank: only what was noted of it
    assert stack.nodes == ((0, 2),)
    assert not filled([]).found
