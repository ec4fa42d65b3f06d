"""Every sample of an epoch exactly once, whoever computes which leaf."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.runtime.leaf_tree import assign
from outlast.runtime.samples import leaf_seed, permuted, samples

LEAVES = 4
Sampler = Callable[[int, int, int], list[int]]  # step, leaf, rank -> indices


def check_epochs(sampler: Sampler, length: int, batch_size: int, world_size: int) -> None:
    """Read two epochs and a bit on `world_size` ranks; each epoch is everything once."""
    steps = -(-2 * length // (LEAVES * batch_size)) + 1
    read: list[int] = []
    for step in range(steps):
        by_leaf: dict[int, list[int]] = {}
        for rank, leaves in enumerate(assign(LEAVES, {}, [1.0] * world_size)):
            by_leaf |= {leaf: sampler(step, leaf, rank) for leaf in leaves}
        for leaf in range(LEAVES):
            assert len(by_leaf[leaf]) == batch_size
            read += by_leaf[leaf]
    for epoch in (0, 1):
        part = Counter(read[epoch * length : (epoch + 1) * length])
        assert part == Counter(range(length)), f"epoch {epoch}"


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(length: int, key: int) -> None:
    assert sorted(permuted(i, length, key) for i in range(length)) == list(range(length))


@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_each_sample_of_an_epoch_exactly_once(
    seed: int, length: int, batch_size: int, world_size: int
) -> None:
    def sampler(step: int, leaf: int, rank: int) -> list[int]:
        return samples(seed, step, leaf, LEAVES, batch_size, length)

    check_epochs(sampler, length, batch_size, world_size)


def test_planted_order_by_rank_repeats_samples() -> None:
    def by_rank(step: int, leaf: int, rank: int) -> list[int]:
        return samples(7 + rank, step, leaf, LEAVES, 3, 50)

    check_epochs(by_rank, 50, 3, 1)
    with pytest.raises(AssertionError, match="epoch 0"):
        check_epochs(by_rank, 50, 3, 2)


def test_a_joiner_one_batch_late_is_noticed() -> None:
    def late(step: int, leaf: int, rank: int) -> list[int]:
        return samples(7, step + (rank == 1), leaf, LEAVES, 3, 50)

    with pytest.raises(AssertionError, match="epoch"):
        check_epochs(late, 50, 3, 2)


def test_epochs_seeds_and_keys_differ() -> None:
    orders = [tuple(samples(seed, step, 0, 1, 20, 20)) for seed in range(4) for step in range(4)]
    assert len(set(orders)) == len(orders)
    seeds = {leaf_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_order_is_the_same_for_ever() -> None:
    """Pinned: a job that restarts under a newer version must read on where it stopped."""
    assert samples(1, 2, 3, LEAVES, 5, 1000) == [461, 22, 964, 36, 42]
    assert leaf_seed(1, 2, 3) == 1517167407554927345
