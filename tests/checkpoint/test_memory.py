"""The two halves of a state memory: what a killed writer leaves, what a flipped bit does."""

import errno
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from outlast.checkpoint.memory import HALVES, StateMemory, checksum, memory_bytes
from outlast.checkpoint.records import (
    ParityRecord,
    ParityUnit,
    Protection,
    Role,
    SlotRecord,
    StateShape,
)
from outlast.cluster.errors import Corrupt, Misuse
from outlast.layout.run import Run

ROLES = (Role("param", "float32", 4), Role("exp_avg", "bfloat16", 2))
OWNED = (Run.of(10, 3000), Run.of(9000, 20_001))
MARKERS = 4 << 20  # one record region of the file


def shape(numel: int = 24_000) -> StateShape:
    return StateShape("model", numel, ROLES)


@pytest.fixture
def descriptor() -> Iterator[int]:
    fd = os.memfd_create("outlast-test")
    os.ftruncate(fd, memory_bytes(shape()))
    yield fd
    os.close(fd)


def pattern(step: int, role: Role, run: Run) -> np.ndarray:
    """Contents that no two steps, roles or runs share."""
    rng = np.random.Generator(np.random.PCG64([step, role.itemsize, run.start]))
    return np.frombuffer(rng.bytes(run.numel * role.itemsize), np.uint8)


def write(memory: StateMemory, half: int, step: int) -> None:
    for role in ROLES:
        for run in OWNED:
            memory.run_bytes(half, role, run)[:] = pattern(step, role, run)


def commit(memory: StateMemory, half: int, step: int) -> None:
    record = SlotRecord(step, 1, OWNED, OWNED, memory.sums(half, OWNED), {"step": step}, [0.5])
    memory.commit(half, record)


def store(memory: StateMemory, half: int, step: int) -> None:
    memory.begin(half)
    write(memory, half, step)
    commit(memory, half, step)


def newest(memory: StateMemory) -> int:
    """Newest step that is whole; AssertionError if a committed half does not hold its step."""
    found = -1
    for half in HALVES:
        record = memory.record(half)
        if record is None:
            continue
        assert not memory.torn(half, record), f"half {half} of step {record.step} is torn"
        for role in ROLES:
            for run in OWNED:
                same = memory.run_bytes(half, role, run) == pattern(record.step, role, run)
                assert same.all(), f"half {half} is not step {record.step}"
        found = max(found, record.step)
    return found


def test_a_half_is_readable_from_commit_to_the_next_begin(descriptor: int) -> None:
    memory = StateMemory(descriptor, shape())
    assert [memory.record(half) for half in HALVES] == [None, None]
    store(memory, 0, 1)
    record = memory.record(0)
    assert record is not None
    assert (record.step, record.owned, record.losses) == (1, OWNED, [0.5])
    assert memory.record(1) is None
    store(memory, 1, 2)
    assert newest(memory) == 2
    memory.begin(0)
    memory.begin(0)  # beginning again is no commit
    assert memory.record(0) is None
    assert newest(memory) == 2
    commit(memory, 0, 3)
    assert memory.torn(0, memory.record(0)) == []  # type: ignore[arg-type]


def test_another_mapping_of_the_file_reads_the_same(descriptor: int) -> None:
    store(StateMemory(descriptor, shape()), 1, 7)
    assert newest(StateMemory(descriptor, shape())) == 7


def test_a_short_file_is_refused(descriptor: int) -> None:
    os.ftruncate(descriptor, memory_bytes(shape()) - 1)
    with pytest.raises(Corrupt, match="expected"):
        StateMemory(descriptor, shape())


def test_every_flipped_bit_of_the_state_is_found(descriptor: int) -> None:
    memory = StateMemory(descriptor, shape())
    store(memory, 0, 1)
    record = memory.record(0)
    assert record is not None
    rng = random.Random(1)
    for _ in range(60):
        role, run = rng.choice(ROLES), rng.choice(OWNED)
        place, bit = rng.randrange(run.numel * role.itemsize), 1 << rng.randrange(8)
        data = memory.run_bytes(0, role, run)
        data[place] ^= bit
        assert memory.torn(0, record) == [(role.name, run)]
        data[place] ^= bit
    assert memory.torn(0, record) == []
    memory.array(0, ROLES[0])[:40] = 255  # nobody's elements
    assert memory.torn(0, record) == []


@pytest.mark.parametrize("parity", [False, True])
def test_every_flipped_bit_of_a_record_is_found(descriptor: int, parity: bool) -> None:
    memory = StateMemory(descriptor, shape())
    if parity:
        memory.parity.begin(0)
        unit = ParityUnit(0, 0, 0, 64, 9)
        memory.parity.commit(0, ParityRecord(3, 1, {}, {}, Protection(), (unit,)))
        read: Callable[[], object] = lambda: memory.parity.record(0)  # noqa: E731
    else:
        store(memory, 0, 1)
        read = lambda: memory.record(0)  # noqa: E731
    whole = read()
    assert whole is not None
    begin = 2 * MARKERS if parity else 0
    _, length, _ = struct.unpack("<QQQ", os.pread(descriptor, 24, begin))
    rng = random.Random(2)
    # The sequence number alone may change unseen: it is no data, only odd or even.
    places = [*range(begin + 8, begin + 24), *rng.choices(range(24, 24 + length), k=80)]
    for place in [p if p >= begin else begin + p for p in places]:
        (byte,) = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([byte ^ 1 << rng.randrange(8)]), place)
        assert read() is None, place
        os.pwrite(descriptor, bytes([byte]), place)
    assert read() == whole


