"""What an agent knows of the others: links, self-descriptions, and addresses of the lost.

Nothing here is agreed; it is the local knowledge from which a proposer makes the next view. Its
size is bounded by the links, the view, and `LOST_MAX`.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from outlast.cluster.view import Member, View

LOST_MAX = 64

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Seats:
    """How many members train, at least and at most, and how many more wait as spares."""

    least: int
    most: int
    spares: int = 0

    @property
    def all(self) -> int:
        """Members of a full view."""
        return self.most + self.spares

    def taken(self, there: Iterable[Member]) -> tuple[Member, ...]:
        """Who sits where: members that train keep their order, spares that are ready take free
        seats behind them. A member that gave all its workers up has left its seat."""
        members = tuple(there)
        serving = [m for m in members if not m.spare and (m.workers or not m.finished)]
        ready = [m for m in members if m.spare and m.workers]
        promoted = ready[: max(0, self.most - len(serving))]
        return (
            *(m for m in members if not m.spare),
            *(replace(m, spare=False) for m in promoted),
            *(m for m in members if m.spare and m not in promoted),
        )


@dataclass(slots=True)
class Peer:
    """Another agent: whether it is linked, what it says of itself, whether it wants to be in.

    out: a view went on without it; it comes back as a new agent, or its old wish, heard before it
    froze, would take it in again and again.
    """

    connected: bool = False
    member: Member | None = None
    wants: bool = False
    out: bool = False


class Roster:
    """The knowledge of the agent that describes itself as `me`."""

    def __init__(self, me: Member) -> None:
        self.me = me
        self.wants = False  # whether this agent wants to be in the view
        self.peers: dict[str, Peer] = {}
        self.lost: dict[Address, None] = {}  # where nodes that left a view may come back

    def description(self) -> dict[str, Any]:
        """The message by which this agent describes itself."""
        return {"kind": "describe", "member": self.me.as_json(), "wants": self.wants}

    def connected(self) -> list[str]:
        """The linked agents."""
        return [agent for agent, peer in self.peers.items() if peer.connected]

    def gone(self, agent: str, view: View | None) -> None:
        """The link is down; members of the view are remembered."""
        peer = self.peers.get(agent)
        if peer is not None:
            peer.connected = peer.wants = False
            if view is None or agent not in view.agents:
                del self.peers[agent]

    def described(self, view: View) -> bool:
        """Whether any member of the view has said what it is."""
        return any(agent in view.agents and peer.member for agent, peer in self.peers.items())

    def finished(self, agent: str) -> bool:
        """Whether this agent's work is done, so that its absence is no loss."""
        peer = self.peers.get(agent)
        return peer is not None and peer.member is not None and peer.member.finished

    def wanted(self, view: View, suspects: Collection[str], seats: Seats) -> tuple[Member, ...]:
        """The members as they should be: those not lost, as they describe themselves, then those
        that want in, unless the job is to stop. A complete job's members stay as they are: some of
        its workers are gone and would never connect again."""
        if any(self._latest(member).complete for member in view.members):
            return view.members
        kept = [
            replace(self._latest(member), spare=member.spare)
            for member in view.members
            if member.agent not in suspects or self.finished(member.agent)
        ]
        if stopping := view.stopping or _stopping(kept):
            return tuple(replace(member, stopping=stopping) for member in kept)
        asking = [
            m for m in self._there() if m.agent not in view.agents
            and self.peers[m.agent].wants and not self.peers[m.agent].out
        ]  # fmt: skip
        coming = asking[: max(0, seats.all - len(kept))]
        return seats.taken((*kept, *(replace(member, spare=True) for member in coming)))

    def first(self, seats: Seats) -> tuple[Member, ...]:
        """This agent and all who are there, as many as find a seat."""
        there = (self.me, *self._there())[: seats.all]
        return seats.taken(replace(member, spare=True) for member in there)

    def enter(self, before: View | None, view: View) -> None:
        """A view was learnt: forget whom it does not need, remember where the lost were."""
        for member in before.members if before else ():
            self.lost[(member.host, member.port)] = None
            if member.agent in self.peers and member.agent not in view.agents:
                self.peers[member.agent].out = True
        for member in view.members:
            self.lost.pop((member.host, member.port), None)
        for address in list(self.lost)[:-LOST_MAX]:
            del self.lost[address]
        self.peers = {a: p for a, p in self.peers.items() if p.connected or a in view.agents}

    def missing(self, members: Collection[Member]) -> Iterator[Address]:
        """The addresses of those of the members that are not linked."""
        for member in members:
            peer = self.peers.get(member.agent)
            address = (member.host, member.port)
            if (peer is None or not peer.connected) and not self._taken(address):
                yield address

    def absent(self) -> Iterator[Address]:
        """The addresses of the lost where nobody is known to be."""
        return (address for address in self.lost if not self._taken(address))

    def _taken(self, address: Address) -> bool:
        linked = [p.member for p in self.peers.values() if p.connected and p.member is not None]
        return any(address == (m.host, m.port) for m in [self.me, *linked])

    def _there(self) -> list[Member]:
        there = [p.member for p in self.peers.values() if p.connected and p.member is not None]
        return sorted(there, key=lambda member: (member.node, member.agent))

    def _latest(self, member: Member) -> Member:
        if member.agent == self.me.agent:
            return self.me
        peer = self.peers.get(member.agent)
        return peer.member if peer is not None and peer.member is not None else member


def _stopping(members: Collection[Member]) -> str:
    """The signal that ends the job: one of its members asks for that, or most have to leave."""
    leaving = [member.leaving for member in members if member.leaving]
    if 2 * len(leaving) > len(members):
        return leaving[0]
    return next((member.stopping for member in members if member.stopping), "")
