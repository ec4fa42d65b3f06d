"""A network of membership machines in one process: any order, any loss, and a checker.

Everything random comes from one seed. Links are ordered pairs of queues; a cut link loses what is
in flight and both ends learn of it sooner or later, or, in a partition, not at all. After every
event `Checker` asserts what no schedule may break.
"""

from collections import deque
from dataclasses import replace
from random import Random
from typing import Any

from outlast.cluster import event as ev
from outlast.cluster import membership
from outlast.cluster.agreement import Agreement, Ballot, Letter, Value
from outlast.cluster.membership import Membership
from outlast.cluster.roster import Seats
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, Worker

TIMING = Timing()


def member(name: str, *, workers: int = 1, restarts: int = 0, finished: bool = False) -> Member:
    """The member of agent `name`, whose holders and port follow from the name."""
    number = int.from_bytes(name.encode()[:5], "big")
    slots = tuple(Worker(number * 100 + rank, rank) for rank in range(workers))
    port = number % 60000 + 1024
    return Member(name, f"node-{name}", "10.0.0.1", port, slots, restarts, finished)


class Checker:
    """What must hold at every moment (each has a planted bug that breaks it)."""

    def __init__(self) -> None:
        self.decided: dict[int, View] = {}
        self.installed: dict[str, int] = {}
        self.votes: dict[tuple[int, str], set[str]] = {}  # by generation and value
        self.installs = 0

    def voted(self, agreement: Agreement) -> None:
        """The present vote of an acceptor."""
        assert agreement.accepted is not None
        key = (agreement.view.generation + 1, repr(agreement.accepted))
        self.votes.setdefault(key, set()).add(agreement.me)

    def entered(self, agent: str, view: View) -> None:
        """An agent installs a view."""
        self.installs += 1
        known = self.decided.setdefault(view.generation, view)
        assert known == view, f"two views of generation {view.generation}"
        assert view.generation > self.installed.get(agent, 0), "generations never go back"
        self.installed[agent] = view.generation
        before = self.decided.get(view.generation - 1)
        if before is not None:
            size = len(before.members)
            sides = [
                voters
                for (generation, value), voters in self.votes.items()
                if generation == view.generation and value.endswith(f", {view.members!r})")
            ]
            first = before.members[0].agent
            assert any(
                2 * len(v & set(before.agents)) > size
                or (2 * len(v & set(before.agents)) == size and first in v)
                for v in sides
            ), f"generation {view.generation} without a quorum of votes"


class Watched(Agreement):
    """An acceptor whose votes the checker of the running network sees."""

    checker = Checker()

    def _accept(self, sender: str, ballot: Ballot, value: Value) -> list[Letter]:
        letters = super()._accept(sender, ballot, value)
        if self.accepted is not None:
            self.checker.voted(self)
        return letters


