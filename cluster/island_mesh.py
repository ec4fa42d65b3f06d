"""The links between the agents of different islands, over which their workers' small messages go.

An island is a job of its own: nothing here is agreed with the others, nobody waits for them, and an
agent that is in no view yet takes part. Every agent dials the endpoints of all islands, tells whom
it is linked to, and dials the agents of other islands that it hears of so. Each is known by
"island/agent", which its key has authenticated.

Invariant: what is said may be lost with a link and is never repeated here. Instead `reached` is
called whenever a link to another island is made, or somebody there has just begun to listen:
whoever has something to say then says all of it again.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from outlast.cluster.endpoints import Endpoints
from outlast.cluster.errors import Misuse
from outlast.cluster.link import CLOSED, ITSELF
from outlast.cluster.links import Links
from outlast.cluster.roster import Address
from outlast.cluster.timing import Timing
from outlast.cluster.view import field

KNOWN_MAX = 1024  # agents of other islands


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which island this is, of which training.

    endpoints: of every island in their order, where its agents may listen.
    """

    job_id: str
    key: bytes
    island: int
    endpoints: tuple[tuple[Address, ...], ...]

    def island_of(self, agent: str) -> int:
        """The island in an agent's name; raises Misuse if there is none."""
        number, slash, _ = agent.partition("/")
        known = number.isascii() and number.isdecimal() and int(number) < len(self.endpoints)
        if not (slash and known):
            raise Misuse(f"{agent!r} is of no island: give all of them the same --island-endpoints")
        return int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who is told; called from the event loop, must not block.

    heard(island, message): somebody of another island has said this.
    reached(islands, count): these others are in reach now; everything has to be said again. `count`
    grows with every call.
    refused(cause): what is dialled or dials is no island of this training.
    """

    heard: Callable[[int, dict[str, Any]], None]
    reached: Callable[[list[int], int], None]
    refused: Callable[[str], None]


class IslandMesh:
    """One agent's links to the agents of the other islands; `host` is where those reach it."""

    def __init__(
        self, place: Place, agent: str, host: str, timing: Timing, callbacks: Callbacks
    ) -> None:
        self.place, self.timing, self.callbacks = place, timing, callbacks
        self.refused = callbacks.refused
        self._name = f"{place.island}/{agent}"
        self._links = Links(self._name, f"{place.job_id}/islands", place.key, timing, self)
        everywhere = tuple(dict.fromkeys(a for island in place.endpoints for a in island))
        self._endpoints = Endpoints(everywhere, timing)
        self._address = (host, 0)
        self._known: dict[str, tuple[Address, float]] = {}  # and when it was last heard of
        self._linked: dict[str, float] = {}  # and when it was last heard
        self._strange: dict[Address, str] = {}  # what answers there, if it has said more than no
        self._islands: list[int] = []
        self._count = 0
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticked = self._beaten = 0.0

    async def start(self) -> None:
        """Listen at an endpoint of this island if one can be bound here, else anywhere; dial."""
        host = self._address[0]
        own = [*self.place.endpoints[self.place.island], self._address]
        listening = await self._links.listen(own, host)
        self._address = (host, listening[1])
        self._ticked = time.monotonic()
        self._endpoints.linked(listening, self._name, self._ticked)
        self._tick()

    async def stop(self) -> None:
        """Close every connection and the listening socket."""
        if self._timer is not None:
            self._timer.cancel()
        await self._links.close()

    def say(self, message: dict[str, Any]) -> None:
        """To all agents of all other islands that are linked now."""
        self._tell({"kind": "said", "message": message})

    def ask(self) -> None:
        """Have the others say everything again: somebody here has just begun to listen."""
        self._tell({"kind": "again"})

    def _tell(self, message: dict[str, Any]) -> None:
        for agent in self._linked:
            if self.place.island_of(agent) != self.place.island:
                self._links.send(agent, message)

    # ---- what the links tell

    def connected(self, agent: str, dialled: Address | None) -> None:
        """See `Owner`."""
        now, island = self._now(), self.place.island_of(agent)
        self._linked[agent] = now
        self._endpoints.linked(dialled, agent, now)
        there = {name: self._known[name][0] for name in self._linked if name in self._known}
        self._links.send(agent, {"kind": "agents", "agents": {self._name: self._address, **there}})
        self._judge(now, again=island != self.place.island)

    def disconnected(self, agent: str, cause: str) -> None:
        """See `Owner`."""
        self._linked.pop(agent, None)
        self._endpoints.gone(agent)
        self._judge(self._now())

    def received(self, agent: str, dialled: Address | None, message: dict[str, Any]) -> None:
        """See `Owner`."""
        now, kind, island = self._now(), message.get("kind"), self.place.island_of(agent)
        self._linked[agent] = now
        if kind == "agents":
            self._learn(field(message, "agents", dict))
        elif kind == "again":
            self._asked = True  # answered once a tick, however many ask
        elif kind == "said" and island != self.place.island:
            self._judge(now)  # nobody hears of an island before it is in reach
            self.callbacks.heard(island, field(message, "message", dict))

    def unanswered(self, address: Address, cause: str, *, reached: bool) -> None:
        """See `Owner`."""
        now = time.monotonic()
        # Either end may be the first to close, and then knows more.
        if reached and (cause != CLOSED or address not in self._strange):
            self._strange[address] = cause
        if cause == ITSELF:
            self._endpoints.linked(address, self._name, now)
        elif self._endpoints.failed(address, reached, now):
            self.callbacks.refused(
                f"at {address[0]}:{address[1]} something else answers: {self._strange[address]} "
                "(--rdzv-id and key must be the same for all islands)"
            )

    # ---- who is where

    def _learn(self, agents: dict[str, Any]) -> None:
        """Where agents listen, as another one says; what is new is passed on, once."""
        now, fresh = time.monotonic(), {}
        for name, address in agents.items():
            self.place.island_of(name)
            host, port = address if isinstance(address, list) and len(address) == 2 else (0, 0)
            if type(host) is not str or type(port) is not int or not 0 < port < 65536:
                raise Misuse(f"{address!r} is no address of an agent")
            if name not in self._known and name != self._name and len(self._known) < KNOWN_MAX:
                self._known[name], fresh[name] = ((host, port), now), (host, port)
        for other in self._linked if fresh else ():
            self._links.send(other, {"kind": "agents", "agents": fresh})

    def _due(self, now: float) -> list[Address]:
        """Where agents of other islands may be that are not linked; the long lost are forgotten."""
        for name in self._linked:
            if name in self._known:
                self._known[name] = (self._known[name][0], now)
        limit = now - self.timing.join_s
        self._known = {name: entry for name, entry in self._known.items() if entry[1] >= limit}
        taken = {self._known[name][0] for name in self._linked if name in self._known}
        others = {
            address for name, (address, _) in self._known.items()
            if name not in self._linked and self.place.island_of(name) != self.place.island
        }  # fmt: skip
        return sorted(others - taken - {self._address})

    def _judge(self, now: float, *, again: bool = False) -> None:
        """Tell which islands are in reach if that has changed, or has to be told again."""
        limit = now - self.timing.silence_s
        heard = {
            self.place.island_of(agent) for agent, last in self._linked.items() if last >= limit
        }
        islands = sorted(heard - {self.place.island})
        if again or islands != self._islands:
            self._islands, self._count = islands, self._count + 1
            self.callbacks.reached(islands, self._count)

    def _now(self) -> float:
        """The time; if we were held up ourselves, no silence before it counts."""
        now = time.monotonic()
        if now - self._ticked > self.timing.late_tick_s:
            self._linked = dict.fromkeys(self._linked, now)
        return now

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.timing.tick_s, self._tick)
        self._ticked = now = self._now()
        asked, self._asked = self._asked, False
        self._judge(now, again=asked)
        self._links.retire()
        if now - self._beaten < self.timing.heartbeat_s:
            return
        self._beaten = now
        for agent in self._linked:
            self._links.send(agent, {"kind": "beat"})
        for address in dict.fromkeys([*self._endpoints.due(0, now), *self._due(now)]):
            self._links.dial(address)
