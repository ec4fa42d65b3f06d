"""Parity in rounds: the bytes of whole units, a few buffers, and an end at any moment."""

import os
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from outlast.checkpoint.code import Code
from outlast.checkpoint.memory import StateMemory, checksum, memory_bytes
from outlast.checkpoint.protection import record_stripes
from outlast.checkpoint.records import ParityRecord, Protection, Role, StateShape
from outlast.cluster.errors import GenerationChanged, PeerLost
from outlast.cluster.view import Member, View, Worker
from outlast.layout.layout import deal
from outlast.layout.space import Space, Tensor
from outlast.layout.stripe import Piece, Stripe, stripes
from outlast.runtime import parity_stream
from outlast.runtime.collectives import Communicator
from outlast.runtime.link import Generation
from outlast.runtime.parity_stream import ParityStream, Stream
from outlast.runtime.redundancy import Redundancy
from outlast.runtime.shard_state import ShardState

sys.path.insert(0, str(Path(__file__).parent))
from gloo_peers import Peer, Peers
from thread_group import on_ranks

CHUNK = 256


def streams(sizes: Sequence[int]) -> list[torch.Tensor]:
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def cut(stream: torch.Tensor) -> Stream:
    """The stream in parts of odd lengths, some empty."""
    edges = sorted({0, 7, 64, 65, 1000, stream.numel()} & set(range(stream.numel() + 1)))
    parts = [stream[a:b] for a, b in pairwise(edges)]
    return Stream([stream[:0], *parts, stream[:0]])


