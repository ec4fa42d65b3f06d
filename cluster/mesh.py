"""Drives the membership machine with sockets and a clock; decides nothing itself.

The machine sees one event at a time: what a callback causes while its event is handled waits for
its turn. What the agent broadcasts reaches every member of the view, also one whose link is yet
to be made, because the members of a new view begin to speak before all their links are up.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import outlast.cluster.event as ev
from outlast.cluster.endpoints import Endpoints
from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import reach
from outlast.cluster.link import ITSELF
from outlast.cluster.links import Links
from outlast.cluster.membership import KINDS, VOTES, Membership
from outlast.cluster.roster import Address, Seats
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, field

SAID_MAX = 8192  # messages of a generation that a link made anew repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which job this is: `key` authenticates its agents, `endpoints` are where they meet."""

    job_id: str
    key: bytes
    endpoints: tuple[Address, ...]
    min_nodes: int
    max_nodes: int
    spares: int = 0

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise Misuse("no endpoint: give --rdzv-endpoint host:port")
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise Misuse(f"nodes {self.min_nodes}:{self.max_nodes}: give min:max, at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the agent is told; called from the event loop, must not block.

    on_install(view, detected, agreed, proposer): this agent is in the view; the times are
    `time.time()`.
    on_running(view): a job is running without this agent: describe() and request_join() once its
    workers are ready.
    on_described(member): the latest self-description of any other agent.
    on_failed(error): this mesh will never be in a view; the text says what to do.
    """

    on_install: Callable[[View, float, float, str], None]
    on_running: Callable[[View], None]
    on_described: Callable[[Member], None]
    on_message: Callable[[str, dict[str, Any]], None]
    on_suspect: Callable[[str, str, str], None]
    on_refused: Callable[[str], None]
    on_evicted: Callable[[], None]
    on_no_quorum: Callable[[], None]
    on_failed: Callable[[Misuse], None]


class Mesh:
    """The control plane of one agent, in its event loop."""

    def __init__(self, job: Job, me: Member, timing: Timing, callbacks: Callbacks) -> None:
        self.job = job
        self.me = me
        self.timing = timing
        self.callbacks = callbacks
        self.refused = callbacks.on_refused
        self._links = Links(me.agent, job.job_id, job.key, timing, self)
        seats = Seats(job.min_nodes, job.max_nodes, job.spares)
        self._machine = Membership(me, timing, seats, founder=False)
        self.detector = self._machine.detector  # of members that seem to be gone
        self._events: deque[ev.Event] = deque()
        self._endpoints = Endpoints(job.endpoints, timing)
        self._busy = False
        self._said: deque[dict[str, Any]] = deque(maxlen=SAID_MAX)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def view(self) -> View | None:
        """The latest view this agent knows of, with or without it."""
        return self._machine.view

    @property
    def members(self) -> dict[str, Member]:
        """The latest self-description of every agent that is known, this one included."""
        known = {a: p.member for a, p in self._machine.roster.peers.items() if p.member}
        return {**known, self.me.agent: self.me}

    async def start(self) -> Address:
        """Bind, listen and begin to dial; returns the control address that others dial.

        The agent that can bind the first endpoint founds the job if none is running; raises
        Misuse if this agent can listen nowhere.
        """
        own = (self.me.host, self.me.port)
        host, port = await self._links.listen([*self.job.endpoints, own], self.me.host)
        self._machine.founding.founder = (host, port) == self.job.endpoints[0]
        self.me = replace(self.me, port=port)
        self._endpoints.linked((host, port), self.me.agent, time.monotonic())
        self._endpoints.answered((host, port))
        self._handle(ev.Described(time.monotonic(), self.me))
        self._tick()
        return host, port

    def describe(self, member: Member) -> None:
        """Tell everybody the new description; a change of its shape becomes a new generation.

        The address is the mesh's own matter: host and port of `member` are not looked at.
        """
        self.me = replace(member, agent=self.me.agent, host=self.me.host, port=self.me.port)
        self._handle(ev.Described(time.monotonic(), self.me))

    def request_join(self) -> None:
        """From now on this agent wants to be in the view."""
        self._handle(ev.Ready(time.monotonic()))

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send a message to every other member of the view, queued while its link is down."""
        generation, view = self._machine.generation, self._machine.view
        said = {"kind": "said", "generation": generation, "message": message}
        self._said.append(said)
        for agent in view.agents if view else ():
            if agent != self.me.agent:
                self._links.send(agent, said)

    async def stop(self) -> None:
        """Say goodbye, close every connection and the listening socket."""
        if self._timer is not None:
            self._timer.cancel()
        for agent in self._machine.roster.connected():
            self._links.send(agent, {"kind": "leave"})
        self._machine.over = True
        await self._links.close()

    # ---- what the links tell

    def connected(self, agent: str, dialled: Address | None) -> None:
        """See `Owner`."""
        self._endpoints.linked(dialled, agent, time.monotonic())
        self._handle(ev.Connected(time.monotonic(), agent))
        # What was on a link that broke is gone, so everything is said again: it does no harm twice.
        for said in self._said if self.view and agent in self.view.agents else ():
            self._links.send(agent, said)

    def disconnected(self, agent: str, cause: str) -> None:
        """See `Owner`."""
        self._endpoints.gone(agent)
        self._handle(ev.Disconnected(time.monotonic(), agent, cause))

    def received(self, agent: str, dialled: Address | None, message: dict[str, Any]) -> None:
        """See `Owner`."""
        kind, view = message.get("kind"), self._machine.view
        if kind in KINDS:
            self._handle(ev.Received(time.monotonic(), agent, message))
            if kind == "beat":
                self._endpoints.answered(dialled)  # a running job's view comes before the beat
        elif kind == "said":
            old = field(message, "generation", int) < self._machine.generation
            said: dict[str, Any] = field(message, "message", dict)
            if not old or (view is not None and agent in view.agents):
                self.callbacks.on_message(agent, said)

    def unanswered(self, address: Address, cause: str, *, reached: bool) -> None:
        """See `Owner`."""
        now = time.monotonic()
        if cause == ITSELF:
            self._endpoints.linked(address, self.me.agent, now)
            reached = False
        taken = self._endpoints.failed(address, reached, now)
        if taken and self.view is None and not self._machine.over:
            self._machine.over = True
            place = f"at {address[0]}:{address[1]} something else answers: {cause}"
            advice = "choose another endpoint, or give all agents the same job id and key"
            self.callbacks.on_failed(Misuse(f"{place}: {advice}"))

    # ---- what the machine is told and asks for

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.timing.tick_s, self._tick)
        now = time.monotonic()
        self._handle(ev.Tick(now))
        if self._endpoints.asked:
            self._handle(ev.Asked(now))
        self._links.retire()
        period_s = self.timing.heartbeat_s if self.view else self.timing.tick_s
        for address in () if self._machine.over else self._endpoints.due(period_s, now):
            self._links.dial(address)

    def _handle(self, event: ev.Event) -> None:
        """Feed the machine and act; what the callbacks cause meanwhile waits for its turn."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                for action in self._machine.on(event):
                    self._act(action)
        finally:
            self._busy = False

    def _act(self, action: ev.Action) -> None:
        tell, wall = self.callbacks, time.time()
        match action:
            case ev.Send(to, message):
                if message["kind"] in VOTES:
                    reach("agree", kind=message["kind"], generation=message["generation"])
                self._links.send(to, message)
            case ev.Dial(host, port):
                self._links.dial((host, port))
            case ev.Install(view, proposer, detected):
                newer = [said for said in self._said if said["generation"] >= view.generation - 1]
                self._said = deque(newer, maxlen=SAID_MAX)
                tell.on_install(view, wall - (time.monotonic() - detected), wall, proposer)
            case ev.Running(view):
                tell.on_running(view)
            case ev.Learned(member):
                tell.on_described(member)
            case ev.Suspect(agent, node, cause):
                tell.on_suspect(agent, node, cause)
            case ev.Evicted():
                tell.on_evicted()
            case ev.NoQuorum():
                tell.on_no_quorum()
            case ev.Failed(reason):
                tell.on_failed(Misuse(reason))
