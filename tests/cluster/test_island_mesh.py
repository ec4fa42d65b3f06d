"""Agents of several islands in one event loop, over real sockets."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from outlast.cluster import island_mesh
from outlast.cluster.island_mesh import KNOWN_MAX, Callbacks, IslandMesh, Place
from outlast.cluster.links import Links
from outlast.cluster.roster import Address
from outlast.cluster.timing import Timing

HOST, KEY, JOB = "127.0.0.1", b"the key of all islands", "training"
TIMING = Timing(heartbeat_s=0.05)
WAIT_S = 20.0


def free(count: int) -> tuple[tuple[Address, ...], ...]:
    """So many islands with one endpoint each, which were free a moment ago."""
    holders = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return tuple(((HOST, port),) for port in ports)


class Agent:
    """A mesh and what it was told."""

    def __init__(self, name: str, endpoints: tuple[tuple[Address, ...], ...], **other: Any) -> None:
        island, agent = name.split("/")
        self.heard: list[tuple[int, dict[str, Any]]] = []
        self.reached: list[tuple[list[int], int]] = []
        self.refused: list[str] = []
        self.surprised = False
        place = Place(
            **{"job_id": JOB, "key": KEY, "island": int(island), "endpoints": endpoints} | other
        )
        self.mesh = IslandMesh(place, agent, HOST, TIMING, Callbacks(
            heard=self.hear,
            reached=lambda islands, count: self.reached.append((islands, count)),
            refused=self.refused.append,
        ))  # fmt: skip

    def hear(self, island: int, message: dict[str, Any]) -> None:
        self.heard.append((island, message))
        self.surprised |= island not in self.reach

    @property
    def reach(self) -> list[int]:
        return self.reached[-1][0] if self.reached else []

    @property
    def linked(self) -> set[str]:
        return set(self.mesh._linked)

    async def up(self) -> "Agent":
        await self.mesh.start()
        return self


class Foreigner:
    """Speaks as an agent of another island, and says whatever it is told to."""

    def __init__(self, name: str, key: bytes = KEY, job: str = JOB) -> None:
        self.links = Links(name, f"{job}/islands", key, TIMING, self)
        self.agents: list[str] = []
        self.messages: list[dict[str, Any]] = []
        self.ended: list[str] = []

    @property
    def known(self) -> dict[str, Any]:
        told = [m["agents"] for m in self.messages if m["kind"] == "agents"]
        return {name: address for agents in told for name, address in agents.items()}

    @property
    def said(self) -> list[Any]:
        return [m["message"] for m in self.messages if m["kind"] == "said"]

    def connected(self, agent: str, dialled: Address | None) -> None:
        self.agents.append(agent)

    def disconnected(self, agent: str, cause: str) -> None:
        self.ended.append(cause)

    def received(self, agent: str, dialled: Address | None, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def refused(self, cause: str) -> None:
        self.ended.append(cause)

    def unanswered(self, address: Address, cause: str, *, reached: bool) -> None:
        self.ended.append(cause)

    async def meet(self, address: Address) -> "Foreigner":
        self.links.dial(address)
        await until(lambda: self.agents or self.ended)
        return self

    def say(self, message: dict[str, Any]) -> None:
        self.links.send(self.agents[0], message)


async def until(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not what():
            await asyncio.sleep(0.005)


def run(work: Awaitable[None]) -> None:
    async def ended() -> None:
        try:
            await work
        finally:
            for agent in list(agents):
                await agent.mesh.stop()

    agents.clear()
    asyncio.run(ended())


agents: list[Agent] = []


async def up(name: str, endpoints: tuple[tuple[Address, ...], ...], **other: Any) -> Agent:
    agents.append(await Agent(name, endpoints, **other).up())
    return agents[-1]


def test_everybody_hears_all_other_islands_and_only_those() -> None:
    """Two agents of each island; only the first of each listens where the others were told."""

    async def work() -> None:
        endpoints = free(3)
        there = [await up(f"{i}/{name}", endpoints) for name in "ab" for i in range(3)]
        names = {agent.mesh._name for agent in there}
        for agent in there:
            island = agent.mesh.place.island
            others = {name for name in names if not name.startswith(str(island))}
            await until(lambda agent=agent, others=others: others <= agent.linked)
            assert agent.reach == sorted({0, 1, 2} - {island})
        for agent in there:
            agent.mesh.say({"from": agent.mesh._name})
        for agent in there:
            await until(lambda agent=agent: len(agent.heard) >= 4)
        await asyncio.sleep(TIMING.heartbeat_s)
        for agent in there:
            island = agent.mesh.place.island
            others = [name for name in names if not name.startswith(str(island))]
            told = sorted((i, message["from"]) for i, message in agent.heard)
            assert told == sorted((int(name[0]), name) for name in others)

    run(work())


def test_who_is_where_is_passed_on_and_own_agents_are_told_nothing_else() -> None:
    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        own = await Foreigner("0/x").meet(endpoints[0][0])
        own.say({"kind": "agents", "agents": {"0/x": [HOST, 9]}})
        await until(lambda: a.mesh._known)
        other = await Foreigner("1/y").meet(endpoints[0][0])
        await until(lambda: other.known == {"0/a": [*endpoints[0][0]], "0/x": [HOST, 9]})
        other.say({"kind": "agents", "agents": {"1/y": [HOST, 9]}})
        await until(lambda: own.known.get("1/y") == [HOST, 9])
        a.mesh.say({"hello": 1})
        own.say({"kind": "said", "message": {"from": "own"}})
        other.say({"kind": "said", "message": {"from": "other"}})
        await until(lambda: a.heard and other.said)
        await asyncio.sleep(2 * TIMING.tick_s)
        assert a.heard == [(1, {"from": "other"})]
        assert other.said == [{"hello": 1}]
        assert own.said == []

    run(work())


def test_an_island_that_went_and_came_is_told_everything_again() -> None:
    async def work() -> None:
        endpoints = free(2)
        a, b = await up("0/a", endpoints), await up("1/b", endpoints)
        await until(lambda: a.reach == [1] and b.reach == [0])
        count = a.reached[-1][1]
        await b.mesh.stop()
        await until(lambda: a.reach == [])
        c = await up("1/c", endpoints)
        await until(lambda: a.reach == [1] and c.reach == [0])
        counts = [number for _, number in a.reached]
        assert counts == sorted(set(counts))
        assert counts[-1] > count
        a.mesh.say({"again": 1})
        await until(lambda: c.heard)
        assert c.heard == [(0, {"again": 1})]

    run(work())


def test_every_new_link_to_another_island_is_told() -> None:
    """What was said before, its other end has not heard."""

    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        await Foreigner("1/x").meet(endpoints[0][0])
        await until(lambda: a.reach == [1])
        count = a.reached[-1][1]
        await Foreigner("1/y").meet(endpoints[0][0])
        await until(lambda: a.reached[-1][1] > count)
        assert a.reach == [1]

    run(work())


def test_who_begins_to_listen_has_the_others_repeat() -> None:
    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        foreigner = await Foreigner("1/x").meet(endpoints[0][0])
        await until(lambda: a.reach == [1])
        count = a.reached[-1][1]
        for _ in range(100):
            foreigner.say({"kind": "again"})
        await until(lambda: a.reached[-1][1] > count)
        assert a.reach == [1]
        assert a.reached[-1][1] < count + 100
        a.mesh.ask()
        await until(lambda: {"kind": "again"} in foreigner.messages)

    run(work())


@pytest.mark.parametrize("other", [{"key": b"some other key, long enough"}, {"job_id": "no"}])
def test_another_key_or_training_is_refused(other: dict[str, Any]) -> None:
    async def work() -> None:
        endpoints = free(2)
        a, b = await up("0/a", endpoints), await up("1/b", endpoints, **other)
        await until(lambda: a.refused and b.refused)
        assert not any([a.reached, b.reached, a.linked, b.linked])

    run(work())


@pytest.mark.parametrize("name", ["2/x", "x", "-1/x", "/x", "1", "\u0661/x"])
def test_an_agent_of_no_island_gets_no_link(name: str) -> None:
    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        foreigner = await Foreigner(name).meet(endpoints[0][0])
        await until(lambda: foreigner.ended)
        assert not any([a.linked, a.reached])

    run(work())


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "said"},
        {"kind": "said", "message": [1]},
        {"kind": "agents"},
        {"kind": "agents", "agents": {"9/x": [HOST, 1]}},
        {"kind": "agents", "agents": {"1/x": [HOST, 0]}},
        {"kind": "agents", "agents": {"1/x": [HOST, True]}},
        {"kind": "agents", "agents": {"1/x": [["h"], 1]}},
        {"kind": "agents", "agents": {"1/x": HOST}},
        {"kind": "agents", "agents": {"1/x": [HOST, 1, 2]}},
    ],
)
def test_nonsense_ends_the_link_and_changes_nothing(message: dict[str, Any]) -> None:
    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        foreigner = await Foreigner("1/x").meet(endpoints[0][0])
        await until(lambda: a.reach == [1])
        foreigner.say(message)
        await until(lambda: foreigner.ended and a.reach == [])
        assert not any([a.heard, a.mesh._known])

    run(work())


def test_what_one_claims_to_know_is_bounded() -> None:
    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        foreigner = await Foreigner("1/x").meet(endpoints[0][0])
        claims = {f"0/{index}": [HOST, 9] for index in range(2 * KNOWN_MAX)}
        foreigner.say({"kind": "agents", "agents": claims})
        foreigner.say({"kind": "said", "message": {}})
        await until(lambda: a.heard)
        assert len(a.mesh._known) == KNOWN_MAX

    run(work())


def test_silence_is_told_though_the_connection_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(island_mesh, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def work() -> None:
        endpoints = free(2)
        a = await up("0/a", endpoints)
        foreigner = await Foreigner("1/x").meet(endpoints[0][0])
        await until(lambda: a.reach == [1])
        began = clock[0]
        while a.reach:
            assert clock[0] - began < 2 * TIMING.silence_s
            clock[0] += TIMING.tick_s
            await asyncio.sleep(TIMING.tick_s)
        assert clock[0] - began > TIMING.silence_s
        assert a.linked == {"1/x"}
        foreigner.say({"kind": "said", "message": {}})
        await until(lambda: a.heard)
        assert not a.surprised
        await foreigner.links.close()
        await until(lambda: not a.reach)  # at once, and not after the same silence

    run(work())


def test_who_says_nothing_is_heard_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(island_mesh, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def work() -> None:
        endpoints = free(2)
        a, b = await up("0/a", endpoints), await up("1/b", endpoints)
        await until(lambda: a.reach == [1] and b.reach == [0])
        end = clock[0] + 2 * TIMING.silence_s
        while clock[0] < end:
            clock[0] += TIMING.tick_s
            await asyncio.sleep(2 * TIMING.tick_s)
        assert all(islands for agent in (a, b) for islands, _ in agent.reached)

    run(work())


def test_who_was_held_up_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(island_mesh, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def work() -> None:
        endpoints = free(3)
        a = await up("0/a", endpoints)
        b, _ = [await Foreigner(name).meet(endpoints[0][0]) for name in ("1/b", "2/c")]
        await until(lambda: a.reach == [1, 2])
        clock[0] += 10 * TIMING.silence_s
        b.say({"kind": "said", "message": {}})  # may be looked at before the next tick
        await until(lambda: a.heard)
        await asyncio.sleep(4 * TIMING.tick_s)
        # First one, then both, and never less again.
        assert sorted(a.reached, key=lambda told: len(told[0])) == a.reached
        assert a.reach == [1, 2]

    run(work())
