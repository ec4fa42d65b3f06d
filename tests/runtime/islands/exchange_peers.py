"""Peers of an exchange: real ones that keep what arrives, and handmade ones that do anything."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from outlast.cluster.timing import Timing
from outlast.cluster.wire import Session
from outlast.runtime.islands.exchange import Exchange

KEY = b"a key of the islands"
TIMING = Timing(heartbeat_s=0.05)  # a stalled peer is given up after 2 s
HASTY = Timing(heartbeat_s=0.02)
PATIENT = Timing(heartbeat_s=1.0)  # who ends a connection within LONG_S has a better reason
LONG_S = 30.0


class Rank:
    """An exchange, and what has arrived there."""

    def __init__(self, key: bytes, timing: Timing) -> None:
        self.got: list[tuple[dict[str, Any], bytes]] = []
        self.exchange = Exchange("127.0.0.1", key, self._arrived, timing)
        self.address = self.exchange.address

    def _arrived(self, header: dict[str, Any], payload: memoryview) -> None:
        self.got.append((header, bytes(payload)))

    @property
    def numbers(self) -> list[int]:
        return [header["n"] for header, _ in self.got]


class Handmade:
    """A peer made of a socket and a session, which does what a test wants."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.settimeout(LONG_S)
        self.address = self.listening.getsockname()
        self._bodies: list[bytes] = []

    def accept(self) -> None:
        """Take the next connection, and prove to belong to the job."""
        self._meet(lambda: self.listening.accept()[0], initiator=False)

    def dial(self, address: tuple[str, int]) -> None:
        """Connect, and prove it likewise."""
        self._meet(lambda: socket.create_connection(address), initiator=True)

    def _meet(self, connect: Callable[[], socket.socket], *, initiator: bool) -> None:
        for _ in range(100):
            self.connection, self._bodies = connect(), []
            self.connection.settimeout(LONG_S)
            self.session = Session("islands", KEY, os.urandom(16), initiator=initiator)
            with contextlib.suppress(ConnectionError):  # on a busy machine it may be too late
                self.connection.sendall(self.session.hello)
                while not self.session.introduced:
                    self._take()
                self.say(b"")
                assert self.body() == b""
                return
        raise ConnectionError("never in time")

    def _take(self) -> None:
        data = self.connection.recv(1 << 20)
        if not data:
            raise ConnectionResetError
        self._bodies += self.session.unseal(data)

    def say(self, *bodies: bytes) -> None:
        self.connection.sendall(b"".join(self.session.seal(body) for body in bodies))

    def body(self) -> bytes:
        """The next body; ConnectionError at the end of the connection."""
        while not self._bodies:
            self._take()
        return self._bodies.pop(0)

    def number(self) -> int:
        """Of the parcel that begins in the next body."""
        body = self.body()
        start = 4 + int.from_bytes(body[:4], "big")
        self.payload = len(body) - start
        return json.loads(body[4:start])["parcel"]["n"]

    def answer(self, parcels: object) -> None:
        self.say(json.dumps({"parcels": parcels}).encode())

    def cut_off(self) -> bool:
        """Whether the other end ends the connection, whatever it says before."""
        with contextlib.suppress(ConnectionError):
            while True:
                self.body()
        return True


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def head(number: object, size: object) -> bytes:
    text = json.dumps({"size": size, "parcel": {"n": number}}).encode()
    return len(text).to_bytes(4, "big") + text
