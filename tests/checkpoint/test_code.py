"""The code gives back any one unit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.code import Code
from outlast.cluster.errors import Misuse, StateLost

Units = list[np.ndarray]


@st.composite
def units(draw: st.DrawFn) -> tuple[Units, int]:
    """Data units of uneven length and the length of the parity unit, which is the longest's."""
    sizes = draw(st.lists(st.integers(0, 200), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    length = max(sizes) + draw(st.integers(0, 9))
    return [rng.integers(0, 256, size, np.uint8) for size in sizes], length


def encoded(data: Units, length: int) -> np.ndarray:
    parity = np.full(length, 0xEE, np.uint8)
    Code(len(data), 1).encode(data, [parity])
    return parity


def rebuilt(data: Units, parity: np.ndarray, lost: int) -> np.ndarray:
    again = np.full(parity.size, 0xEE, np.uint8)
    rest = {index: unit for index, unit in enumerate(data) if index != lost}
    Code(len(data), 1).decode(rest, {0: parity}, {lost: again})
    return again


def check_every_loss(data: Units, parity: np.ndarray) -> None:
    for lost, unit in enumerate(data):
        again = rebuilt(data, parity, lost)
        assert np.array_equal(again[: unit.size], unit), f"unit {lost} is not what it was"
        assert not again[unit.size :].any(), f"the padding of unit {lost} is not zero"


@given(units())
def test_any_lost_unit_comes_back(case: tuple[Units, int]) -> None:
    data, length = case
    check_every_loss(data, encoded(data, length))


@given(units())
def test_parity_is_the_sum_without_carry(case: tuple[Units, int]) -> None:
    data, length = case
    expected = np.zeros(length, np.uint8)
    for unit in data:
        expected[: unit.size] ^= unit
    assert np.array_equal(encoded(data, length), expected)


def test_units_may_start_anywhere_in_memory() -> None:
    whole = np.arange(300, dtype=np.uint8)
    data = [whole[1:100], whole[103:203]]
    check_every_loss(data, encoded(data, 100))


def test_planted_wrong_parity_is_noticed() -> None:
    data = [np.arange(90, dtype=np.uint8), np.arange(50, dtype=np.uint8)]
    parity = encoded(data, 90)
    parity[70] ^= 1
    with pytest.raises(AssertionError, match="unit 0"):
        check_every_loss(data, parity)
    parity[70] ^= 1
    with pytest.raises(AssertionError, match="not what it was"):
        check_every_loss(data[::-1] + data[:1], parity)


def test_more_losses_than_parity_are_refused() -> None:
    out = {2: np.empty(4, np.uint8), 1: np.empty(4, np.uint8)}
    one = {2: out[2]}
    some = np.zeros(4, np.uint8)
    with pytest.raises(StateLost):
        Code(3, 1).decode({0: some}, {0: some}, one)
    with pytest.raises(StateLost):
        Code(3, 1).decode({0: some, 1: some}, {0: some}, out)
    with pytest.raises(StateLost):
        Code(2, 1).decode({0: some, 1: some}, {}, one)
    with pytest.raises(Misuse, match="m = 2"):
        Code(3, 2)
