"""Who stands still while others wait is hung; who is slow is not."""

import pytest

from outlast.cluster.standstill import SLOWER, Standstill
from outlast.cluster.timing import Timing

TIMING = Timing(heartbeat_s=1.0)
BEAT = 1.0


class Rank:
    """A worker of one agent: one leaf of `leaf_s` seconds, then waits at place 3."""

    def __init__(self, leaf_s: float, longest_s: float = 0.1, in_leaf: bool = True) -> None:
        self.leaf_s, self.longest_s, self.in_leaf = leaf_s, longest_s, in_leaf
        self.generation = 1

    def reading(self, now: float) -> tuple[tuple[int, int], int, tuple[bool, float]]:
        if now < self.leaf_s:
            return (self.generation, 2), 1, (self.in_leaf, self.longest_s)
        return (self.generation, 3), 2, (False, self.longest_s)


def play(ranks: list[Rank], until: float = 100.0) -> tuple[float, int] | None:
    """One agent per rank; when and who is evicted first."""
    agents = [Standstill(TIMING) for _ in ranks]
    now = 0.0
    while now < until:
        now += BEAT
        for agent, (number, rank) in zip(agents, enumerate(ranks), strict=True):
            agent.pong(number, *rank.reading(now), now)
        for agent in agents:
            for position, seconds in agent.news(now):
                for other in agents:
                    other.waited(position, now - seconds)
        for agent in agents:
            for holder, _ in agent.hung(now):
                return now, holder
        if all(now >= rank.leaf_s for rank in ranks):
            return None
    raise AssertionError("waits for ever")


def test_a_worker_that_never_arrives_is_evicted_within_the_bound() -> None:
    found = play([Rank(1.0), Rank(1e9), Rank(2.0)])
    assert found is not None
    assert found[1] == 1
    assert 1.0 + TIMING.stall_s <= found[0] <= 1.0 + TIMING.stall_s + 3 * BEAT


@pytest.mark.parametrize("ratio", [3, 30])
def test_a_slow_worker_is_not(ratio: int) -> None:
    assert play([Rank(0.5), Rank(0.5 * ratio, 0.5)]) is None


def test_patience_grows_with_the_leaves() -> None:
    assert play([Rank(5.0), Rank(45.0, 5.0)]) is None
    found = play([Rank(5.0), Rank(1e9, 5.0)])
    assert found is not None
    assert 5.0 + SLOWER * 5.0 <= found[0] <= 5.0 + SLOWER * 5.0 + 3 * BEAT


@pytest.mark.parametrize("rank", [Rank(60.0, 0.0), Rank(60.0, in_leaf=False)])
def test_a_first_leaf_and_work_between_steps_may_take_longer(rank: Rank) -> None:
    assert play([Rank(0.5), rank]) is None
    rank.leaf_s = 1e9
    found = play([Rank(0.5), rank])
    assert found is not None
    assert found[0] <= TIMING.collective_s


def test_the_bound_lies_within_the_collectives_deadline() -> None:
    assert TIMING.stall_s < TIMING.stalled_s + 3 * BEAT < TIMING.collective_s


def test_a_later_generation_waits_for_an_earlier_one() -> None:
    """A recovery, in which one rank does not come out of its leaf."""
    waiting = Rank(0.0)
    waiting.generation = 2
    found = play([waiting, Rank(1e9)])
    assert found is not None
    assert found[1] == 1


def test_nobody_who_waits_too_or_is_further_is_blamed() -> None:
    agent = Standstill(TIMING)
    for now in (0.0, 98.0):
        agent.pong(1, (1, 3), 5, (False, 0.1), now)
        agent.pong(2, (1, 4), 5, (True, 0.1), now)
    agent.waited((1, 3), 0.0)
    assert agent.hung(99.0) == []
    agent.waited((1, 5), 0.0)
    assert [holder for holder, _ in agent.hung(99.0)] == [2]


def test_a_silent_worker_is_hung_wherever_it_was_heard_last() -> None:
    """It holds the GIL since a moment after it had told that it was inside."""
    agent = Standstill(TIMING)
    agent.waited((1, 5), 10.0)
    agent.pong(1, (1, 3), 5, (False, 0.1), 0.0)
    agent.pong(1, (1, 3), 5, (False, 0.1), 9.0)
    assert not agent.hung(9.0 + TIMING.stall_s)  # the others have not waited so long
    assert agent.hung(10.0 + TIMING.stall_s)


def test_a_sign_of_progress_counts() -> None:
    agent = Standstill(TIMING)
    agent.waited((1, 3), 0.0)
    for now in range(99):
        agent.pong(1, (1, 2), now // 15, (True, 0.1), float(now))
        assert not agent.hung(float(now))


def test_an_agent_that_was_held_up_itself_blames_nobody() -> None:
    agent = Standstill(TIMING)
    agent.pong(1, (1, 2), 5, (True, 0.1), 0.0)
    agent.waited((1, 3), 0.0)
    agent.forgive(50.0)
    assert not agent.hung(51.0)
    assert agent.hung(50.0 + TIMING.stall_s)


def test_what_is_said_is_said_once_and_what_is_remembered_is_bounded() -> None:
    agent = Standstill(TIMING)
    agent.pong(1, (1, 3), 5, (False, 0.1), 0.0)
    assert [agent.news(float(now)) for now in (19, 20, 21, 22)] == [[], [((1, 3), 20.0)], [], []]
    for place in range(1, 999, 2):
        agent.waited((2, place), 0.0)
    assert len(agent._waited) <= 8
