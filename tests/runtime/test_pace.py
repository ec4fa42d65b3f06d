"""Slow ranks are told of once, and leaves follow the speed without swinging."""

from hypothesis import example, given
from hypothesis import strategies as st

from outlast.runtime.leaf_tree import assign
from outlast.runtime.pace import CHANGE, PERIOD_S, WINDOW, Pace

Seconds = dict[int, list[float]]


def paced(*holders: int) -> Pace:
    pace = Pace()
    pace.enter(holders)
    return pace


def test_a_slow_rank_is_told_of_once_and_again_after_it_had_recovered() -> None:
    pace = paced(7, 8, 9)
    slow = {7: [1.0], 8: [3.0], 9: [1.0, 1.0]}
    even = {holder: [1.0] for holder in slow}
    told = [pace.note(slow) for _ in range(3 * WINDOW)]
    assert [bool(each) for each in told].count(True) == 1
    assert told[WINDOW - 1].keys() == {8}
    assert 2.9 < told[WINDOW - 1][8] < 3.1
    assert not any(pace.note(even) for _ in range(2 * WINDOW))
    assert sum(bool(pace.note(slow)) for _ in range(2 * WINDOW)) == 1


def test_one_long_step_and_ranks_that_are_all_slow_are_nothing() -> None:
    pace = paced(1, 2)
    for step in range(4 * WINDOW):
        long: Seconds = {1: [9.0], 2: [1.0]} if step % WINDOW == 0 else {1: [1.0], 2: [1.0]}
        assert not pace.note(long)
    pace = paced(1, 2)
    assert not any(pace.note({1: [9.0 * n], 2: [9.0 * n]}) for n in range(1, 20))


def test_a_ratio_that_wavers_between_the_bounds_changes_nothing() -> None:
    pace = paced(1, 2, 3)
    for _ in range(2 * WINDOW):
        pace.note({1: [1.0], 2: [1.6], 3: [1.0]})
    assert pace.slow == {2}
    for wave in range(40):
        assert not pace.note({1: [1.0], 2: [1.3 + 0.1 * (wave % 3)], 3: [1.0]})
        assert pace.slow == {2}


@given(st.lists(st.floats(1.0, 1000), min_size=2, max_size=6))
@example([28.0, 34.0, 45.0])
def test_weights_settle_and_are_the_same_on_all_ranks(seconds: list[float]) -> None:
    """Two ranks that note the same numbers, one of them new, want the same weights."""
    old, new = paced(*range(len(seconds))), paced(*range(len(seconds)))
    old.note({h: [1.0] for h in range(len(seconds))})
    old.enter(range(len(seconds)))
    weights = dict.fromkeys(range(len(seconds)), 1.0)
    changes = 0
    for _ in range(4 * WINDOW):
        shares = assign(64, {}, [weights[h] for h in weights])
        noted = {h: [s] * len(shares[h]) for h, s in enumerate(seconds)}
        old.note(noted)
        new.note(noted)
        wanted = old.weights(weights)
        assert wanted == new.weights(weights)
        if wanted:
            changes, weights = changes + 1, wanted
    fast = min(seconds)
    reached = [h for h, s in enumerate(seconds) if s < 10 * fast]
    if len(reached) == len(seconds):
        assert changes <= 1
        speed = {h: weights[h] * seconds[h] for h in reached}
        apart = (1 + CHANGE) / (1 - CHANGE)  # one as much too high as it may be, one too low
        assert max(speed.values()) <= min(speed.values()) * apart + 0.3


def test_a_rank_without_leaves_gets_one_again() -> None:
    pace, weights = paced(1, 2), {1: 1.0, 2: 0.05}
    for _ in range(10 * WINDOW):
        pace.note({1: [1.0], 2: [] if weights[2] < 0.3 else [1.0]})
        weights = pace.weights(weights) or weights
    assert weights[2] == 1.0


def test_weight_zero_stays() -> None:
    pace, weights = paced(1, 2, 3), {1: 1.0, 2: 0.0, 3: 1.0}
    for _ in range(WINDOW):
        pace.note({1: [1.0], 2: [], 3: [4.0]})
    assert pace.weights(weights) == {1: 1.0, 2: 0.0, 3: 0.25}


def test_short_steps_are_measured_together() -> None:
    """Noise of single steps, each of which alone would make somebody slow."""
    pace = paced(1, 2)
    for step in range(20 * WINDOW):
        assert not pace.note({1: [0.3 if step % 2 else 0.1], 2: [0.1 if step % 2 else 0.3]})
    steps = 0
    while not pace.note({1: [0.1], 2: [0.2]}):
        steps += 1
    assert steps * 0.2 >= (WINDOW // 2) * PERIOD_S
