"""Peers of an exchange, ended with their test."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlast.cluster.timing import Timing

sys.path.insert(0, str(Path(__file__).parent))
from exchange_peers import KEY, TIMING, Handmade, Rank

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
