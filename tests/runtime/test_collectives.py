"""Real gloo groups whose members are killed, stopped and interrupted in the middle of things."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from outlast.cluster.errors import GenerationChanged, PeerLost
from outlast.cluster.timing import Timing
from outlast.runtime.collectives import Communicator

sys.path.insert(0, str(Path(__file__).parent))
from gloo_peers import PATIENT, Peer, Peers, descriptors_and_threads, settled

ENDS = {"PeerLost", "GenerationChanged"}
BIG = 3 << 20  # bytes per rank: far more than socket buffers take


def exchange(communicator: Communicator, size: int = BIG) -> torch.Tensor:
    """All-to-all of `size` bytes per rank, each with the sender's number."""
    ranks = communicator.size
    sent = torch.full((size * ranks,), communicator.rank, dtype=torch.uint8)
    received = torch.empty(size * ranks, dtype=torch.uint8)
    communicator.exchange(received, sent, [size] * ranks, [size] * ranks).wait()
    return received.view(ranks, size)


def outcome(communicator: Communicator, size: int = BIG) -> str:
    try:
        exchange(communicator, size)
    except (PeerLost, GenerationChanged) as end:
        return type(end).__name__
    return "done"


def exchange_until_the_end(peer: Peer) -> None:
    """Generation 1 until it ends, then one of the survivors, whose members the parent kills 2."""
    communicator = peer.connect(1, range(4))
    peer.on_told = lambda: peer.graveyard.bury(communicator)
    assert (exchange(communicator, 5) == torch.arange(4).unsqueeze(1)).all()
    peer.say("up")
    while (end := outcome(communicator)) == "done":
        continue
    peer.say(end)
    peer.told.wait()
    again = peer.connect(2, [0, 1, 3])
    peer.say([int(row[0]) for row in exchange(again, 5)])
    peer.say(again.gather_json({"i am": peer.number, "x" * peer.number: None}))
    peer.say(outcome(communicator))


def test_all_survive_a_kill_in_the_middle_of_an_exchange() -> None:
    with Peers(4, exchange_until_the_end) as peers:
        assert [peers.hear(number) for number in range(4)] == ["up"] * 4
        peers.kill(2)
        for number in (0, 1, 3):
            peers.tell(number)
        assert {peers.hear(number) for number in (0, 1, 3)} <= ENDS
        assert [peers.hear(number) for number in (0, 1, 3)] == [[0, 1, 2]] * 3
        for number in (0, 1, 3):
            assert [told["i am"] for told in peers.hear(number)] == [0, 1, 3]
            assert peers.hear(number) == "GenerationChanged"


def wait_for_one_that_does_not_come(peer: Peer) -> None:
    communicator = peer.connect(1, range(3))
    peer.on_told = communicator.interrupt
    peer.say("up")
    if peer.number:
        peer.say(outcome(communicator))
    else:
        peer.told.wait()
    peer.told.wait()
    communicator.interrupt()  # more than once does no harm
    peer.say(outcome(communicator))


def test_another_thread_interrupts_a_wait() -> None:
    with Peers(3, wait_for_one_that_does_not_come) as peers:
        assert [peers.hear(number) for number in range(3)] == ["up"] * 3
        for number in range(3):
            peers.tell(number)
        assert {peers.hear(number) for number in (1, 2)} <= ENDS
        assert {peers.hear(number) for number in range(3)} == {"GenerationChanged"}


def test_planted_forgotten_interrupt_hangs() -> None:
    with Peers(3, wait_for_one_that_does_not_come) as peers:
        assert [peers.hear(number) for number in range(3)] == ["up"] * 3
        with pytest.raises(AssertionError, match="said nothing"):
            peers.hear(1, within_s=2.0)


