"""From the ranks of one island to those of another, over real connections, whatever the layouts."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from outlast.cluster.timing import Timing
from outlast.layout.run import Run, intersect
from outlast.runtime.islands import courier as module
from outlast.runtime.islands.closing import Version
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.courier import Courier
from outlast.runtime.islands.exchange import Exchange
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import Neighbours, Place

GRAIN, NUMEL, STEP = 8, 200, 30
UNITS = [Run.of(0, 77), Run.of(77, 120), Run.of(120, 200)]
FRAGMENTS = [[UNITS[0], UNITS[2]], [UNITS[1]]]
VALUES = torch.sin(torch.arange(NUMEL) * 1.3)
FACTS = Facts(
    0, (Version(3, "v"), Version(2, "w")), ((STEP, Version(3, "v")), None), (0, 0), "settings"
)


def dealt(size: int) -> list[list[Run]]:
    """What each of `size` ranks owns: the grains of each unit, in turn in two stretches each."""
    owned: list[list[Run]] = [[] for _ in range(size)]
    for unit in UNITS:
        cuts = [*range(unit.start, unit.stop, GRAIN), unit.stop]
        for turn in range(2 * size):
            low, high = (len(cuts) - 1) * turn // (2 * size), (len(cuts) - 1) * (turn + 1)
            low, high = cuts[low], cuts[high // (2 * size)]
            if low < high:
                owned[turn % size].append(Run.of(low, high))
    return owned


class Rank:
    """One rank of `island`."""

    def __init__(self, island: int, runs: Sequence[Run], name: str = "e3m0") -> None:
        self.runs, self.codec = list(runs), codec(name, GRAIN)
        self.inbox = Inbox(self.codec, FRAGMENTS, 2)
        self.neighbours = Neighbours(
            NUMEL, [1 - island], lambda message: None, self.inbox.clear, self.inbox.changed
        )
        timing = Timing(heartbeat_s=0.05)
        self.exchange = Exchange("127.0.0.1", b"key", self.inbox.put, timing)
        self.courier = Courier(island, self.codec, self.neighbours, self.exchange)

    def meet(self, island: int, ranks: Sequence["Rank"], team: str = "a") -> None:
        """Hear where the ranks of another island are."""
        self.neighbours.reached([island], 1)
        for holder, rank in enumerate(ranks):
            place = Place(
                holder, team, len(ranks), rank.exchange.address, tuple(rank.runs), STEP,
                "training", 0, ("v", "w"), "settings",
            )  # fmt: skip
            self.neighbours.heard(island, place.as_json())

    def bring(self) -> None:
        of = [next(p for p, us in enumerate(FRAGMENTS) if intersect([r], us)) for r in self.runs]
        self.courier.bring(FACTS, [VALUES[r.start : r.stop] for r in self.runs], self.runs, of)
        assert self.exchange.flush(30)

    def mine(self, fragment: int = 0) -> list[Run]:
        return [run for run in self.runs if intersect([run], FRAGMENTS[fragment])]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rank]]:
    """Two ranks of island 0 and three of island 1; parcels are small."""
    monkeypatch.setattr(module, "PIECE", 2 * GRAIN)
    both = [(0, dealt(2)), (1, dealt(3))]
    made = [Rank(island, runs) for island, owned in both for runs in owned]
    yield made
    for rank in made:
        rank.exchange.close()


def assert_whole(receiver: Rank) -> None:
    runs = receiver.mine()
    assert receiver.inbox.covers(0, STEP, 0, runs)
    assert receiver.inbox.base(0, STEP, 0) == (3, "v")
    found = receiver.inbox.codes(0, STEP, 0, runs)
    for unit in FRAGMENTS[0]:  # as if the unit had been coded in one piece
        whole = receiver.codec.decode(
            receiver.codec.encode(VALUES[unit.start : unit.stop]), unit.numel
        )
        for run, values in zip(runs, found, strict=True):
            if intersect([run], [unit]):
                assert torch.equal(values, whole[run.start - unit.start : run.stop - unit.start])
    assert not receiver.inbox.refused


def test_contributions_reach_whoever_owns_the_same(ranks: list[Rank]) -> None:
    givers, takers = ranks[:2], ranks[2:]
    for giver in givers:
        giver.meet(1, takers)
        giver.bring()
    for taker in takers:
        assert_whole(taker)
        assert taker.inbox.newest(1, 0) == -1  # that fragment was not sent yet
        pieces = taker.inbox._rounds[0, 0][STEP].pieces
        assert all(intersect([run], taker.runs) == (run,) for run in pieces)  # nothing needless
    sent = [giver.exchange.sent_bytes for giver in givers]
    for giver in givers:
        giver.bring()  # nothing is owed any more
    assert [giver.exchange.sent_bytes for giver in givers] == sent


def test_a_team_that_changes_is_given_what_it_lacks(ranks: list[Rank]) -> None:
    givers, takers = ranks[:2], ranks[2:]
    for giver in givers:
        giver.meet(1, takers)
        giver.bring()
    left = takers[:2]
    for taker, runs in zip(left, dealt(2), strict=True):
        taker.runs = runs
    assert not all(taker.inbox.covers(0, STEP, 0, taker.mine()) for taker in left)
    for giver in givers:
        giver.meet(1, left, team="b")
        giver.bring()
    for taker in left:
        assert_whole(taker)


def test_a_state_is_handed_over(ranks: list[Rank]) -> None:
    givers, takers = ranks[:2], ranks[2:]
    homes = []
    for taker in takers:
        home = {"param": torch.zeros(NUMEL), "steps": torch.zeros(NUMEL, dtype=torch.bfloat16)}
        homes.append(home)

        def write(role: str, run: Run, data: memoryview, home: Any = home) -> None:
            values = torch.frombuffer(bytearray(data), dtype=home[role].dtype)
            home[role][run.start : run.stop] = values

        taker.inbox.expect("n", 0, taker.runs, {"param": 4, "steps": 2}, write)
    other = VALUES.to(torch.bfloat16) * 3
    for giver in givers:
        giver.meet(1, takers)
        roles = {
            "param": [VALUES[run.start : run.stop] for run in giver.runs],
            "steps": [other[run.start : run.stop] for run in giver.runs],
        }
        giver.courier.hand_over("n", 1, roles, giver.runs, {"step": STEP})
        assert giver.exchange.flush(30)
    for taker, home in zip(takers, homes, strict=True):
        assert taker.inbox.state("n") == {"step": STEP}
        for run in taker.runs:
            assert torch.equal(home["param"][run.start : run.stop], VALUES[run.start : run.stop])
            assert torch.equal(home["steps"][run.start : run.stop], other[run.start : run.stop])


def test_what_a_lost_rank_has_not_brought_the_others_bring(ranks: list[Rank]) -> None:
    stays, lost, *takers = ranks
    stays.meet(1, takers)
    stays.bring()  # and `lost` is lost before it has brought anything
    assert not all(taker.inbox.covers(0, STEP, 0, taker.mine()) for taker in takers)
    stays.runs = dealt(1)[0]
    stays.courier.enter()
    stays.bring()
    for taker in takers:
        assert_whole(taker)
    assert lost.exchange.sent_bytes == 0


def test_what_a_lost_island_has_brought_to_others_they_pass_on(ranks: list[Rank]) -> None:
    lost, there = ranks[:2], Rank(1, dealt(1)[0])
    for giver in lost:
        giver.meet(1, [there])
        giver.bring()
    assert_whole(there)
    lacking = Rank(1, dealt(1)[0])
    there.meet(1, [lacking], team="c")
    want = {"type": "want", "fragment": 0, "step": STEP, "island": 0}
    there.neighbours.heard(1, want | {"fragment": 1})  # of which there is nothing
    there.neighbours.heard(1, want)
    of = [int(bool(intersect([run], FRAGMENTS[1]))) for run in there.runs]
    there.courier.pass_on(there.inbox, there.runs, of)
    assert there.exchange.flush(30)
    assert_whole(lacking)
    for rank in (there, lacking):
        rank.exchange.close()
