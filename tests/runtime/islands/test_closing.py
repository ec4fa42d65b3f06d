"""Which islands count in a round, whatever the order in which islands hear of each other."""

import itertools
import random
import sys
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.runtime.islands.closing import WAIT, Round, Version, verdict

sys.path.insert(0, str(Path(__file__).parent))
from island_world import EVERY, World

ROUNDS = 4


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_while_all_hear_each_other_all_count(count: int, seed: int) -> None:
    world = World(count, random.Random(seed))
    while min(isle.step for isle in world.isles.values()) <= ROUNDS * EVERY:
        world.happens()
    assert not world.missed
    assert not world.astray
    rounds = [world.applied[j] for j in world.isles]
    everybody = tuple(range(count))
    assert {islands for applied in rounds for islands in applied.values()} == {everybody}
    shared = range(ROUNDS)
    assert len({tuple(itertools.islice(applied, len(shared))) for applied in rounds}) == 1


@settings(max_examples=400, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32))
def test_whatever_happens_the_living_go_on_and_agree(count: int, seed: int) -> None:
    """Deaths, returns, cut links and lost patience, in any order; then it is quiet."""
    chance = random.Random(seed)
    world = World(count, chance)
    pairs = [frozenset(pair) for pair in itertools.combinations(range(count), 2)]
    for _ in range(chance.randint(20, 200)):
        luck = chance.random()
        if luck < 0.02 and len(world.dead) < count - 1:
            world.die(chance.choice([j for j in world.isles if j not in world.dead]))
        elif luck < 0.04 and world.dead:
            world.come_back(chance.choice(sorted(world.dead)))
        elif luck < 0.06:
            world.cut.add(chance.choice(pairs))
        elif luck < 0.10 and world.cut:
            world.mend(chance.choice(sorted(world.cut, key=sorted)))
        elif luck < 0.11:
            world.isles[chance.randrange(count)].late += 1
        else:
            world.happens()
    for pair in sorted(world.cut, key=sorted):
        world.mend(pair)
    world.settle(ROUNDS)
    living = [world.isles[j] for j in world.isles if j not in world.dead]
    assert len({(isle.step, isle.version) for isle in living}) == 1, living


OLD, NEW = Version(4, "a"), Version(4, "b")
MINE = Round(0, EVERY, NEW, True)


def vote(**more: Any) -> dict[str, Any]:
    made = {"have": {"1": [4, "b"], "2": [4, "b"]}, "closing": None, "there": {"1": 0, "2": 0},
            "lost": [], "late": False}  # fmt: skip
    return made | more


@given(st.tuples(*[st.tuples(st.integers(0, 3), st.sampled_from("abc"))] * 2))
def test_of_two_forks_exactly_one_yields(bases: tuple[tuple[int, str], ...]) -> None:
    versions = [Version(*base) for base in bases]
    found = []
    for me, (mine, other) in enumerate((versions, versions[::-1])):
        theirs = {str(1 - me): [other.weight, other.name]}
        votes = [vote(have=theirs, there={str(1 - me): 0})]
        found.append(verdict(Round(0, EVERY, mine, True), votes, me))
    astray = [one.astray is not None for one in found]
    assert sum(astray) == (versions[0] != versions[1])
    assert astray == [mine < other for mine, other in (versions, versions[::-1])]


def test_the_fork_of_more_islands_is_newer() -> None:
    assert OLD.after(EVERY, (0, 1)) > max(OLD.after(EVERY, (2,)), OLD.after(EVERY, (0,)))
    assert OLD.after(EVERY, (0,)).name != OLD.after(EVERY, (2,)).name
    assert OLD.after(EVERY, ()) == OLD


@given(st.lists(st.sets(st.integers(1, 3)), min_size=1, max_size=4), st.booleans())
def test_what_one_rank_lacks_is_not_there(haves: list[set[int]], late: bool) -> None:
    there = dict.fromkeys(("1", "2", "3"), 0)
    votes = [vote(have={str(j): [4, "b"] for j in have}, there=there, late=late) for have in haves]
    empty = vote(have=None)  # a rank that owns nothing of the fragment has nothing to say
    found = verdict(MINE, [*votes, empty], 0)
    whole = set.intersection(*haves)
    if whole == {1, 2, 3} or late:
        assert found.islands == (0, *sorted(whole))
        assert found.closed
        assert found.missed == tuple(sorted({1, 2, 3} - whole))
    else:
        assert found == WAIT


def test_who_follows_a_closing_waits_for_what_it_names() -> None:
    closing = {"base": "b", "by": 0, "islands": [0, 1]}
    follower = {"closing": closing, "there": {"0": 0, "2": 0}}
    assert verdict(MINE, [vote(**follower, have={"0": [4, "b"]})], 1).islands == (0, 1)
    assert verdict(MINE, [vote(**follower, have={})], 1) == WAIT
    gone = vote(**follower, have={}, lost=[0])
    assert verdict(MINE, [gone], 1).wanted == (0,)
    assert verdict(MINE, [gone | {"there": {"0": 0}}], 1).astray == 0  # no third one to ask
    assert verdict(MINE, [gone | {"late": True}], 1).astray == 0
    assert verdict(MINE, [gone | {"there": {}}], 1).closed  # nobody has it any more
    other = closing | {"base": "c", "islands": [1, 2]}
    assert verdict(MINE, [vote(**follower | {"closing": other})], 1) == WAIT
    assert verdict(Round(0, EVERY, NEW, False), [vote(**follower, have={})], 1).astray == 0


def test_nobody_stops_for_the_knowledge_of_the_gone() -> None:
    newer = {"1": [5, "z"], "2": [4, "b"]}
    assert verdict(MINE, [vote(have=newer)], 0).astray == 1
    assert verdict(MINE, [vote(have=newer, there={"2": 0}, lost=[1])], 0).islands == (0, 2)


def test_who_began_later_is_not_waited_for_and_closes_nothing() -> None:
    late_comer = vote(have={"2": [4, "b"]}, there={"1": EVERY, "2": 0})
    assert verdict(MINE, [late_comer], 0).islands == (0, 2)
    new = Round(0, EVERY, NEW, False)
    assert verdict(new, [vote(there={"1": 0, "2": 0})], 0) == WAIT
    assert verdict(new, [vote(have={}, there={"1": EVERY})], 0).islands == ()