class Network:
    """Machines by agent name, and what is under way between them."""

    def __init__(self, seed: int, names: str, *, seats: Seats | None = None) -> None:
        self.random = Random(seed)
        self.checker = Watched.checker = Checker()
        membership.Agreement = Watched  # type: ignore[misc]
        self.now = 0.0
        self.seats = seats or Seats(len(names), len(names))
        self.machines: dict[str, Membership] = {}
        self.links: dict[tuple[str, str], deque[dict[str, Any]]] = {}
        self.dead: set[str] = set()
        self.side: dict[str, int] = {}  # agents of different sides cannot talk
        self.log: list[str] = []
        for name in names:
            self.start(name, founder=name == names[0])

    def start(self, name: str, *, founder: bool = False) -> None:
        """A new agent, told to found when it may."""
        machine = Membership(member(name), TIMING, self.seats, founder=founder)
        self.machines[name] = machine
        self.feed(name, ev.Asked(self.now))

    def feed(self, name: str, event: ev.Event) -> None:
        """One event to one machine, its actions, and the checks."""
        if name in self.dead:
            return
        machine = self.machines[name]
        actions = machine.on(event)
        machine.check()
        self.log.append(f"{name} {event}")
        for action in actions:
            match action:
                case ev.Send(to, message) if (name, to) in self.links:
                    self.links[(name, to)].append(message)
                case ev.Install(view):
                    self.checker.entered(name, view)
                case ev.Dial(_, port):
                    for other in self.machines:
                        if member(other).port == port:
                            self.connect(name, other)

    def reachable(self, a: str, b: str) -> bool:
        """Whether a message from a can arrive at b."""
        return self.side.get(a, 0) == self.side.get(b, 0) and not {a, b} & self.dead

    def connect(self, a: str, b: str) -> None:
        """A link, if there is none and both are there."""
        if a != b and (a, b) not in self.links and self.reachable(a, b):
            self.links[(a, b)], self.links[(b, a)] = deque(), deque()
            self.feed(a, ev.Connected(self.now, b))
            self.feed(b, ev.Connected(self.now, a))

    def cut(self, a: str, b: str) -> None:
        """The link is gone with all that was on it."""
        if self.links.pop((a, b), None) is not None:
            del self.links[(b, a)]
            self.feed(a, ev.Disconnected(self.now, b, "cut"))
            self.feed(b, ev.Disconnected(self.now, a, "cut"))

    def kill(self, name: str) -> None:
        """The process is gone; its peers' connections end, each after what was on it or before."""
        self.dead.add(name)
        for other in list(self.machines):
            if (name, other) in self.links:
                flight = self.links[(name, other)]
                for _ in range(self.random.randint(0, len(flight))):
                    self.feed(other, ev.Received(self.now, name, flight.popleft()))
                self.cut(name, other)

    def deliver(self) -> bool:
        """One message on one link, chosen at random; False when nothing is under way."""
        ready = [pair for pair, flight in self.links.items() if flight and self.reachable(*pair)]
        if not ready:
            return False
        sender, to = self.random.choice(ready)
        self.feed(to, ev.Received(self.now, sender, self.links[(sender, to)].popleft()))
        return True

    def tick(self) -> None:
        """Time passes for everybody, in any order; agents that know of no job ask all others."""
        self.now += TIMING.tick_s
        names = list(self.machines)
        self.random.shuffle(names)
        for name in names:
            self.feed(name, ev.Tick(self.now))
            if not self.machines[name].over and self.machines[name].view is None:
                for other in names:
                    self.connect(name, other)

    def settle(self, ticks: int = 10) -> None:
        """Deliver everything, and let this many ticks pass."""
        for _ in range(ticks):
            while self.deliver():
                pass
            self.tick()
        while self.deliver():
            pass

    def members(self, name: str) -> str:
        """The view of one agent, as names, or nothing for one that is out or dead."""
        machine = self.machines[name]
        alive = name not in self.dead and not machine.over and machine.view is not None
        return "".join(machine.view.agents) if alive and machine.view else ""

    def views(self) -> set[str]:
        """The views of those that are in one."""
        return {self.members(n) for n in self.machines if n in self.members(n)} - {""}


def storm(network: Network, steps: int, deaths: int) -> None:
    """Random faults among random deliveries, then peace."""
    random = network.random
    joined = iter("uvwxyz")
    for _ in range(steps):
        roll = random.random()
        names = [n for n in network.machines if n not in network.dead]
        if roll < 0.75:
            network.deliver()
        elif roll < 0.88:
            network.tick()
        elif roll < 0.90:
            network.cut(*random.sample(names, 2))
        elif roll < 0.91 and deaths > 0:
            deaths -= 1
            network.kill(random.choice(names))
        elif roll < 0.93:
            network.side = {n: random.randint(0, 1) for n in names}
        elif roll < 0.95:
            network.side = {}
        elif roll < 0.96 and (name := next(joined, "")):
            network.start(name)
            network.feed(name, ev.Ready(network.now))
        else:
            name = random.choice(names)
            me = network.machines[name].roster.me
            described = replace(me, restarts=me.restarts + 1)
            network.feed(name, ev.Described(network.now, described))
    network.side = {}
    network.settle(60)