def whole(stripe: Stripe, data: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """All parity rows of a stripe, encoded at once; holders are ranks."""
    units = [data[p.holder][p.start : p.stop].numpy() for p in stripe.data]
    rows = [np.empty(stripe.length, np.uint8) for _ in stripe.parity]
    Code(len(units), len(rows)).encode(units, rows)
    return rows


def check(
    made: Sequence[Stripe],
    data: Sequence[torch.Tensor],
    chunk: int = CHUNK,
    device: str = "cpu",
) -> list[int]:
    """Stream once on all ranks and compare every unit; bytes buffered by rank."""
    ranks = {rank: rank for rank in range(len(data))}

    def work(side: Communicator) -> int:
        rounds = ParityStream(made, ranks, side.rank, chunk)
        home = torch.full((rounds.bytes,), 255, dtype=torch.uint8)
        for _ in range(2):  # buffers are used again
            stream = cut(data[side.rank].to(device))
            sums = rounds.run(side, stream, home, rounds.post(side, stream))
        for unit, digest in zip(rounds.units, sums, strict=True):
            found = home[unit.offset : unit.offset + unit.stripe.length].numpy()
            assert np.array_equal(found, whole(unit.stripe, data)[unit.row])
            assert digest == checksum(found)
        assert len(rounds.units) == sum(side.rank in stripe.parity for stripe in made)
        return sum(buffer.numel() for buffer in rounds._buffers.values())

    return on_ranks(len(data), work, device)


@pytest.mark.parametrize(
    ("sizes", "m", "group"),
    [
        ([3000] * 4, 1, 16),
        ([3000, 1, 0, 2999, 64], 1, 16),
        ([3000] * 4, 2, 16),
        ([5000, 4000, 3000, 2000, 1000, 0], 2, 16),
        ([3000, 77, 2999, 640, 5], 3, 16),
        ([1000] * 8, 1, 4),
        ([900] * 7, 2, 4),
        ([100], 1, 16),
    ],
)
def test_units_are_those_of_whole_streams(sizes: list[int], m: int, group: int) -> None:
    made = stripes(
        dict(enumerate(sizes)), {rank: str(rank) for rank in range(len(sizes))}, m, group
    )
    check(made, streams(sizes))


def test_workers_of_a_node_and_mirrors() -> None:
    """Two nodes of two workers and one of one: lanes of three and two, copies of single runs."""
    sizes = [700, 800, 900, 1000, 1100]
    domains = dict(enumerate(["/a", "/a", "/b", "/b", "/c"]))
    made = list(stripes(dict(enumerate(sizes)), domains, 1))
    for holder, mirror in ((0, 2), (1, 4), (2, 4)):
        made.append(Stripe(len(made), (Piece(holder, 64, 600),), (mirror,), 576))
    check(made, streams(sizes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device")
@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_device_makes_the_same_units(m: int) -> None:
    made = stripes(dict.fromkeys(range(5), 3000), {rank: str(rank) for rank in range(5)}, m)
    check(made, streams([3000] * 5), device="cuda")


def test_planted_chunk_in_the_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stream.cut
    monkeypatch.setattr(Stream, "cut", lambda self, a, b: original(self, a - (a > 0), b - (a > 0)))
    made = stripes(dict.fromkeys(range(4), 3000), {rank: str(rank) for rank in range(4)}, 1)
    with pytest.raises(AssertionError):
        check(made, streams([3000] * 4))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_buffers_are_a_few_chunks(m: int) -> None:
    n, size = 6, 40 * CHUNK
    k = n - m
    made = stripes(dict.fromkeys(range(n), size), {rank: str(rank) for rank in range(n)}, m)
    limit = (3 * k + 2 * (m - 1)) * CHUNK
    assert max(check(made, streams([size] * n))) <= limit
    assert max(check(made, streams([size] * n), chunk=1 << 20)) > limit  # planted: all at once


# Interrupts, over real gloo.

# (m, exchanges before the stall): data and data; data, data, rows and rows.
STALLS = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]


def generation(main: Communicator, side: Communicator | None) -> Generation:
    members = [Member(f"a{i}", f"n{i}", "127.0.0.1", 1, (Worker(i, 0),)) for i in range(main.size)]
    made = Generation(View(1, tuple(members)), main, 0.0, 0.0, 0.0)
    if side is not None:
        made.side.set_result(side)
    return made


def state_of(numel: int) -> tuple[ShardState, Space]:
    space = Space.of([Tensor("a", (numel,), "float32")])
    shape = StateShape(space.fingerprint(), numel, (Role("param", "float32", 4),))
    file = os.memfd_create("parity-stream-test")
    os.ftruncate(file, memory_bytes(shape))
    state = ShardState(StateMemory(file, shape), space)
    os.close(file)
    return state, space


def protected(made: Generation, m: int, numel: int) -> tuple[Redundancy, ShardState]:
    """Redundancy of a rank whose state, step 3, is its rank everywhere."""
    state, space = state_of(numel)
    holders = [holder for holder, _ in made.nodes]
    layout = deal(space, holders, 64)
    state.memory.begin(0)
    state.adopt(0, 3, layout.runs(holders[made.communicator.rank]))
    for values in state.live("param"):
        values.fill_(made.communicator.rank)
    return Redundancy(state, made, layout, Protection(m)), state


def stall(peer: Peer, m: int, after: int, forget: bool = False) -> None:
    """Peer 3 leaves the rounds after so many exchanges; all are told, and interrupt.

    `after` -1: the side never comes up. With `forget` the side is not interrupted.
    """
    main, side = peer.connect(1, range(4)), None
    if after >= 0:
        side = peer.connect(2, range(4))
        if peer.number == 3:
            original, count = side.exchange, iter(range(after))

            def exchange(*arguments: object) -> object:
                if next(count, None) is None:
                    peer.say("stalls")
                    raise PeerLost("planted")
                return original(*arguments)  # type: ignore[arg-type]

            side.exchange = exchange  # type: ignore[assignment, method-assign]
    made = generation(main, side)
    redundancy, state = protected(made, m, 16 << 20)
    peer.on_told = lambda: peer.graveyard.bury(main) if forget else made.bury(peer.graveyard)
    peer.say("up")
    try:
        try:
            redundancy.start()
        finally:
            peer.told.wait()
        redundancy.finish()
    except (PeerLost, GenerationChanged) as end:
        peer.say([type(end).__name__, state.memory.parity.record(0) is None])


@pytest.mark.parametrize(("m", "after"), [(1, -1), *STALLS])
def test_an_interrupt_ends_the_thread_in_any_phase(m: int, after: int) -> None:
    with Peers(4, lambda peer: stall(peer, m, after)) as peers:
        assert [peers.hear(number) for number in range(4)] == ["up"] * 4
        if after >= 0:
            assert peers.hear(3) == "stalls"
        for number in range(4):
            peers.tell(number)
        for number in range(4):
            end, nothing = peers.hear(number)
            assert end in ("GenerationChanged", "PeerLost")
            assert nothing, "parity that is not whole was committed"


def test_planted_forgotten_side_hangs() -> None:
    with Peers(4, lambda peer: stall(peer, 1, 0, forget=True)) as peers:
        assert [peers.hear(number) for number in range(4)] == ["up"] * 4
        for number in range(3):
            peers.tell(number)
        with pytest.raises(AssertionError, match="said nothing"):
            peers.hear(1, within_s=2.0)


# The record.


@pytest.mark.parametrize("m", [1, 2])
def test_a_whole_step_is_committed_with_its_protection(m: int) -> None:
    numel = 1 << 12

    def work(main: Communicator) -> ParityRecord:
        made = generation(main, main)
        redundancy, state = protected(made, m, numel)
        redundancy.keep = (3, 0)
        redundancy.start()
        redundancy.finish()
        assert redundancy.keep == (3, 1)
        record = state.memory.parity.record(0)
        assert record is not None
        home = state.memory.parity.array(0, sum(unit.length for unit in record.units))
        for unit in record.units:
            held = home[unit.offset : unit.offset + unit.length]
            assert checksum(held) == unit.checksum
        return record

    records = on_ranks(4, work)
    shape = state_of(numel)[0].memory.shape
    made = record_stripes(shape, records[0])
    assert {(record.step, record.generation) for record in records} == {(3, 1)}
    assert {record.protection for record in records} == {Protection(m)}
    for rank, record in enumerate(records):
        units = {(unit.stripe, unit.row): unit.length for unit in record.units}
        assert units == {
            (stripe.index, row): stripe.length
            for stripe in made
            for row, holder in enumerate(stripe.parity)
            if holder == rank
        }


def test_a_failure_that_is_no_loss_is_not_taken_for_parity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(parity_stream, "_encode", lambda *_: 1 / 0)

    def work(main: Communicator) -> None:
        redundancy, _ = protected(generation(main, main), 1, 1 << 12)
        redundancy.start()
        with pytest.raises(AssertionError, match="died"):
            redundancy.finish()

    on_ranks(2, work)
