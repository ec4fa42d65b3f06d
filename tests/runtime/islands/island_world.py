"""Islands that exchange one fragment in a world where messages take any time and islands die.

Each is a dict of what it knows and asks `verdict` what to do; the rest is written as plainly as can
be after `Council`, `Neighbours` and `Entry`: tau is 0, ranks are one, and time is the order of what
`World.happens`. A link carries places, closings and contributions, each kind in its order.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from outlast.runtime.islands.closing import Round, Verdict, Version, verdict

EVERY = 10  # steps between two rounds
INITIAL = Version(0, "initial")
CONTROL, BULK = "control", "bulk"


@dataclass
class Isle:
    """One island: where it is, and what it has heard."""

    number: int
    trains: bool = True
    began: int = 0
    step: int = EVERY  # of the round that it makes
    version: Version = INITIAL
    late: int = 0  # how often the patience has run out
    inbox: dict[tuple[int, int], tuple[int, Version]] = field(default_factory=dict)
    closings: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    places: dict[int, dict[str, Any]] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)
    asks: set[int] = field(default_factory=set)

    @property
    def contributed(self) -> bool:
        return self.step > self.began

    def place(self) -> dict[str, Any]:
        newest = dict(list(self.closings.items())[-16:])
        return {"type": "place", "trains": self.trains, "began": self.began, "closings": newest}


class Air:
    """What is on its way between `count` islands; `cut` are pairs that do not hear each other."""

    def __init__(self, count: int) -> None:
        self.isles = {number: Isle(number) for number in range(count)}
        self.dead: set[int] = set()
        self.cut: set[frozenset[int]] = set()
        self.flying: dict[tuple[int, int, str], deque[dict[str, Any]]] = {}

    def reach(self, number: int) -> list[int]:
        return [j for j in self.isles if j != number and j not in self.dead | {number}
                and frozenset((j, number)) not in self.cut]  # fmt: skip

    def send(self, source: int, target: int, kind: str, message: dict[str, Any]) -> None:
        if target != source and target not in self.dead:
            self.flying.setdefault((source, target, kind), deque()).append(message)

    def say(self, source: int, message: dict[str, Any]) -> None:
        for target in self.isles:
            self.send(source, target, CONTROL, message)

    def links(self) -> list[tuple[int, int, str]]:
        """Those over which something can arrive now."""
        return [link for link, queue in self.flying.items()
                if queue and frozenset(link[:2]) not in self.cut]  # fmt: skip


class World(Air):
    """What islands make of it, and what befalls them."""

    def __init__(self, count: int, chance: random.Random) -> None:
        super().__init__(count)
        self.chance = chance
        self.applied: dict[int, dict[tuple[str, int], tuple[int, ...]]] = {}
        self.missed, self.astray, self.patience = 0, list[tuple[int, Version]](), 0
        for number in self.isles:
            self.applied[number] = {}
            self.say(number, self.isles[number].place())
        for link in self.links():  # an island begins when it has heard of all
            self.deliver(link)
        for number in self.isles:
            self.contribute(number)

    # ---- what arrives

    def contribute(self, source: int) -> None:
        isle = self.isles[source]
        if isle.contributed:
            message = {"of": source, "step": isle.step, "base": (isle.began, isle.version)}
            for target in self.isles:
                self.send(source, target, BULK, message)

    def deliver(self, link: tuple[int, int, str]) -> None:
        source, target, kind = link
        message, isle = self.flying[link].popleft(), self.isles[target]
        if kind == BULK:
            key, known = (message["step"], message["of"]), (-1, INITIAL)
            if message["base"][0] >= isle.inbox.get(key, known)[0]:
                isle.inbox[key] = message["base"]
        elif message["type"] == "place":
            known = isle.places.get(source, {"began": 0})
            if message["began"] > known["began"]:  # see `Inbox.clear`
                isle.inbox = {
                    key: base for key, base in isle.inbox.items()
                    if key[1] != source or key[0] <= message["began"] or base[0] >= message["began"]
                }  # fmt: skip
            isle.places[source] = message
            for key, closing in message["closings"].items():
                isle.closings.setdefault(key, closing)
        elif message["type"] == "closing":
            isle.closings.setdefault(message["key"], message["closing"])
        elif message["type"] == "ask" and message["of"] == target:
            isle.asks.add(source)
        elif message["type"] == "want":
            key = message["step"], message["of"]
            if key in isle.inbox:
                passed = {"of": key[1], "step": key[0], "base": isle.inbox[key]}
                self.send(target, source, BULK, passed)

    # ---- an island

    def vote(self, isle: Isle) -> dict[str, Any]:
        reach = self.reach(isle.number)
        have = {str(j): [base.weight, base.name] for (step, j), (_, base) in isle.inbox.items()
                if step == isle.step and j != isle.number}  # fmt: skip
        isle.absent -= {int(j) for j in have}
        training = [j for j in reach if isle.places.get(j, {"trains": False})["trains"]]
        there = {str(j): isle.places[j]["began"] for j in training if j not in isle.absent}
        leaders = {j for j in map(int, there) if j < isle.number and isle.late > 1}
        isle.absent |= leaders
        there = {j: began for j, began in there.items() if int(j) not in leaders}
        ahead = {j for step, j in isle.inbox if step > isle.step}
        anew = {j for j, place in isle.places.items()
                if not place["trains"] or place["began"] >= isle.step}  # fmt: skip
        gone = ahead | anew | (set(self.isles) - set(reach))
        lost = sorted(gone - {isle.number})
        closing = isle.closings.get((isle.step, isle.version.name))
        return {"have": have, "closing": closing, "there": there, "lost": lost,
                "late": isle.late > 0}  # fmt: skip

    def poll(self, number: int) -> bool:
        """Let an island look around; whether it came further."""
        isle = self.isles[number]
        if not isle.trains:
            return self.enter(isle)
        at = Round(0, isle.step, isle.version, isle.contributed)
        found: Verdict = verdict(at, [self.vote(isle)], number)
        if found.astray is not None:
            self.astray.append((number, isle.version))
            isle.trains, isle.late = False, 0
            self.say(number, isle.place())
            return True
        for j in found.wanted:
            self.say(number, {"type": "want", "of": j, "step": isle.step})
        if found.islands is None:
            return False
        if found.closed:
            closing = {"base": isle.version.name, "by": number, "islands": list(found.islands)}
            isle.closings[isle.step, isle.version.name] = closing
            key = isle.step, isle.version.name
            self.say(number, {"type": "closing", "key": key, "closing": closing})
            isle.absent |= set(found.missed)
            self.missed += len(found.missed)
        self.apply(isle, found.islands)
        return True

    def apply(self, isle: Isle, islands: tuple[int, ...]) -> None:
        known = set(isle.inbox) | {(isle.step, isle.number)}
        assert {(isle.step, j) for j in islands} <= known, "applied what has not come"
        self.applied[isle.number][isle.version.name, isle.step] = islands
        isle.version = isle.version.after(isle.step, islands)
        for asker in sorted(isle.asks):  # handed over at a commit
            if asker not in self.dead and not self.isles[asker].trains:
                self.hand_over(isle, self.isles[asker])
        isle.asks.clear()
        isle.step, isle.late = isle.step + EVERY, 0
        self.say(isle.number, isle.place())
        self.contribute(isle.number)

    def hand_over(self, donor: Isle, taker: Isle) -> None:
        taker.trains, taker.began, taker.late = True, donor.step, 0
        taker.version, taker.step = donor.version, donor.step + EVERY
        taker.absent = set()
        self.say(taker.number, taker.place())
        self.contribute(taker.number)

    def enter(self, isle: Isle) -> bool:
        """Ask the lowest that trains, or be the one that the others ask."""
        reach = self.reach(isle.number)
        training = [j for j in reach if isle.places.get(j, {"trains": False})["trains"]]
        if training:
            donor = self.isles[min(training)]
            if isle.number not in donor.asks:
                self.send(isle.number, donor.number, CONTROL, {"type": "ask", "of": donor.number})
            return False
        waiting = [self.isles[j] for j in reach if not self.isles[j].trains]
        if len(waiting) < len(reach):
            return False  # somebody trains, and has not been heard of yet
        if all((o.step, -o.number) < (isle.step, -isle.number) for o in waiting):
            isle.trains, isle.began = True, max(isle.began, isle.step - EVERY)
            self.say(isle.number, isle.place())
            self.contribute(isle.number)
            return True
        return False

    # ---- what happens

    def die(self, number: int) -> None:
        """What it has sent arrives or not, each link up to some message."""
        self.dead.add(number)
        for (source, target, _), queue in self.flying.items():
            if target == number:
                queue.clear()
            elif source == number:
                for _ in range(self.chance.randint(0, len(queue))):
                    queue.pop()
        for isle in self.isles.values():
            isle.asks.discard(number)

    def come_back(self, number: int) -> None:
        """Empty-handed."""
        self.dead.discard(number)
        self.isles[number] = Isle(number, trains=False, step=0)
        self.applied[number] = {}
        self.say(number, self.isles[number].place())
        self.repeat(number)

    def mend(self, pair: frozenset[int]) -> None:
        self.cut.discard(pair)
        for number in pair - self.dead:
            self.repeat(number)

    def repeat(self, number: int) -> None:
        """Others tell a newcomer where they are, and bring what they have sent last."""
        for j in self.reach(number):
            isle = self.isles[j]
            self.send(j, number, CONTROL, isle.place())
            if isle.trains and isle.contributed:
                message = {"of": j, "step": isle.step, "base": (isle.began, isle.version)}
                self.send(j, number, BULK, message)

    def happens(self) -> None:
        """Something arrives, or somebody looks around."""
        links = self.links()
        if links and self.chance.random() < 0.7:
            self.deliver(self.chance.choice(links))
        else:
            self.poll(self.chance.choice([j for j in self.isles if j not in self.dead]))

    def settle(self, rounds: int) -> None:
        """Nothing goes wrong any more, all train at one speed, for so many rounds of all.

        Patience ends only where without it nobody would come further; that is counted."""
        goal, still = max(isle.step for isle in self.isles.values()) + rounds * EVERY, 0
        for _ in range(100 * rounds * len(self.isles)):
            while links := self.links():
                self.deliver(self.chance.choice(links))
            living = [self.isles[j] for j in self.isles if j not in self.dead]
            least = min([isle.step for isle in living if isle.trains], default=0)
            if all(isle.trains and isle.step == least >= goal for isle in living):
                return
            slow = [each for each in living if each.step == least or not each.trains]
            moved = any([self.poll(isle.number) for isle in slow])
            still = 0 if moved else still + 1
            if still > 2:
                self.patience += 1
                for isle in slow:
                    isle.late += 1
        told = [replace(isle, closings={}, inbox={}, places={}) for isle in self.isles.values()]
        raise AssertionError(f"islands wait for ever: {told}")
