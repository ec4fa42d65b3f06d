"""Parcels arrive whole, in order and at least once, whatever peers and strangers do meanwhile."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.cluster.wire import Session
from outlast.runtime.islands.exchange import (
    FRAME_BYTES,
    HEAD_BYTES_MAX,
    PARCEL_BYTES_MAX,
    STRANGERS_MAX,
    Exchange,
)

KEY = b"a key of the islands"
TIMING = Timing(heartbeat_s=0.05)  # a stalled peer is given up after 2 s
HASTY = Timing(heartbeat_s=0.02)
PATIENT = Timing(heartbeat_s=1.0)  # who ends a connection within LONG_S has a better reason
LONG_S = 30.0
# A rank of another island, which says what arrives: its number and its size.
RANK = """
import json, sys, time
from outlast.cluster.timing import Timing
from outlast.runtime.islands.exchange import Exchange

def arrived(header, payload):
    print(json.dumps([header["n"], len(payload)]), flush=True)

exchange = Exchange("127.0.0.1", sys.argv[1].encode(), arrived, Timing(heartbeat_s=0.05))
print(exchange.address[1], flush=True)
peer = json.loads(sys.stdin.readline())
big = bytes(48 << 20)
exchange.send(tuple(peer), ("big",), [({"n": n}, big) for n in range(20)])
sys.stdin.readline()
"""


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


@pytest.fixture
def start() -> Iterator[Callable[..., Rank]]:
    """Start ranks that end with the test."""
    ranks: list[Rank] = []

    def one(key: bytes = KEY, timing: Timing = TIMING) -> Rank:
        ranks.append(Rank(key, timing))
        return ranks[-1]

    yield one
    for rank in ranks:
        rank.exchange.close()


@pytest.fixture
def handmade() -> Iterator[Handmade]:
    peer = Handmade()
    yield peer
    peer.listening.close()
    if hasattr(peer, "connection"):
        peer.connection.close()


@pytest.fixture
def process() -> Iterator[Callable[[], tuple[subprocess.Popen[str], tuple[str, int]]]]:
    """Start ranks in processes of their own; the address of each."""
    started: list[subprocess.Popen[str]] = []

    def one() -> tuple[subprocess.Popen[str], tuple[str, int]]:
        command = [sys.executable, "-c", RANK, KEY.decode()]
        pipe = subprocess.PIPE
        rank = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        started.append(rank)
        assert rank.stdout is not None
        return rank, ("127.0.0.1", int(rank.stdout.readline()))

    yield one
    for rank in started:
        rank.send_signal(signal.SIGCONT)
        rank.kill()
        rank.communicate()


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def head(number: object, size: object) -> bytes:
    text = json.dumps({"size": size, "parcel": {"n": number}}).encode()
    return len(text).to_bytes(4, "big") + text


def test_parcels_of_every_size_arrive_whole_and_in_order(start: Callable[..., Rank]) -> None:
    a, b = start(), start()
    sizes = [0, 1, FRAME_BYTES - 200, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES, 0, 5_000_000]
    said = [({"n": n, "text": "é" * (n * 3000)}, os.urandom(size)) for n, size in enumerate(sizes)]
    a.exchange.send(b.address, ("all",), said)
    assert a.exchange.flush(LONG_S)
    assert b.got == said
    assert a.exchange.sent_bytes == b.exchange.received_bytes > sum(sizes)
    wait(lambda: a.exchange.received_bytes == b.exchange.sent_bytes > 0)


def test_both_directions_and_several_peers(start: Callable[..., Rank]) -> None:
    ranks = [start() for _ in range(4)]
    for a in ranks:
        for b in ranks:
            for topic in range(3):
                parcels = [({"n": n, "of": a.address[1], "on": topic}, b"xy") for n in range(5)]
                a.exchange.send(b.address, ("topic", topic), parcels)
    for a in ranks:
        assert a.exchange.flush(LONG_S)
    for b in ranks:
        for a in ranks:
            for topic in range(3):
                mine = [h["n"] for h, _ in b.got if (h["of"], h["on"]) == (a.address[1], topic)]
                assert mine == [0, 1, 2, 3, 4]


def test_what_has_not_begun_is_replaced(start: Callable[..., Rank], handmade: Handmade) -> None:
    a = start()
    for n in range(3):
        a.exchange.send(handmade.address, ("x",), [({"n": 10 + n}, b""), ({"n": 20 + n}, b"")])
        a.exchange.send(handmade.address, ("y", n), [({"n": 30 + n}, b"")])
    assert not a.exchange.flush(0.1)
    handmade.accept()
    assert [handmade.number() for _ in range(5)] == [12, 22, 30, 31, 32]
    handmade.answer(5)
    assert a.exchange.flush(LONG_S)


def test_what_has_begun_is_finished_first(start: Callable[..., Rank], handmade: Handmade) -> None:
    a = start()
    large = bytes(40 << 20)  # more than the connection takes while nobody reads it
    a.exchange.send(handmade.address, ("x",), [({"n": 0}, large)])
    handmade.accept()
    assert handmade.number() == 0
    a.exchange.send(handmade.address, ("x",), [({"n": 1}, b"")])
    a.exchange.send(handmade.address, ("x",), [({"n": 2}, b"")])
    handmade.connection.close()
    handmade.accept()
    assert handmade.number() == 0
    left = len(large) - handmade.payload
    while left > 0:
        left -= len(handmade.body())
    assert handmade.number() == 2


def test_what_is_not_answered_for_is_sent_again(
    start: Callable[..., Rank], handmade: Handmade
) -> None:
    a = start()
    a.exchange.send(handmade.address, ("x",), [({"n": n}, b"") for n in range(6)])
    handmade.accept()
    assert [handmade.number() for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    handmade.answer(1)
    handmade.answer(4)
    handmade.answer(4)
    time.sleep(0.1)
    handmade.connection.close()
    assert not a.exchange.flush(0.0)
    handmade.accept()
    assert [handmade.number() for _ in range(2)] == [4, 5]
    handmade.answer(2)
    assert a.exchange.flush(LONG_S)


@pytest.mark.parametrize("answer", [-1, 3, True, "1", None, 1 << 70])
def test_an_answer_that_cannot_be(
    start: Callable[..., Rank], handmade: Handmade, answer: object
) -> None:
    a = start(timing=PATIENT)
    a.exchange.send(handmade.address, ("x",), [({"n": n}, b"") for n in range(2)])
    handmade.accept()
    assert [handmade.number(), handmade.number()] == [0, 1]
    handmade.answer(answer)
    assert handmade.cut_off()
    assert not a.exchange.flush(0.0)  # nothing counts as handed over


def test_a_peer_that_comes_late(start: Callable[..., Rank]) -> None:
    a = start()
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = reserved.getsockname()
    a.exchange.send(address, ("x",), [({"n": 7}, b"late")])
    assert not a.exchange.flush(0.2)
    late = Handmade()
    late.listening.close()
    late.listening = socket.create_server(address)
    late.listening.settimeout(LONG_S)
    late.accept()
    assert late.number() == 7
    late.connection.close()
    late.listening.close()


def test_who_is_dropped_gets_nothing_more(start: Callable[..., Rank], handmade: Handmade) -> None:
    a, b = start(timing=PATIENT), start()
    a.exchange.send(handmade.address, ("x",), [({"n": 0}, bytes(20 << 20))])
    handmade.accept()
    a.exchange.keep([b.address])
    assert handmade.cut_off()
    assert a.exchange.flush(LONG_S)
    a.exchange.send(b.address, ("x",), [({"n": 1}, b"")])
    assert a.exchange.flush(LONG_S)
    assert b.numbers == [1]
    a.exchange.send(handmade.address, ("x",), [({"n": 2}, b"")])  # it may come back
    handmade.accept()
    assert handmade.number() == 2


def test_who_is_dropped_while_its_connection_fails_is_not_dialled(
    start: Callable[..., Rank],
) -> None:
    """A cancellation can be lost between the two ends of a connection, in one of fifty tries."""
    a = start()
    with contextlib.ExitStack() as stack:
        peers = [Handmade() for _ in range(250)]
        for peer in peers:
            stack.enter_context(peer.listening)
            a.exchange.send(peer.address, ("x",), [({"n": 0}, b"")])
            peer.accept()
            assert peer.number() == 0
            peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.connection.close()
            time.sleep(random.uniform(0, 0.0006))
            a.exchange.keep([])
        time.sleep(4 * TIMING.heartbeat_s)
        dialled, _, _ = select.select([peer.listening for peer in peers], [], [], 0)
        assert not dialled


@pytest.mark.parametrize(
    "peer", [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("a" * 300, 1), ("\ud800", 1), ("", 1)]
)
def test_an_address_that_is_none(start: Callable[..., Rank], peer: tuple[str, int]) -> None:
    a, b = start(), start()
    a.exchange.send(peer, ("x",), [({"n": 0}, b"")])
    a.exchange.send(b.address, ("x",), [({"n": 1}, b"")])
    wait(lambda: b.numbers == [1])
    assert not a.exchange.flush(0.2)
    a.exchange.keep([b.address])
    assert a.exchange.flush(LONG_S)


def test_a_stalled_process_holds_up_nobody(
    start: Callable[..., Rank],
    process: Callable[[], tuple[subprocess.Popen[str], tuple[str, int]]],
) -> None:
    a, b = start(), start()
    stalled, address = process()
    stalled.send_signal(signal.SIGSTOP)
    a.exchange.send(address, ("x",), [({"n": n}, bytes(8 << 20)) for n in range(4)])
    for n in range(20):
        a.exchange.send(b.address, ("x", n), [({"n": n}, bytes(100_000))])
    wait(lambda: b.numbers == [*range(20)])
    assert not a.exchange.flush(0.0)
    time.sleep(TIMING.busy_silence_s + TIMING.handshake_s)  # it is given up, dialled, given up
    stalled.send_signal(signal.SIGCONT)
    assert a.exchange.flush(LONG_S)
    assert stalled.stdout is not None
    heard = [json.loads(stalled.stdout.readline()) for _ in range(4)]
    assert heard == [[n, 8 << 20] for n in range(4)]


def test_a_killed_receiver_and_its_successor(
    start: Callable[..., Rank],
    process: Callable[[], tuple[subprocess.Popen[str], tuple[str, int]]],
) -> None:
    a = start()
    killed, address = process()
    parcels = [({"n": n}, bytes(8 << 20)) for n in range(20)]
    a.exchange.send(address, ("x",), parcels)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.kill()
    assert not a.exchange.flush(0.2)
    successor, address = process()
    a.exchange.keep([address])
    a.exchange.send(address, ("x",), parcels)
    assert a.exchange.flush(LONG_S)
    assert successor.stdout is not None
    assert [json.loads(successor.stdout.readline())[0] for _ in range(20)] == [*range(20)]


def test_of_a_killed_sender_only_whole_parcels_arrive(
    start: Callable[..., Rank],
    process: Callable[[], tuple[subprocess.Popen[str], tuple[str, int]]],
) -> None:
    a = start()
    sender, _ = process()
    assert sender.stdin is not None
    sender.stdin.write(json.dumps(a.address) + "\n")
    sender.stdin.flush()
    wait(lambda: a.exchange.received_bytes > 60 << 20)
    sender.kill()
    sender.wait()
    received = -1
    while received != a.exchange.received_bytes:
        received = a.exchange.received_bytes
        time.sleep(0.2)
    assert a.numbers == [*range(received // (48 << 20))]
    assert {len(payload) for _, payload in a.got} == {48 << 20}


def test_an_idle_connection_ends_and_the_next_begins(
    start: Callable[..., Rank], handmade: Handmade
) -> None:
    a = start(timing=HASTY)
    for n in range(2):
        a.exchange.send(handmade.address, ("x",), [({"n": n}, b"")])
        handmade.accept()
        assert handmade.number() == n
        handmade.answer(1)
        assert a.exchange.flush(LONG_S)
        assert handmade.cut_off()


def test_another_key(start: Callable[..., Rank]) -> None:
    a, b, stranger = start(), start(), start(b"another key")
    stranger.exchange.send(b.address, ("x",), [({"n": 0}, b"")])
    a.exchange.send(stranger.address, ("x",), [({"n": 1}, b"secret")])
    a.exchange.send(b.address, ("x",), [({"n": 2}, b"")])
    wait(lambda: b.numbers == [2])
    assert not a.exchange.flush(0.3)
    assert not stranger.exchange.flush(0.0)
    assert b.numbers == [2]
    assert stranger.got == []
    assert stranger.exchange.received_bytes < 1000  # who cannot prove it is sent no payload


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"", b"outlast", os.urandom(100_000)])
def test_strangers_are_cut_off(start: Callable[..., Rank], noise: bytes) -> None:
    a, b = start(), start()
    with socket.create_connection(b.address) as stranger:
        stranger.settimeout(LONG_S)
        with contextlib.suppress(ConnectionError):
            stranger.sendall(noise)
            while stranger.recv(1000):
                pass
    a.exchange.send(b.address, ("x",), [({"n": 0}, b"")])
    assert a.exchange.flush(LONG_S)
    assert b.numbers == [0]


def test_many_strangers_keep_nobody_out_for_long(start: Callable[..., Rank]) -> None:
    a, b = start(), start()
    with contextlib.ExitStack() as stack:
        for _ in range(3 * STRANGERS_MAX):
            stack.enter_context(socket.create_connection(b.address))
        wait(lambda: b.exchange._strangers >= STRANGERS_MAX)
        a.exchange.send(b.address, ("x",), [({"n": 0}, b"")])
        assert a.exchange.flush(LONG_S)
        assert b.exchange._strangers <= STRANGERS_MAX
    assert b.numbers == [0]


HOSTILE = {
    "no head": b"\x00",
    "empty head": bytes(4),
    "head beyond its frame": (1000).to_bytes(4, "big") + b"{}",
    "head too large": (HEAD_BYTES_MAX + 1).to_bytes(4, "big") + b" " * (HEAD_BYTES_MAX + 1),
    "head of no JSON": (3).to_bytes(4, "big") + b"{}}",
    "no object": (2).to_bytes(4, "big") + b"[]",
    "no size": (13).to_bytes(4, "big") + b'{"parcel":{}}',
    "size of a text": head(0, "1"),
    "size of a bool": head(0, True),
    "size below nothing": head(0, -1),
    "size beyond the limit": head(0, PARCEL_BYTES_MAX + 1),
    "more than it said": head(0, 2) + b"abc",
    "no header": (10).to_bytes(4, "big") + b'{"size":0}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_island(start: Callable[..., Rank], handmade: Handmade, body: bytes) -> None:
    b = start(timing=PATIENT)
    handmade.dial(b.address)
    handmade.say(head(1, 3) + b"ab", b"c")
    assert json.loads(handmade.body())["parcels"] in (0, 1)
    handmade.say(body)
    assert handmade.cut_off()
    assert b.got == [({"n": 1}, b"abc")]


def test_half_a_parcel_is_forgotten(start: Callable[..., Rank], handmade: Handmade) -> None:
    b = start()
    handmade.dial(b.address)
    handmade.say(head(0, 1 << 20) + bytes(1000), bytes(5000))
    assert json.loads(handmade.body()) == {"parcels": 0}
    handmade.connection.close()
    handmade.dial(b.address)
    handmade.say(head(1, 2) + b"ab")
    assert json.loads(handmade.body()) == {"parcels": 1}
    assert b.got == [({"n": 1}, b"ab")]


def test_who_falls_silent_within_a_parcel_is_cut_off(
    start: Callable[..., Rank], handmade: Handmade
) -> None:
    b = start(timing=HASTY)
    handmade.dial(b.address)
    handmade.say(head(0, 1 << 20))
    assert handmade.cut_off()
    assert b.got == []


def test_an_announced_size_takes_no_memory(start: Callable[..., Rank], handmade: Handmade) -> None:
    b = start()
    handmade.dial(b.address)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[0])
    handmade.say(head(0, PARCEL_BYTES_MAX))
    handmade.body()
    with open("/proc/self/statm") as file:
        after = int(file.read().split()[0])
    assert (after - before) * os.sysconf("SC_PAGE_SIZE") < PARCEL_BYTES_MAX // 4


def test_a_parcel_that_is_too_large_is_not_queued(start: Callable[..., Rank]) -> None:
    a = start()
    with pytest.raises(ValueError, match="at most"):
        a.exchange.send(("127.0.0.1", 1), ("x",), [({"n": "x" * HEAD_BYTES_MAX}, b"")])
    assert a.exchange.flush(0.0)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(Misuse, match="cannot listen"):
        Exchange("192.0.2.1", KEY, lambda header, payload: None, TIMING)
