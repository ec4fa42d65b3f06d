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
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.cluster.errors import Misuse
from outlast.runtime.islands.exchange import Exchange
from outlast.runtime.islands.parcel import FRAME_BYTES, HEAD_BYTES_MAX

sys.path.insert(0, str(Path(__file__).parent))
from exchange_peers import HASTY, KEY, LONG_S, PATIENT, TIMING, Handmade, Rank, wait


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
def test_an_address_that_is_none(
    start: Callable[..., Rank], peer: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = start(), start()
    a.exchange.send(peer, ("x",), [({"n": 0}, b"")])
    a.exchange.send(b.address, ("x",), [({"n": 1}, b"")])
    wait(lambda: b.numbers == [1])
    assert not a.exchange.flush(0.2)
    a.exchange.keep([b.address])
    assert a.exchange.flush(LONG_S)
    assert not caplog.records  # nothing that was not foreseen


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


def test_a_parcel_that_is_too_large_is_not_queued(start: Callable[..., Rank]) -> None:
    a = start()
    with pytest.raises(ValueError, match="at most"):
        a.exchange.send(("127.0.0.1", 1), ("x",), [({"n": "x" * HEAD_BYTES_MAX}, b"")])
    assert a.exchange.flush(0.0)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(Misuse, match="cannot listen"):
        Exchange("192.0.2.1", KEY, lambda header, payload: None, TIMING)
