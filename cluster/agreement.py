"""How the members of a view agree on the next one: single-decree Paxos, one instance a generation.

Acceptors are the members of the view. The value is the whole next list of members. The ballot
(0, 0) belongs to the view's first member, can be used once and needs no promises, because no lower
ballot exists: in the usual case a view costs one round trip. Everybody else, and every retry,
first collects promises for a higher ballot (round, index in the view).

Invariants: an acceptor accepts nothing below its promise; a proposer sends one value per ballot,
and if a promise reports an accepted value, then the one of the highest ballot. Hence a value that
a quorum has accepted is the only one that can ever be decided for this generation.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, members_from_json

Ballot = tuple[int, int]
Value = tuple[Member, ...]
Letter = tuple[str, dict[str, Any]]

FIRST: Ballot = (0, 0)
NONE: Ballot = (-1, -1)


@dataclass(slots=True)
class Proposal:
    """A ballot of this member's own; `value` is None until it has been sent to the acceptors."""

    ballot: Ballot
    since: float
    value: Value | None = None
    promises: dict[str, tuple[Ballot, Value] | None] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)


class Agreement:
    """Acceptor and proposer of one member for the generation after `view`.

    `wanted` is what this member would propose; its owner keeps it up to date. `decided` is the
    outcome, once known here.
    """

    def __init__(self, view: View, me: str, timing: Timing) -> None:
        self.view = view
        self.me = me
        self.timing = timing
        self.index = view.agents.index(me)
        self.wanted: Value = view.members
        self.decided: Value | None = None
        self.promised: Ballot = NONE
        self.accepted: tuple[Ballot, Value] | None = None
        self.proposal: Proposal | None = None
        self._first_free = self.index == 0
        self._round = 0

    def propose(self, now: float, needed: Collection[str]) -> list[Letter]:
        """Begin, go on or start over, as due; `needed` are those whose promise is waited for."""
        current = self.proposal
        if current is not None:
            # Retries of two proposers that disturbed each other must not collide again.
            patience = self.timing.retry_s * (1 + self.index / len(self.view.members))
            if now - current.since < patience:
                return self._hurry(now, needed)
        if self._first_free and self.promised <= FIRST:
            self._first_free = False
            self.proposal = Proposal(FIRST, now, self.wanted)
            return self._send_all("accept", FIRST, value=_value_json(self.wanted))
        self._round = max(self._round, self.promised[0], 0) + 1
        self.proposal = Proposal((self._round, self.index), now)
        return self._send_all("prepare", self.proposal.ballot)

    def on(self, sender: str, message: dict[str, Any], now: float) -> list[Letter]:
        """A message about this generation, from a member of the view (possibly this one)."""
        kind, ballot = message.get("kind"), _ballot(message.get("ballot"))
        if kind == "prepare":
            return self._prepare(sender, ballot)
        if kind == "accept":
            return self._accept(sender, ballot, members_from_json(message.get("value")))
        if kind == "promise":
            return self._promise(sender, ballot, message.get("accepted"), now)
        if kind == "accepted":
            self._count(sender, ballot)
        elif kind == "refuse":
            self._round = max(self._round, ballot[0])
        return []

    def _prepare(self, sender: str, ballot: Ballot) -> list[Letter]:
        if ballot <= self.promised:
            return [self._letter(sender, "refuse", self.promised)]
        self.promised = ballot
        accepted = None
        if self.accepted is not None:
            accepted = [list(self.accepted[0]), _value_json(self.accepted[1])]
        return [self._letter(sender, "promise", ballot, accepted=accepted)]

    def _accept(self, sender: str, ballot: Ballot, value: Value) -> list[Letter]:
        if ballot < self.promised:
            return [self._letter(sender, "refuse", self.promised)]
        self.promised = ballot
        self.accepted = (ballot, value)
        return [self._letter(sender, "accepted", ballot)]

    def _promise(self, sender: str, ballot: Ballot, accepted: object, now: float) -> list[Letter]:
        proposal = self.proposal
        if proposal is None or proposal.ballot != ballot or proposal.value is not None:
            return []
        if accepted is None:
            proposal.promises[sender] = None
        elif isinstance(accepted, list) and len(accepted) == 2:
            proposal.promises[sender] = (_ballot(accepted[0]), members_from_json(accepted[1]))
        else:
            raise Misuse("accepted: a ballot and a value expected")
        return []  # the owner calls `propose`, which sends the value when enough have promised

    def _hurry(self, now: float, needed: Collection[str]) -> list[Letter]:
        proposal = self.proposal
        if proposal is None or proposal.value is not None:
            return []
        if not self.view.quorum(proposal.promises):
            return []
        in_time = now - proposal.since < self.timing.promise_s
        if in_time and not set(needed) <= proposal.promises.keys():
            return []
        bound = [promise for promise in proposal.promises.values() if promise is not None]
        value = max(bound, key=lambda promise: promise[0])[1] if bound else self.wanted
        proposal.value = value
        return self._send_all("accept", proposal.ballot, value=_value_json(value))

    def _count(self, sender: str, ballot: Ballot) -> None:
        proposal = self.proposal
        if proposal is None or proposal.ballot != ballot or proposal.value is None:
            return
        proposal.accepted.add(sender)
        if self.view.quorum(proposal.accepted):
            self.decided = proposal.value

    def _letter(self, to: str, kind: str, ballot: Ballot, **more: object) -> Letter:
        generation = self.view.generation + 1
        return to, {"kind": kind, "generation": generation, "ballot": list(ballot), **more}

    def _send_all(self, kind: str, ballot: Ballot, **more: object) -> list[Letter]:
        return [self._letter(agent, kind, ballot, **more) for agent in self.view.agents]


def _ballot(data: object) -> Ballot:
    if isinstance(data, list) and len(data) == 2 and all(type(part) is int for part in data):
        return (data[0], data[1])
    raise Misuse("ballot: two integers expected")


def _value_json(value: Value) -> list[dict[str, object]]:
    return [member.as_json() for member in value]
