"""Who is in the job: the state machine of one agent.

Every agent tells every other what it is (`describe`). The lowest member that is not suspect
compares what the members say of themselves with the view; where they differ it proposes the next
view (see `agreement`). A worker's death, its return, a node's loss and a newcomer are thus one
mechanism, and a spare takes a lost member's seat in the very view that is without that member.
Generation 1 is the founder's word; every later one is agreed by the one before.

Invariants: views are installed in rising generations; this agent votes only for the generation
after its view, and only members of that view are heard about it; whoever speaks of an older
generation is told the present view and has no other effect. An agent that learns of a view
without itself is out for good: it comes back as a new agent.
"""

from collections.abc import Iterable
from typing import Any

import outlast.cluster.event as ev
from outlast.cluster.agreement import NONE, Agreement, Letter
from outlast.cluster.detector import Detector, Patience
from outlast.cluster.errors import Misuse
from outlast.cluster.founding import Founding
from outlast.cluster.roster import LOST_MAX, Address, Peer, Roster, Seats
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, field

REQUESTS = ("prepare", "accept")
ANSWERS = ("promise", "refuse", "accepted")
VOTES = (*REQUESTS, *ANSWERS)
KINDS = frozenset({"describe", "beat", "view", "leave", *VOTES})


class Membership:
    """The control plane's decisions of agent `me` in a job with these `seats`."""

    def __init__(self, me: Member, timing: Timing, seats: Seats, *, founder: bool) -> None:
        self.timing = timing
        self.view: View | None = None
        self.generation = 0  # of the view
        self.founder = ""  # the agent that formed generation 1: views of another are void
        self.proposer = ""
        self.roster = Roster(me)
        self.founding = Founding(timing, seats, founder=founder)
        self.detector = Detector(timing)
        self.agreement: Agreement | None = None  # while in the view
        self.over = False
        self._me = me.agent
        self._changed: float | None = None  # since when the view and the facts differ
        self._beat: float | None = None
        self._untold = False  # that a job runs without this agent
        self._patience = Patience()
        self._out: list[ev.Action] = []

    def on(self, event: ev.Event) -> list[ev.Action]:
        """What to do about it, in order; raises Misuse on a malformed message, without effect."""
        self._out = []
        if self.over:
            return []
        match event:
            case ev.Tick():
                self._tick(event.now)
            case ev.Connected():
                self.roster.peers.setdefault(event.agent, Peer()).connected = True
                self.detector.heard(event.agent, event.now)
                if self.view is not None and event.agent not in self.view.agents:
                    self._send_view([event.agent])  # first: a founder must not count us in
                self._send(self.roster.description(), [event.agent])
                self._send(_beat(self.generation), [event.agent])
            case ev.Disconnected():
                self._gone(event.agent, event.cause)
            case ev.Received():
                self._received(event)
            case ev.Described():
                self.roster.me = event.member
                self._send(self.roster.description())
            case ev.Ready():
                self.roster.wants = True
                self._send(self.roster.description())
            case ev.Asked():
                self.founding.asked = True
        if not self.over:
            self._advance(event.now)
        return self._out

    def check(self) -> None:
        """Assert the invariants that one agent can see."""
        if not self.over:
            view, agreement = self.view, self.agreement
            inside = view is not None and self._me in view.agents
            assert inside == (agreement is not None), "votes while in the view"
            assert agreement is None or agreement.view is view, "votes for the next view alone"
            others = set(agreement.view.agents) - {self._me} if agreement else set()
            assert set(self.detector.suspects) <= others, "suspects are other members"
            assert len(self.roster.lost) <= LOST_MAX, "what is remembered is bounded"

    def summary(self) -> str:
        """One line for people."""
        place = "in" if self.agreement else "outside"
        size = len(self.view.members) if self.view else 0
        suspects = ", ".join(sorted(self.detector.suspects)) or "nobody"
        where = f"{place} generation {self.generation} of {size} members"
        return f"{self.roster.me.node}: {where}, suspects {suspects}"

    # ---- what happens

    def _tick(self, now: float) -> None:
        for agent, cause in self.detector.tick(now):
            self._suspect(agent, cause)
        if self._beat is None or now - self._beat >= self.timing.heartbeat_s:
            self._beat = now
            self._send(_beat(self.generation))
            members = self.view.members if self.view else ()
            self._out += _dials(self.roster.missing(members))
            self._out += _dials(self.roster.absent())
        if self.view is not None and self.agreement is not None:
            alive = self.detector.alive(self.view.agents)
            there = [*alive, *filter(self.roster.finished, self.detector.suspects)]
            settled = self.view.quorum(there)
            if self._patience.over("quorum", settled, self.timing.no_quorum_s, now):
                self.over = True
                self._out.append(ev.NoQuorum(self.view, tuple(alive)))
        elif failure := self.founding.failure(self.view, now):
            self.over = True
            self._out.append(ev.Failed(failure))

    def _received(self, event: ev.Received) -> None:
        peer = self.roster.peers.get(event.agent)
        message, kind = event.message, event.message.get("kind")
        if peer is None:
            return
        self.detector.heard(event.agent, event.now)
        if kind == "describe":
            member = Member.from_json(message.get("member"))
            if member.agent != event.agent:
                raise Misuse(f"agent {event.agent} describes {member.agent}")
            peer.wants = field(message, "wants", bool)
            if member != peer.member:
                peer.member = member
                self._out.append(ev.Learned(member))
        elif kind == "view":
            view = View.from_json(message.get("view"))
            founder, proposer = field(message, "founder", str), field(message, "proposer", str)
            if self.founder in ("", founder) and view.generation > self.generation:
                self._enter(view, founder, proposer, event.now)
        elif kind == "leave":
            self._gone(event.agent, "left")
        elif kind in KINDS:
            self._about(event, field(message, "generation", int))

    def _about(self, event: ev.Received, generation: int) -> None:
        """A message about one generation: a beat about the sender's, a vote about the next."""
        sender, kind, number = event.agent, event.message["kind"], self.generation
        if kind == "beat" or generation <= number:
            if generation < number + (kind in REQUESTS) and kind not in ANSWERS:
                self._send_view([sender])
        elif generation > number + 1:
            self._send(_beat(self.generation), [sender])  # this agent is behind: it will be told
        elif self.agreement is not None and sender in self.agreement.view.agents:
            if kind in REQUESTS and self._changed is None:
                self._changed = event.now
            self._deliver(self.agreement.on(sender, event.message, event.now), event.now)

    def _gone(self, agent: str, cause: str) -> None:
        self.roster.gone(agent, self.view)
        if self.detector.closed(agent, cause):
            self._suspect(agent, cause)

    def _suspect(self, agent: str, cause: str) -> None:
        member = self.view.member(agent) if self.view else None
        if member is not None and not self.roster.finished(agent):
            self._out.append(ev.Suspect(agent, member.node, cause))

    # ---- what follows

    def _advance(self, now: float) -> None:
        """Found, propose, go on with a proposal or commit, until nothing more is due."""
        while not self.over:
            agreement = self.agreement
            if agreement is None:
                # Told once a member has described itself: only that says what kind of job it is.
                if self._untold and self.view and self.roster.described(self.view):
                    self._untold = False
                    self._out.append(ev.Running(self.view))
                first = () if self.view else self.founding.first_members(self.roster, now)
                if not first:
                    return
                self._enter(View(1, first), self._me, self._me, now)
                self._send_view(self.roster.connected())
            elif agreement.decided is not None:
                view = View(agreement.view.generation + 1, agreement.decided)
                self._enter(view, self.founder, self._me, now)
                self._send_view(self.roster.connected())
            elif not self._propose(agreement, now):
                return

    def _propose(self, agreement: Agreement, now: float) -> bool:
        """Whether anything was sent; the rest of the view need not wait for more."""
        view, suspects = agreement.view, self.detector.suspects
        agreement.wanted = self.roster.wanted(view, suspects, self.founding.seats)
        differs = [m.shape() for m in agreement.wanted] != [m.shape() for m in view.members]
        if differs and self._changed is None:
            self._changed = now
        elif not differs:
            if agreement.promised == NONE:
                self._changed = None
            if agreement.proposal is not None and agreement.proposal.value is None:
                agreement.proposal = None  # a false alarm, and nothing was asked to be accepted
        alive = self.detector.alive(view.agents)
        if agreement.proposal is None and not (differs and alive[0] == self._me):
            return False
        letters = agreement.propose(now, alive)
        self._deliver(letters, now)
        return bool(letters)

    def _deliver(self, letters: list[Letter], now: float) -> None:
        """Send; what is for this agent itself takes effect at once."""
        for to, message in letters:
            if to != self._me:
                self._send(message, [to])
            elif self.agreement is not None:
                self._deliver(self.agreement.on(to, message, now), now)

    def _enter(self, view: View, founder: str, proposer: str, now: float) -> None:
        was, before = self.agreement is not None, self.view
        self.view, self.generation = view, view.generation
        self.founder, self.proposer = founder, proposer
        inside = self._me in view.agents
        self.agreement = Agreement(view, self._me, self.timing) if inside else None
        self.roster.enter(before, view)
        others = [agent for agent in view.agents if agent != self._me]
        self.detector.watch(others if inside else (), now)
        if inside:
            detected = now if self._changed is None else self._changed
            self._changed = None
            self._out.append(ev.Install(view, proposer, detected))
            # Of two members without a link, the one that comes first in the view dials at once.
            self._out += _dials(
                self.roster.missing(view.members[view.agents.index(self._me) + 1 :])
            )
        elif was:
            self.over = True
            self._out.append(ev.Evicted(view))
        else:
            self._untold |= before is None
            self._out += _dials(self.roster.missing(view.members))

    def _send_view(self, agents: Iterable[str]) -> None:
        if self.view is not None:
            said = {"view": self.view.as_json(), "founder": self.founder, "proposer": self.proposer}
            self._send({"kind": "view", **said}, agents)

    def _send(self, message: dict[str, Any], agents: Iterable[str] | None = None) -> None:
        to = self.roster.connected() if agents is None else agents
        self._out += [ev.Send(agent, message) for agent in to]


def _beat(generation: int) -> dict[str, Any]:
    return {"kind": "beat", "generation": generation}


def _dials(addresses: Iterable[Address]) -> list[ev.Action]:
    return [ev.Dial(host, port) for host, port in addresses]
