"""One connection between two agents: a `Session` over TCP, dull on purpose.

Both ends introduce themselves by agent id in their first frame. A connection that is not
introduced within `handshake_s` is closed, and so is one whose peer does not drain what is sent.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.cluster.wire import NONCE_BYTES, Rejected, Session

UNSENT_BYTES_MAX = 4 << 20
ITSELF, CLOSED = "this agent itself", "connection closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What every link of an agent shares: who it is, how it proves it, and whom it tells."""

    agent: str
    job_id: str
    key: bytes
    handshake_s: float
    opened: Callable[["Link"], bool]  # False: close it, there are too many
    introduced: Callable[["Link"], None]
    received: Callable[["Link", dict[str, Any]], None]
    closed: Callable[["Link", str], None]


class Link(asyncio.Protocol):
    """A connection; `dialled` is the address that this end dialled, None where it accepted."""

    transport: asyncio.Transport

    def __init__(self, ends: Ends, dialled: tuple[str, int] | None) -> None:
        self.ends = ends
        self.dialled = dialled
        self.peer = ""  # the agent at the other end, once introduced
        self.heard = time.monotonic()
        nonce = secrets.token_bytes(NONCE_BYTES)
        initiator = dialled is not None
        self._session = Session(ends.job_id, ends.key, nonce, initiator=initiator)
        self._greeted = False
        self._cause = ""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello, and give the peer `handshake_s` to answer."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.ends.opened(self):
            self.close("too many strangers")
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self.ends.handshake_s, self.close, "no handshake in time")
        transport.write(self._session.hello)

    def data_received(self, data: bytes) -> None:
        """Pass on what is complete and authentic; anything else ends the connection."""
        if self._cause:
            return
        self.heard = time.monotonic()
        try:
            messages = self._session.receive(data)
            if self._session.introduced and not self._greeted:
                self._greeted = True
                self.send({"kind": "introduce", "agent": self.ends.agent})
            for message in messages:
                if self._cause:
                    return
                self._take(message)
        except (Rejected, Misuse) as error:
            self.close(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner why, in the words of whichever end gave up."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.ends.closed(self, self._cause or (str(exc) if exc else CLOSED))

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; a peer that leaves `UNSENT_BYTES_MAX` undrained is cut off."""
        if self._cause or self.transport.is_closing():
            return
        self.transport.write(self._session.send(message))
        if self.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._cause = "does not drain its connection"
            self.transport.abort()

    def close(self, cause: str) -> None:
        """End the connection after what was queued; nothing more is received."""
        if not self._cause:
            self._cause = cause
            self.transport.close() if self.peer else self.transport.abort()

    def _take(self, message: dict[str, Any]) -> None:
        if self.peer:
            self.ends.received(self, message)
            return
        agent = message.get("agent")
        if message.get("kind") != "introduce" or type(agent) is not str or not 0 < len(agent) < 256:
            raise Rejected("no introduction")
        if agent == self.ends.agent:
            if self.dialled is not None:
                raise Rejected(ITSELF)
            self._cause = ITSELF  # the end that dialled must see it, so it is the one to close
            return
        self.peer = agent
        if self._deadline is not None:
            self._deadline.cancel()
        self.ends.introduced(self)
