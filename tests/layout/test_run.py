"""Run algebra against sets of addresses."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings

from outlast.layout.run import Run, canonical, covers, intersect, numel, subtract, union
from outlast.tests.layout.oracle import elements, run_sets

EXAMPLES = settings(max_examples=300, deadline=None)


def check_canonical(runs: Sequence[Run], expected: set[int]) -> None:
    """`runs` hold exactly `expected`, sorted, disjoint, plain neighbours merged."""
    addresses = elements(runs)
    assert len(addresses) == len(set(addresses)) == numel(runs)
    assert set(addresses) == expected
    assert list(runs) == sorted(runs)
    plain = [run for run in runs if run.count == 1]
    assert all(a.stop < b.start for a, b in pairwise(plain))


@EXAMPLES
@given(run_sets(), run_sets())
def test_operations_are_set_operations(a: list[Run], b: list[Run]) -> None:
    left, right = set(elements(a)), set(elements(b))
    check_canonical(canonical(a), left)
    check_canonical(union(a, b), left | right)
    check_canonical(intersect(a, b), left & right)
    check_canonical(subtract(a, b), left - right)
    assert covers(a, b) == (right <= left)


@EXAMPLES
@given(run_sets(strided=False), run_sets(strided=False))
def test_equal_plain_sets_are_equal_tuples(a: list[Run], b: list[Run]) -> None:
    assert (canonical(a) == canonical(b)) == (set(elements(a)) == set(elements(b)))
    assert canonical(canonical(a)) == canonical(a)


HUGE = 10**12  # intervals: an expansion would never end
SHARD = Run(64, 16, 128, HUGE)


@pytest.mark.parametrize(
    ("other", "common", "rest"),
    [
        (Run.of(0, SHARD.stop), [SHARD], []),
        (Run.of(0, 64), [], [SHARD]),
        (SHARD, [SHARD], []),
        (Run(80, 16, 128, HUGE), [], [SHARD]),
        (Run(72, 16, 128, HUGE), [Run(72, 8, 128, HUGE)], [Run(64, 8, 128, HUGE)]),
        (
            Run(64 + 128 * 10, 16, 128, HUGE),
            [Run(64 + 1280, 16, 128, HUGE - 10)],
            [Run(64, 16, 128, 10)],
        ),
        (Run.of(0, 70), [Run.of(64, 70)], [Run.of(70, 80), Run(192, 16, 128, HUGE - 1)]),
        (Run(64, 16, 256, 2), [Run.of(64, 80), Run.of(320, 336)], None),
    ],
)
def test_strided_runs_stay_compact(other: Run, common: list[Run], rest: list[Run] | None) -> None:
    assert intersect([SHARD], [other]) == tuple(common)
    left = subtract([SHARD], [other])
    assert numel(left) == SHARD.numel - numel(common)
    assert rest is None or left == tuple(rest)


def test_column_shards_join_to_the_matrix() -> None:
    shards = [Run(column, 8, 64, HUGE) for column in range(0, 64, 8)]
    assert canonical(reversed(shards)) == (Run.of(0, 64 * HUGE),)
    rest = subtract([Run.of(0, 64 * HUGE)], shards[1:])
    assert not subtract(rest, shards[:1])
    assert not subtract(shards[:1], rest)
    assert len(rest) <= 2


@pytest.mark.parametrize("fields", [(-1, 1), (0, 0), (0, 4, 3, 2), (0, 1, 0, 0)])
def test_impossible_runs_are_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="run"):
        Run(*fields)


def test_runs_have_one_form() -> None:
    assert Run(4, 2, 2, 5) == Run.of(4, 14)
    assert Run(4, 2, 99, 1) == Run.of(4, 6)
    assert list(Run(4, 2, 5, 2).intervals()) == [(4, 6), (9, 11)]
    assert (Run(4, 2, 5, 2).stop, Run(4, 2, 5, 2).numel) == (11, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        [Run.of(0, 9)],
        [Run.of(0, 4), Run.of(4, 10)],
        [Run.of(0, 10), Run.of(9, 10)],
        [Run.of(5, 10), Run.of(0, 5)],
    ],
)
def test_planted_bugs_are_seen(wrong: list[Run]) -> None:
    check_canonical([Run.of(0, 10)], set(range(10)))
    with pytest.raises(AssertionError):
        check_canonical(wrong, set(range(10)))
