"""The code gives back any one unit; streams are cut into parts that miss and repeat nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.parity import Code, stream_bytes, stream_parts
from outlast.checkpoint.records import Role, StateShape
from outlast.cluster.errors import Misuse, StateLost
from outlast.layout.run import Run
from outlast.layout.stripe import ALIGN

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
    rest = data[:lost] + data[lost + 1 :]
    Code(len(data), 1).decode(rest, {0: parity}, [again])
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
    out = [np.empty(4, np.uint8) for _ in range(2)]
    some = np.zeros(4, np.uint8)
    with pytest.raises(StateLost):
        Code(3, 1).decode([some], {0: some}, out[:1])
    with pytest.raises(StateLost):
        Code(3, 1).decode([some, some], {0: some}, out)
    with pytest.raises(StateLost):
        Code(2, 1).decode([some, some], {}, out[:1])
    with pytest.raises(Misuse, match="m = 2"):
        Code(3, 2)


ROLES = (Role("a", "float64", 8), Role("b", "float32", 4), Role("c", "bfloat16", 2))


@st.composite
def streams(draw: st.DrawFn) -> tuple[StateShape, tuple[Run, ...], list[int]]:
    """A shape, disjoint runs, and cuts of their stream, which like a stripe's are aligned."""
    roles = tuple(role for role in ROLES if draw(st.booleans())) or ROLES[:1]
    at, runs = 0, []
    gaps_and_lengths = st.tuples(st.integers(1, 40), st.integers(1, 90))
    for gap, length in draw(st.lists(gaps_and_lengths, max_size=6)):
        runs.append(Run.of(at + gap, at + gap + length))
        at += gap + length
    shape = StateShape("model", at + 5, roles)
    size = stream_bytes(shape, runs)
    cuts = draw(st.lists(st.integers(0, size // ALIGN), max_size=5))
    return shape, tuple(runs), sorted({0, size, *(cut * ALIGN for cut in cuts)})


def check_stream(
    shape: StateShape, runs: tuple[Run, ...], cuts: list[int], length: int | None = None
) -> None:
    """The parts between the cuts are the whole stream, once, in order."""
    widths = {role.name: role.itemsize for role in shape.roles}
    expected = [
        (role.name, x) for role in shape.roles for run in runs for x in range(run.start, run.stop)
    ]
    found: list[tuple[str, int]] = []
    for start, stop in pairwise(cuts):
        parts = list(stream_parts(shape, runs, start, stop))
        size = sum(run.numel * widths[role] for role, run in parts)
        assert size == stop - start, f"[{start}, {stop}) has {size} bytes"
        found += [(role, x) for role, run in parts for x in range(run.start, run.stop)]
    assert found == expected


@given(streams())
def test_parts_cover_the_stream_exactly_once(
    case: tuple[StateShape, tuple[Run, ...], list[int]],
) -> None:
    check_stream(*case)
    shape, runs, cuts = case
    assert list(stream_parts(shape, runs, cuts[-1], cuts[-1] + ALIGN)) == []


def test_planted_holes_and_repetitions_are_noticed() -> None:
    shape, runs = StateShape("model", 200, ROLES), (Run.of(3, 90), Run.of(100, 131))
    size = stream_bytes(shape, runs)
    check_stream(shape, runs, [0, 512, size])
    for wrong in ([64, 512, size], [0, 512, size - 64], [0, 512, 448, size]):
        with pytest.raises(AssertionError):
            check_stream(shape, runs, wrong)
