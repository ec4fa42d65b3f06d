"""Views: ranks, quorums, and a codec that takes nothing on trust."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from simulated_network import member

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View


def view(names: str, workers: int = 1) -> View:
    return View(3, tuple(member(name, workers=workers) for name in names))


def test_ranks_follow_members_then_local_ranks() -> None:
    order = [(m.agent, w.local_rank) for m, w in view("ba", workers=2).workers]
    assert order == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]


@pytest.mark.parametrize("count", range(1, 8))
def test_two_quorums_always_share_a_member(count: int) -> None:
    some = view("abcdefg"[:count])
    subsets = [set(c) for k in range(count + 1) for c in combinations(some.agents, k)]
    quorums = [s for s in subsets if some.quorum(s)]
    assert quorums
    assert all(a & b for a in quorums for b in quorums)


def test_half_is_a_quorum_with_the_first_member() -> None:
    assert view("abcd").quorum(["a", "c"])
    assert not view("abcd").quorum(["b", "c"])
    assert not view("abcd").quorum(["a", "x", "y", "z"])


def test_json_round_trip() -> None:
    some = view("abc", workers=3)
    assert View.from_json(some.as_json()) == some
    assert some.member("b") == some.members[1]
    assert some.member("x") is None


def test_notes_are_not_shape() -> None:
    some = member("a")
    assert replace(some, finished=True, elastic=True, memories=2).shape() == some.shape()
    assert replace(some, restarts=1).shape() != some.shape()
    assert replace(some, workers=()).shape() != some.shape()


def damaged() -> list[Any]:
    good: dict[str, Any] = view("ab").as_json()
    first, second = good["members"]
    changes = [
        {"agent": ""}, {"agent": 3}, {"agent": "x" * 300}, {"port": -1}, {"port": 1 << 16},
        {"port": True}, {"port": 1.0}, {"workers": None}, {"workers": [1]}, {"finished": 1},
        {"workers": [{"holder": 1, "local_rank": -1}]}, {"memories": -1}, {"restarts": "1"},
        {"workers": [{"holder": h, "local_rank": 0} for h in (1, 2)]},
    ]  # fmt: skip
    wrong: list[Any] = [{**good, "members": [{**first, **more}, second]} for more in changes]
    wrong += [{**good, "members": [first, first]}, {**good, "members": []}]
    wrong += [{**good, "generation": 0}, {**good, "generation": "1"}, {"generation": 1}]
    return [*wrong, None, [], 7, {**good, "members": {}}]


@pytest.mark.parametrize("data", damaged(), ids=repr)
def test_nonsense_is_misuse(data: Any) -> None:
    with pytest.raises(Misuse):
        View.from_json(data)


def test_a_member_lacks_nothing() -> None:
    good = member("a").as_json()
    for name in good:
        with pytest.raises(Misuse):
            Member.from_json({key: value for key, value in good.items() if key != name})


def test_deadlines_are_ordered_and_follow_the_heartbeat() -> None:
    t = Timing(heartbeat_s=2)
    assert t.silence_s == 8
    assert t.tick_s < t.promise_s < t.retry_s < t.silence_s < t.busy_silence_s < t.collective_s
    assert t.silence_s < t.full_s < t.join_s
    assert t.late_tick_s < t.silence_s
    with pytest.raises(Misuse):
        Timing(heartbeat_s=0)


def test_environment() -> None:
    known = {"OUTLAST_AGENT_FD": "7", "OUTLAST_JOB_KEY": "k" * 16}
    found = environment(known)
    assert (found.agent_fd, found.latch_fd, found.job_key) == (7, None, b"k" * 16)
    for wrong in ({"OUTLAST_JOB_KEY": "short"}, {"OUTLAST_LATCH_FD": "x"}):
        with pytest.raises(Misuse):
            environment(wrong)
