"""Strangers and hostile islands change nothing, and cost little."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.runtime.islands.exchange import STRANGERS_MAX
from outlast.runtime.islands.parcel import HEAD_BYTES_MAX, PARCEL_BYTES_MAX

sys.path.insert(0, str(Path(__file__).parent))
from exchange_peers import HASTY, LONG_S, PATIENT, Handmade, Rank, head, wait


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


def test_many_strangers_cost_little_and_keep_nobody_out_for_long(
    start: Callable[..., Rank],
) -> None:
    a, b = start(), start(timing=PATIENT)
    with contextlib.ExitStack() as stack:
        for _ in range(3 * STRANGERS_MAX):
            stack.enter_context(socket.create_connection(b.address))
        wait(lambda: b.exchange._strangers >= STRANGERS_MAX)
        a.exchange.send(b.address, ("x",), [({"n": 0}, b"")])
        a.exchange.flush(0.2)
        assert b.exchange._strangers <= STRANGERS_MAX
    assert a.exchange.flush(LONG_S)
    assert b.numbers == [0]


HOSTILE = {
    "no head": b"\x00",
    "empty head": bytes(4),
    "head beyond its frame": (1000).to_bytes(4, "big") + b"{}",
    "head too large": (HEAD_BYTES_MAX + 1).to_bytes(4, "big")
    + head(0, 0)[4:].ljust(HEAD_BYTES_MAX + 1),
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