def test_a_flipped_bit_of_parity_is_found(descriptor: int) -> None:
    memory = StateMemory(descriptor, shape())
    memory.parity.reserve(128)
    memory.parity.begin(1)
    home = memory.parity.array(1, 128)
    home[:] = np.arange(128)
    unit = ParityUnit(0, 0, 64, 64, checksum(home[64:]))
    memory.parity.commit(1, ParityRecord(3, 1, {}, {}, Protection(), (unit,)))
    record = memory.parity.record(1)
    assert record is not None
    assert record.units == (unit,)
    home[100] ^= 4
    assert checksum(memory.parity.array(1, 128)[64:]) != record.units[0].checksum
    assert memory.record(1) is None  # parity halves are not state halves


def parity_record(step: int, generation: int) -> ParityRecord:
    return ParityRecord(step, generation, {}, {}, Protection(), ())


@pytest.mark.parametrize(
    ("held", "keep", "spare"),
    [
        ([None, None], None, 0),
        ([(1, 1), None], (1, 1), 1),
        ([(1, 1), (2, 1)], (2, 1), 0),
        ([(3, 1), (2, 1)], (3, 1), 1),
        ([(2, 1), (3, 1)], (2, 1), 1),
        ([(2, 1), (2, 2)], (2, 1), 1),
        ([(2, 1), (2, 2)], None, 0),
    ],
)
def test_parity_goes_to_the_half_that_is_needed_least(
    descriptor: int, held: list[tuple[int, int] | None], keep: tuple[int, int] | None, spare: int
) -> None:
    parity = StateMemory(descriptor, shape()).parity
    for half, what in enumerate(held):
        if what:
            parity.begin(half)
            parity.commit(half, parity_record(*what))
    assert parity.spare(keep) == spare


def test_trim_gives_memory_back_and_keeps_what_is_owned(descriptor: int) -> None:
    memory = StateMemory(descriptor, shape())
    memory.reserve([Run.of(0, shape().numel)])
    for half in HALVES:
        store(memory, half, 4 + half)
    full = os.fstat(descriptor).st_blocks
    memory.trim(OWNED)
    kept = os.fstat(descriptor).st_blocks
    foreign = shape().numel - sum(run.numel for run in OWNED)
    pages = 2 * len(ROLES) * 2 * len(OWNED)  # borders: pages that are only partly foreign
    assert (full - kept) * 512 >= 2 * shape().element_bytes * foreign - pages * 4096
    assert kept < full
    assert newest(memory) == 5
    memory.trim(())
    assert memory.torn(0, memory.record(0))  # type: ignore[arg-type]
    assert not memory.array(0, ROLES[0]).any()


def test_reserve_allocates_all_that_a_step_writes(descriptor: int) -> None:
    memory = StateMemory(descriptor, shape())
    memory.reserve(OWNED)
    memory.parity.reserve(5000)
    store(memory, 0, 1)
    before = os.fstat(descriptor).st_blocks
    store(memory, 1, 2)
    memory.parity.array(0, 5000)[:] = 1
    record_pages = 2
    assert os.fstat(descriptor).st_blocks <= before + 8 * record_pages


def test_no_memory_is_a_refusal_that_says_what_to_do() -> None:
    """The limit on file sizes stands in for a full node. It acts on growing files alone, so the
    memory is cut behind the mapping; beyond the limit the kernel also sends SIGXFSZ, which
    would kill a process that does not ignore it, as Python does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
            fd = os.memfd_create("outlast-test")
            os.ftruncate(fd, memory_bytes(shape()))
            memory = StateMemory(fd, shape())
            os.ftruncate(fd, 4 * MARKERS)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MARKERS + 4096, resource.RLIM_INFINITY))
            try:
                memory.reserve(OWNED)
            except Misuse as refusal:
                said = str(refusal)
                told = "MiB of snapshot" in said and "free memory" in said and "ZeRO" in said
                named = os.strerror(errno.EFBIG) in said
                status = 0 if told and named else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# A writer that is killed.


def write_for_ever(fd: int, progress: mmap.mmap, put: Callable[[StateMemory, int, int], None]):
    memory = StateMemory(fd, shape())
    step = newest(memory)
    while True:
        step += 1
        put(memory, step % 2, step)
        struct.pack_into("<q", progress, 0, step)


def kill_writers(
    fd: int, put: Callable[[StateMemory, int, int], None], count: int, seed: int
) -> None:
    """Start a writer, kill it at a random instant, look at what it left; again and again."""
    rng, known = random.Random(seed), -1
    progress = mmap.mmap(-1, 8)
    struct.pack_into("<q", progress, 0, -1)
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(fd, progress, put)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while struct.unpack("<q", progress[:8])[0] <= known and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.004)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the writer failed by itself"
        promised = struct.unpack("<q", progress[:8])[0]
        found = newest(StateMemory(fd, shape()))
        assert promised >= known, "no step within the deadline"
        assert found >= promised, f"step {found} after step {promised} was committed"
        known = found


def test_a_writer_killed_at_any_instant_leaves_a_whole_step(descriptor: int) -> None:
    kill_writers(descriptor, store, 40, seed=sys.maxsize % 97)


def without_begin(memory: StateMemory, half: int, step: int) -> None:
    write(memory, half, step)
    commit(memory, half, step)


def one_half(memory: StateMemory, half: int, step: int) -> None:
    store(memory, 0, step)


def committed_first(memory: StateMemory, half: int, step: int) -> None:
    commit(memory, half, step)
    write(memory, half, step)
    commit(memory, half, step)


@pytest.mark.parametrize("flaw", [without_begin, one_half, committed_first])
def test_planted_flawed_writers_are_caught(
    descriptor: int, flaw: Callable[[StateMemory, int, int], None]
) -> None:
    with pytest.raises(AssertionError, match=r"torn|not step|after step"):
        kill_writers(descriptor, flaw, 60, seed=3)
