"""Whom a proposer takes in."""

from outlast.cluster.roster import Peer, Roster, Seats
from outlast.cluster.view import Member, View, Worker


def member(name: str, holder: int) -> Member:
    return Member(name, name, "127.0.0.1", 1000 + holder, (Worker(holder, 0),))


def test_an_evicted_agent_is_not_taken_in_again_on_its_old_wish() -> None:
    """A node that returned, trained along and froze: its link is open and its wish still known."""
    a, b, c = member("a", 1), member("b", 2), member("c", 3)
    roster, seats = Roster(a), Seats(least=1, most=3)
    for other in (b, c):
        roster.peers[other.agent] = Peer(connected=True, member=other, wants=True)
    whole, rest = View(5, (a, b, c)), View(6, (a, b))
    roster.enter(None, whole)
    roster.enter(whole, rest)
    assert [m.agent for m in roster.wanted(rest, (), seats)] == ["a", "b"]
    roster.gone("c", rest)
    roster.peers["d"] = Peer(connected=True, member=member("d", 4), wants=True)
    assert [m.agent for m in roster.wanted(rest, (), seats)] == ["a", "b", "d"]
