"""Verdicts: the true majority is found whatever one rank says, and nobody honest is ever guilty."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.runtime.poison import OUTLIER, Verdict, judge
from outlast.runtime.poison import Testimony as Said

LEAVES = 8
TRUTH = {leaf: (1.0 + leaf / 10, 1000 + leaf) for leaf in range(LEAVES)}
FAULTS = {
    "nan": lambda norm, digest: (nan, digest ^ 1),
    "inf": lambda norm, digest: (inf, digest ^ 1),
    "scale": lambda norm, digest: (norm * 1e4, digest ^ 2),
    "flip": lambda norm, digest: (norm, digest ^ 4),
}


def owner(leaf: int, size: int) -> int:
    return leaf * size // LEAVES


def trial(
    size: int, culprit: int | None, how: str, checked: int | None
) -> tuple[Verdict, list[Said]]:
    """Follow the verdicts of one step to the end; the culprit is wrong in whatever it computes."""

    def testify(rank: int, leaf: int, compare: bool) -> Said:
        norm, digest = TRUTH[leaf]
        if rank == culprit:
            norm, digest = FAULTS[how](norm, digest)
        return Said(rank, leaf, norm, digest if compare or leaf == checked else None)

    found = [testify(owner(leaf, size), leaf, False) for leaf in range(LEAVES)]
    if checked is not None and size > 1:
        found.append(testify((owner(checked, size) + 1) % size, checked, True))
    for _ in range(size + 1):
        verdict = judge(found, range(size))
        if not verdict.again:
            return verdict, found
        found += [testify(rank, leaf, True) for leaf, rank in verdict.again]
    raise AssertionError("no end")


@given(st.integers(3, 6), st.data(), st.sampled_from([*FAULTS]))
def test_the_culprit_is_named_and_nobody_else(size: int, data: st.DataObject, how: str) -> None:
    culprit = data.draw(st.integers(0, size - 1))
    checked = data.draw(st.sampled_from([x for x in range(LEAVES) if owner(x, size) == culprit]))
    verdict, found = trial(size, culprit, how, checked)
    assert {t.rank for t in verdict.guilty} == {culprit}
    assert not verdict.diverged
    assert not verdict.undecided
    again = len(found) - LEAVES - 1
    assert again <= 2 * sum(t.rank == culprit for t in found)  # at most two more for each


@pytest.mark.parametrize("how", ["nan", "inf", "scale"])
def test_gross_faults_are_found_without_a_spot_check(how: str) -> None:
    verdict, _ = trial(4, 2, how, None)
    assert {t.rank for t in verdict.guilty} == {2}
    assert {t.leaf for t in verdict.guilty} == {4, 5}


def test_a_flipped_sign_needs_a_spot_check() -> None:
    assert trial(4, 2, "flip", None)[0] == Verdict()
    assert {t.rank for t in trial(4, 2, "flip", 4)[0].guilty} == {2}


@given(st.integers(1, 6), st.none() | st.integers(0, LEAVES - 1))
def test_honest_ranks_are_cleared(size: int, checked: int | None) -> None:
    verdict, found = trial(size, None, "nan", checked)
    assert verdict == Verdict()
    assert len(found) <= LEAVES + 1


def test_an_honest_outlier_is_cleared_by_a_second_rank() -> None:
    found = [Said(leaf // 4, leaf, 1.0, None) for leaf in range(7)]
    found.append(Said(1, 7, 2 * OUTLIER, None))
    assert judge(found, (0, 1)).again == [(7, 0)]
    assert judge([*found, Said(0, 7, 2 * OUTLIER, 5)], (0, 1)) == Verdict()


def test_not_finite_on_every_rank_is_the_models_own() -> None:
    found = [Said(0, 3, nan, None), Said(1, 3, inf, 5)]
    assert judge(found, (0, 1, 2)).diverged == [3]
    assert judge(found[:1], (0,)).diverged == [3]


def test_of_two_ranks_the_one_that_is_not_finite_is_guilty() -> None:
    found = [Said(0, 3, nan, None), Said(1, 3, 1.0, 5)]
    assert judge(found, (0, 1)).guilty == [found[0]]


def test_two_ranks_that_differ_cannot_be_told_apart() -> None:
    found = [Said(0, 3, 1.0, 4), Said(1, 3, 1.0, 5)]
    assert judge(found, (0, 1)).undecided == [3]
    assert judge(found, (0, 1, 2)).again == [(3, 2)]


def test_zero_gradients_are_no_suspects() -> None:
    found = [Said(0, leaf, float(leaf == 5), None) for leaf in range(LEAVES)]
    assert judge(found, (0, 1)) == Verdict()


def test_planted_a_judge_that_believes_the_first_blames_the_honest() -> None:
    """What a majority is for."""
    found = [Said(0, 3, 1.0, 4), Said(1, 3, 1.0, 5), Said(2, 3, 1.0, 5)]
    first_is_right = [t for t in found if t.digest != found[0].digest]
    assert judge(found, (0, 1, 2)).guilty == [found[0]]
    assert found[0] not in first_is_right
