"""What one rank knows of the other islands: where their ranks are, what they own, what they closed.

Small messages come over the agents, in any thread, possibly twice and never in one order with those
of other ranks. So every message stands for itself, the newest of a rank counts, and everything is
said again when an agent of another island has come into reach.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.checkpoint.records import pack_runs, unpack_runs
from outlast.cluster.errors import Misuse
from outlast.cluster.view import field
from outlast.layout.run import Run

WAITING, TRAINING, DONE = "waiting", "training", "done"
KEPT_ROUNDS = 256  # closings, and questions
_ASK_AGAIN_S = 1.0

Closed = tuple[int, int, str]  # fragment, step, name of the base: a fork closes rounds of its own
Want = tuple[int, int, int, int]  # island that asks, fragment, step, island of the contribution


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank of an island listens, what it owns, and how far its island is.

    Args:
        team: of one generation of the island; `size` ranks have it.
        began: step at which the island began to take part.
        versions: of the outer parameters, by fragment; none of an island that is astray.
        settings: what all islands must have in common, and the model.
    """

    holder: int
    team: str
    size: int
    address: tuple[str, int]
    runs: tuple[Run, ...]
    step: int
    state: str
    began: int
    versions: tuple[str, ...]
    settings: str

    def as_json(self) -> dict[str, Any]:
        """A message."""
        return {
            "type": "place", "holder": self.holder, "team": self.team, "size": self.size,
            "host": self.address[0], "port": self.address[1], "runs": pack_runs(self.runs),
            "step": self.step, "state": self.state, "began": self.began,
            "versions": list(self.versions), "settings": self.settings,
        }  # fmt: skip

    @staticmethod
    def from_json(message: dict[str, Any], numel: int) -> "Place":
        """The inverse; raises Misuse."""
        try:
            runs = unpack_runs(message["runs"])
            versions = tuple(str(name) for name in message["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise Misuse(f"a place of another island: {error}") from error
        edges = [edge for run in runs for edge in (run.start, run.stop)]
        if not all(type(edge) is int for edge in edges) or edges != sorted(edges):
            raise Misuse("a place of another island: no runs in order")
        if edges and not 0 <= edges[0] <= edges[-1] <= numel:
            runs = ()  # of another model, which `settings` tells
        numbers = (field(message, name, int, 0, 1 << 62) for name in ("holder", "size", "step"))
        holder, size, step = numbers
        return Place(
            holder, field(message, "team", str), size,
            (field(message, "host", str), field(message, "port", int, 1, 65535)), runs, step,
            field(message, "state", str), field(message, "began", int), versions,
            field(message, "settings", str),
        )  # fmt: skip


class Neighbours:
    """The other islands.

    Args:
        numel: elements of the model.
        others: their numbers.
        say: tells all ranks of all other islands.
        began_anew: told of an island, and of the step from which it goes on with another state.
        changed: notified of everything that is heard.
    """

    def __init__(
        self,
        numel: int,
        others: Sequence[int],
        say: Callable[[dict[str, Any]], None],
        began_anew: Callable[[int, int], None],
        changed: threading.Condition,
    ) -> None:
        self._numel, self._say, self._began_anew, self.changed = numel, say, began_anew, changed
        self.others = tuple(others)
        self.closings: dict[Closed, dict[str, Any]] = {}
        self.asks: dict[int, tuple[str, int, int]] = {}  # island -> (name, donor, its ranks)
        self._answered: dict[str, None] = {}
        self.wants: dict[Want, None] = {}  # what others heard of and have not got
        self._asked: dict[str, float] = {}
        self._places: dict[int, dict[int, Place]] = {}  # island -> holder, newest last
        self._began: dict[int, int] = {}
        self.reach: tuple[int, ...] = ()  # islands
        self._mine: Place | None = None
        self.refused: deque[str] = deque(maxlen=64)

    # ---- what is heard, in the thread of the link

    def heard(self, island: int, message: dict[str, Any]) -> None:
        """A message of another island."""
        with self.changed:
            try:
                self._hear(island, message)
            except (Misuse, TypeError, ValueError, KeyError) as error:
                self.refused.append(f"a message of island {island}: {error}"[:300])
            self.changed.notify_all()

    def _hear(self, island: int, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "place":
            place = Place.from_json(message, self._numel)
            places = self._places.setdefault(island, {})
            if place.began > self._began.get(island, 0):
                self._began[island] = place.began
                self._began_anew(island, place.began)
            places.pop(place.holder, None)
            places[place.holder] = place
            for old in list(places)[: -2 * place.size - 8]:  # of workers that are gone
                del places[old]
            for closing in message.get("closings", ()):
                self._close(closing)
        elif kind == "closing":
            self._close(message)
        elif kind == "ask":
            name, donor = field(message, "name", str), field(message, "donor", int)
            self.asks[island] = (name, donor, field(message, "size", int, 1, 1 << 20))
        elif kind == "want":
            names = ("fragment", "step", "island")
            fragment, step, of = (field(message, name, int) for name in names)
            self.wants[island, fragment, step, of] = None
            for old in list(self.wants)[:-KEPT_ROUNDS]:
                del self.wants[old]

    def _close(self, message: dict[str, Any]) -> None:
        islands = field(message, "islands", list)
        there = range(len(self.others) + 1)
        if not all(type(j) is int and j in there for j in islands) or len({*islands}) < len(
            islands
        ):
            raise Misuse(f"a closing of another island: {islands} are no islands")
        names = {name: field(message, name, kind) for name, kind in (("base", str), ("by", int))}
        key = field(message, "fragment", int), field(message, "step", int), names["base"]
        self.closings.setdefault(key, {**names, "islands": islands})
        for old in list(self.closings)[:-KEPT_ROUNDS]:
            del self.closings[old]

    def reached(self, islands: Sequence[int], count: int) -> None:
        """Islands that are in reach now, or again."""
        with self.changed:
            self.reach = tuple(islands)
            # Who is lost may come back, long before its workers do: nobody waits for those it had.
            self._places = {j: known for j, known in self._places.items() if j in islands}
            self.changed.notify_all()
        self._repeat()

    # ---- what is said

    def here(self, place: Place) -> None:
        """Tell where this rank is."""
        self._mine = place
        self._repeat()

    def close(self, fragment: int, step: int, closing: dict[str, Any], say: bool) -> None:
        """Note, and tell, that a round is closed."""
        self.closings[fragment, step, closing["base"]] = closing
        if say:
            self._say({"type": "closing", "fragment": fragment, "step": step, **closing})

    def request(self, **message: Any) -> None:
        """Say something that nobody repeats; called often, it is said now and then."""
        now, key = time.monotonic(), str(message)
        if now >= self._asked.get(key, 0.0):
            self._asked = {other: at for other, at in self._asked.items() if at > now}
            self._asked[key] = now + _ASK_AGAIN_S
            self._say(message)

    def _repeat(self) -> None:
        if self._mine is not None:
            newest = list(self.closings.items())[-2 * max(8, len(self._mine.versions)) :]
            closings = [{"fragment": p, "step": step, **what} for (p, step, _), what in newest]
            self._say(self._mine.as_json() | {"closings": closings})

    # ---- what is known

    def places(self, island: int) -> list[Place]:
        """The ranks of an island, in the newest generation of which all are known."""
        with self.changed:
            known = list(self._places.get(island, {}).values())
        for newest in reversed(known):
            team = [place for place in known if place.team == newest.team]
            if len(team) == newest.size:
                return team
        return []

    def asking(self, me: int) -> list[str]:
        """Who asks island `me` for its state and could be given it: all ranks there are known."""
        with self.changed:
            asks = list(self.asks.items())
        return [name for island, (name, donor, size) in asks
                if donor == me and name not in self._answered
                and len(self.places(island)) == size]  # fmt: skip

    def take_up(self, name: str) -> int:
        """The island that asks so; it is answered once."""
        with self.changed:
            self._answered[name] = None
            return next(island for island, ask in self.asks.items() if ask[0] == name)

    def newest(self, state: str) -> dict[int, Place]:
        """Islands in reach that are in this state -> the rank that was heard of last.

        Also while not all of its ranks are known, as after a loss: that is its own affair.
        """
        with self.changed:
            found = {j: [*self._places.get(j, {}).values()][-1:] for j in self.reach}
        return {j: place for j, last in found.items() for place in last if place.state == state}

    def partners(self, within: int) -> dict[int, Place]:
        """Islands in reach that train, or are just about to: they have the outer parameters of this
        one and are less than `within` steps away, so they need nothing from anybody."""
        mine = self._mine
        about = {} if mine is None else {
            j: place for j, place in self.newest(WAITING).items()
            if place.versions == mine.versions and abs(place.step - mine.step) < within
        }  # fmt: skip
        return about | self.newest(TRAINING)
