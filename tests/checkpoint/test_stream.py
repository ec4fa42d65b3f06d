"""Streams are cut into parts that miss and repeat nothing."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint import stream as module
from outlast.checkpoint.records import Role, StateShape
from outlast.checkpoint.stream import stream_bytes, stream_parts, stream_roles
from outlast.layout.run import Run
from outlast.layout.stripe import ALIGN

ROLES = (Role("a", "float64", 8), Role("b", "float32", 4), Role("c", "bfloat16", 2))


@st.composite
def streams(draw: st.DrawFn) -> tuple[StateShape, tuple[Run, ...], list[int]]:
    """A shape, disjoint runs, and cuts of their stream, which like a stripe's are aligned."""
    roles = tuple(role for role in draw(st.permutations(ROLES)) if draw(st.booleans()))
    roles = roles or ROLES[:1]
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
        (role.name, x)
        for role in stream_roles(shape)
        for run in runs
        for x in range(run.start, run.stop)
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


def test_every_eighth_byte_is_a_border_whatever_the_order_of_the_roles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape, runs = StateShape("model", 200, ROLES[::-1]), (Run.of(3, 90), Run.of(100, 131))
    size = stream_bytes(shape, runs)
    check_stream(shape, runs, [*range(0, size, 8), size])
    monkeypatch.setattr(module, "stream_roles", lambda shape: list(shape.roles))
    with pytest.raises((AssertionError, ValueError)):
        check_stream(shape, runs, [*range(0, size, 8), size])
