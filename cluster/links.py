"""All connections of one agent: it listens, dials, and has a place for each peer's links.

Between two agents there may be several links, when both dialled at once: each end sends on the
newest and hears on all, and a link that falls silent is retired, so no link is cut while the peer
may be speaking on it. A peer is connected from its first link to the end of its last. At most
`STRANGERS_MAX` connections wait for their introduction, each with a deadline.
"""

import asyncio
import time
from typing import Any, Protocol

from outlast.cluster.errors import Misuse
from outlast.cluster.link import ITSELF, Ends, Link
from outlast.cluster.roster import Address
from outlast.cluster.timing import Timing

STRANGERS_MAX = 64
LINKS_PER_PEER_MAX = 4
DIALS_MAX = 256


class Owner(Protocol):
    """Who is told; called from the event loop, must not block."""

    def connected(self, agent: str, dialled: Address | None) -> None:
        """There is a link to this agent, perhaps not the first."""

    def disconnected(self, agent: str, cause: str) -> None:
        """The last link to this agent is gone."""

    def received(self, agent: str, dialled: Address | None, message: dict[str, Any]) -> None:
        """A message of this agent; raises Misuse if it is none, which ends the link."""

    def refused(self, cause: str) -> None:
        """A stranger was dropped."""

    def unanswered(self, address: Address, cause: str, *, reached: bool) -> None:
        """A dial came to nothing; reached: something is there, but no agent of this job."""


class Links:
    """The listening socket and the links of one agent, which the job's key authenticates."""

    def __init__(self, agent: str, job_id: str, key: bytes, timing: Timing, owner: Owner) -> None:
        self.timing = timing
        self.owner = owner
        self._ends = Ends(
            agent=agent,
            job_id=job_id,
            key=key,
            handshake_s=timing.handshake_s,
            opened=self._opened,
            introduced=self._introduced,
            received=self._received,
            closed=self._closed,
        )
        self._links: dict[str, list[Link]] = {}
        self._strangers: set[Link] = set()
        self._dialling: dict[Address, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None

    async def listen(self, addresses: list[Address], own: str) -> Address:
        """Listen at the first of these that can be bound (port 0: any) and at `own`, the address
        that others are told, on the same port; raises Misuse if at none."""
        loop, cause = asyncio.get_running_loop(), ""
        for host, port in addresses:
            try:
                hosts = list(dict.fromkeys([host, own]))
                local = await asyncio.wait_for(self._local(hosts), self.timing.connect_s)
                bind = loop.create_server(lambda: Link(self._ends, None), local, port)
                self._server = await asyncio.wait_for(bind, self.timing.connect_s)
            except (OSError, TimeoutError) as error:
                cause = f"{host}:{port}: {error}"
                continue
            return host, self._server.sockets[0].getsockname()[1]
        raise Misuse(f"cannot listen at {cause}: give an address of this machine")

    def dial(self, address: Address) -> None:
        """Try to connect, unless a try is under way."""
        if address not in self._dialling and len(self._dialling) < DIALS_MAX:
            task = asyncio.get_running_loop().create_task(self._dial(address))
            self._dialling[address] = task
            task.add_done_callback(lambda _: self._dialling.pop(address, None))

    def send(self, agent: str, message: dict[str, Any]) -> bool:
        """Send on the newest link; False if there is none."""
        links = self._links.get(agent)
        if links:
            links[-1].send(message)
        return bool(links)

    def retire(self) -> None:
        """Close the links that have long been silent."""
        limit = time.monotonic() - self.timing.busy_silence_s
        for link in [link for links in self._links.values() for link in links]:
            if link.heard < limit:
                link.close("silent")

    async def close(self) -> None:
        """Stop listening and dialling, close all links; done within `connect_s`."""
        if self._server is not None:
            self._server.close()
        for task in list(self._dialling.values()):
            task.cancel()
        for link in self._all():
            link.close("closed here")
        deadline = time.monotonic() + self.timing.connect_s
        while self._all() and time.monotonic() < deadline:
            await asyncio.sleep(self.timing.poll_s / 10)
        for link in self._all():
            link.transport.abort()

    def _all(self) -> list[Link]:
        return [*self._strangers, *(link for links in self._links.values() for link in links)]

    async def _local(self, hosts: list[str]) -> list[str] | None:
        """What to bind for these hosts; None: everything, where a name of this machine stands in
        its own tables for the loopback, which others cannot reach."""
        for host in hosts:
            found = await asyncio.get_running_loop().getaddrinfo(host, None)
            loopback = all(str(info[4][0]).startswith(("127.", "::1")) for info in found)
            meant = host == "localhost" or host.startswith(("127.", "::1"))
            if loopback and not meant:
                return None
        return hosts

    async def _dial(self, address: Address) -> None:
        loop = asyncio.get_running_loop()
        connect = loop.create_connection(lambda: Link(self._ends, address), *address)
        try:
            await asyncio.wait_for(connect, self.timing.connect_s)
        except (OSError, TimeoutError) as error:
            self.owner.unanswered(address, str(error) or "no answer", reached=False)

    def _opened(self, link: Link) -> bool:
        accepted = sum(stranger.dialled is None for stranger in self._strangers)
        self._strangers.add(link)
        return link.dialled is not None or accepted < STRANGERS_MAX

    def _introduced(self, link: Link) -> None:
        self._strangers.discard(link)
        links = self._links.setdefault(link.peer, [])
        links.append(link)
        for old in links[:-LINKS_PER_PEER_MAX]:
            old.close("too many links between two agents")
        self.owner.connected(link.peer, link.dialled)

    def _received(self, link: Link, message: dict[str, Any]) -> None:
        self.owner.received(link.peer, link.dialled, message)

    def _closed(self, link: Link, cause: str) -> None:
        self._strangers.discard(link)
        links = self._links.get(link.peer, [])
        if link in links:
            links.remove(link)
            if not links:
                del self._links[link.peer]
                self.owner.disconnected(link.peer, cause)
        elif link.dialled is not None:
            self.owner.unanswered(link.dialled, cause, reached=True)
        elif cause != ITSELF:
            self.owner.refused(cause)