def interrupt_often(peer: Peer, keep: bool = False) -> None:
    """Twenty generations that hang and are interrupted; then one that works."""
    kept = []
    for generation in range(1, 21):
        communicator = peer.connect(generation, range(3))
        communicator.gather_bytes(b"")
        end = communicator.interrupt if keep else lambda c=communicator: peer.graveyard.bury(c)
        timer = threading.Timer(0.02, end)
        timer.start()
        if peer.number != generation % 3:
            assert outcome(communicator) in ENDS
        timer.join()
        if keep:
            kept.append(communicator)
        peer.store(generation).close()
        if generation == 2:
            del communicator, end, timer
            before = settled((0, 0), wait_s=1.5)
    communicator = end = timer = None  # type: ignore[assignment]
    after = settled((before[0] + 3, before[1] + 3), wait_s=2.0 if keep else 15.0)
    last = peer.connect(99, range(3))
    peer.say([before, after, outcome(last, 10)])


def check_leaks(peers: Peers) -> None:
    for number in range(3):
        before, after, end = peers.hear(number)
        assert end == "done"
        grown = [b - a for a, b in zip(before, after, strict=True)]
        assert max(grown) <= 3, f"descriptors and threads grew by {grown}"


def test_interrupted_groups_leave_nothing_behind() -> None:
    with Peers(3, interrupt_often) as peers:
        check_leaks(peers)


def test_planted_groups_that_are_kept_are_noticed() -> None:
    with (
        Peers(3, lambda peer: interrupt_often(peer, keep=True)) as peers,
        pytest.raises(AssertionError, match="grew"),
    ):
        check_leaks(peers)


def build_half(peer: Peer) -> None:
    """Peer 2 stops as soon as the others know its address, before it has dialled them.

    gloo does not let go of a peer that it expects to be dialled by, so the old generation is built
    in a thread of its own, which ends with its deadline; the new one does not wait for it.
    """
    peer.timing = Timing(heartbeat_s=0.1)
    if peer.number == 2:
        peer.after_publish = lambda: os.kill(os.getpid(), signal.SIGSTOP)
    ends: list[str] = []

    def build() -> None:
        try:
            peer.connect(1, range(3)).gather_bytes(b"")  # who dials is connected, nobody answers
        except (PeerLost, GenerationChanged) as end:
            ends.append(type(end).__name__)

    thread = threading.Thread(target=build)
    thread.start()
    peer.say("starting")
    peer.told.wait()
    peer.abandon(1)
    peer.timing = PATIENT
    peer.say(len(peer.connect(2, [0, 1]).gather_bytes(b"alive")))
    thread.join()
    peer.say(ends)


def test_a_half_built_group_is_no_obstacle_to_the_next() -> None:
    with Peers(3, build_half) as peers:
        assert [peers.hear(number) for number in range(3)] == ["starting"] * 3
        os.waitid(os.P_PID, peers.pids[2], os.WSTOPPED)
        threading.Event().wait(0.2)
        for number in (0, 1):
            peers.tell(number)
        assert [peers.hear(number) for number in (0, 1)] == [2, 2]
        ends = [peers.hear(number) for number in (0, 1)]
        assert all(len(end) == 1 and end[0] in ENDS for end in ends), ends


def missing_peer(peer: Peer) -> None:
    """Peer 2 never publishes anything."""
    peer.on_told = lambda: peer.abandon(1)
    peer.say("starting")
    if peer.number == 2:
        peer.told.wait()
        return
    try:
        peer.connect(1, range(3))
    except (PeerLost, GenerationChanged) as end:
        peer.say(type(end).__name__)


def test_a_wait_for_a_key_ends_with_its_generation() -> None:
    with Peers(3, missing_peer) as peers:
        assert [peers.hear(number) for number in range(3)] == ["starting"] * 3
        for number in (0, 1):
            peers.tell(number)
        assert {peers.hear(number) for number in (0, 1)} <= ENDS


def test_counting_sees_descriptors_and_threads() -> None:
    descriptors, threads = descriptors_and_threads()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    descriptor = os.dup(1)
    more = descriptors_and_threads()
    end.set()
    thread.join()
    os.close(descriptor)
    assert more[0] == descriptors + 1
    assert more[1] >= threads + 1
