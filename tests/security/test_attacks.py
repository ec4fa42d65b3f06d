"""The attacks that work on others, on real jobs: strangers and hostile bytes change nothing.

Rendezvous by pickle (torchrun), checkpoint metadata by pickle (torch's distributed checkpoints), a
flipped bit that loads silently, a save that dies half way: each ends here in a typed refusal, and
the job in the bits of an undisturbed run.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from training_job import ENVIRONMENT, TrainingJob, alone

from outlast.checkpoint.memory import StateMemory, memory_bytes
from outlast.checkpoint.records import Role, SlotRecord, StateShape
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run

SLOW = ("--pause", "0.1", "--steps", "24")
SHAPE = StateShape("model", 4096, (Role("param", "float32", 4),))
# What torchrun's own rendezvous reads with pickle.loads, from anybody who can open a connection.
WRITE_STORE = """
import sys, datetime
from torch.distributed import TCPStore
wait = datetime.timedelta(seconds=2)
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, timeout=wait)
store.set("torch.rendezvous.none", open(sys.argv[3], "rb").read())
"""


def bomb(mark: Path) -> bytes:
    """A pickle that leaves a file where it is unpickled."""
    return b"cos\nsystem\n(S'touch %b'\ntR." % bytes(mark)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[TrainingJob]:
    shape = ["--standalone", "--nnodes", "3", "--nproc-per-node", "1"]
    made = TrainingJob(tmp_path / "job", shape, list(SLOW))
    yield made
    made.stop()


def listening(job: TrainingJob) -> list[tuple[str, int]]:
    """Every TCP address that a process of the job accepts connections on."""
    root = psutil.Process(job.process.pid)
    tree = [root, *root.children(recursive=True)]
    found = {
        (connection.laddr.ip, connection.laddr.port)
        for process in tree
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    return sorted(found)


def test_bombs_on_every_port_change_nothing(job: TrainingJob, tmp_path: Path) -> None:
    """torchrun's rendezvous port runs what a stranger sends; here nobody unpickles anything."""
    job.wait_for_step(2)
    mark, file = tmp_path / "mark", tmp_path / "bomb"
    file.write_bytes(bomb(mark))
    places = listening(job)
    assert len(places) >= 3, "three agents listen"
    frame = struct.pack(">I", len(bomb(mark))) + bomb(mark)
    for address in places:
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(frame)
            stranger.sendall(b"\xff" * 4096)
    agents = [place for place in places if place[0] != "0.0.0.0"][:2]
    for host, port in agents:
        command = [sys.executable, "-c", WRITE_STORE, host, str(port), str(file)]
        wrote = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
        assert wrote.returncode != 0, "nobody here speaks TCPStore"
    assert job.end() == 0, job.output
    assert not mark.exists()
    assert job.events("refused_peer"), "strangers are on record"
    assert set(job.digests) == {alone(*SLOW[2:])}
    assert job.steps == list(range(1, 25))


def test_the_bomb_is_armed(tmp_path: Path) -> None:
    """Planted: where somebody does unpickle it, the file appears."""
    mark = tmp_path / "mark"
    (tmp_path / "bomb").write_bytes(bomb(mark))
    load = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "bomb")], check=True)
    assert mark.exists()


@pytest.fixture
def descriptor() -> Iterator[int]:
    made = os.memfd_create("outlast-attacked")
    os.ftruncate(made, memory_bytes(SHAPE))
    yield made
    os.close(made)


def forge(descriptor: int, body: bytes, mark: int = 0) -> None:
    """Write a committed record with a checksum that fits."""
    head = struct.pack("<QQQ", 2, len(body), xxhash.xxh3_64_intdigest(body))
    os.pwrite(descriptor, head + body, mark * (4 << 20))


def slot(**changed: object) -> bytes:
    """A record of a slot as JSON."""
    runs = (Run(0, 64),)
    record = SlotRecord(
        step=1, generation=1, owned=runs, held=runs, sums={"param": [0]}, scalars={}, losses=[]
    )
    return json.dumps(record.as_json() | changed).encode()


def test_a_sound_record_is_read(descriptor: int) -> None:
    """Planted: what is refused below is refused for what is wrong with it."""
    forge(descriptor, slot())
    record = StateMemory(descriptor, SHAPE).record(0)
    assert record is not None
    assert record.held == (Run(0, 64),)


@pytest.mark.parametrize(
    "body",
    [
        slot(held=[[0, 1 << 50]]),
        slot(owned=[[-5, 3]]),
        slot(held=[[10, 5]]),
        slot(surplus=1),
        slot(step=None, owned=7),
        b"[" * 100_000,
        b"{}",
        b"\x80\x04\x95",
    ],
)  # fmt: skip
def test_a_forged_record_is_refused(descriptor: int, body: bytes) -> None:
    forge(descriptor, body)
    with pytest.raises(Corrupt):
        StateMemory(descriptor, SHAPE).record(0)


def test_metadata_that_is_a_pickle_is_refused(descriptor: int, tmp_path: Path) -> None:
    """Loading a distributed checkpoint of torch runs its metadata; a record is only ever JSON."""
    mark = tmp_path / "mark"
    for index in range(4):
        forge(descriptor, bomb(mark), index)
    memory = StateMemory(descriptor, SHAPE)
    for half in (0, 1):
        with pytest.raises(Corrupt):
            memory.record(half)
        with pytest.raises(Corrupt):
            memory.parity.record(half)
    assert not mark.exists()


def test_parity_that_claims_to_lie_elsewhere_is_refused(descriptor: int) -> None:
    unit = {"stripe": 0, "row": 0, "offset": 1 << 40, "length": 64, "checksum": 0}
    record = {
        "step": 1, "generation": 1, "layout": {}, "domains": {}, "units": [unit],
        "protection": {"m": 1, "group": 16, "edges": []},
    }  # fmt: skip
    forge(descriptor, json.dumps(record).encode(), 2)
    with pytest.raises(Corrupt):
        StateMemory(descriptor, SHAPE).parity.record(0)


def test_state_flipped_in_memory_is_never_loaded(job: TrainingJob) -> None:
    """A flipped bit in a distributed checkpoint loads silently; here another source is taken."""
    job.wait_for_step(3)
    victim, agent = job.workers("node1")[0], job.agents()["node1"]
    holder = {m["node"]: m["workers"] for m in job.events("view")[-1]["members"]}["node1"][0]
    victim.send_signal(signal.SIGSTOP)
    flip_state(agent, holder)
    victim.kill()
    assert job.end() == 0, job.output
    assert {entry["holder"] for entry in job.events("corrupt")} == {holder}
    assert set(job.digests) == {alone(*SLOW[2:])}


def flip_state(agent: int, holder: int) -> None:
    """Flip the first byte that is not zero in each page of the state a worker leaves behind."""
    for entry in Path(f"/proc/{agent}/fd").iterdir():
        if f"outlast-{holder}" in os.readlink(entry):
            with entry.open("r+b") as file:
                at = os.lseek(file.fileno(), 4 * (4 << 20), os.SEEK_DATA)
                page = os.pread(file.fileno(), 4096, at)
                spot = next(i for i, byte in enumerate(page) if byte)
                os.pwrite(file.fileno(), bytes([page[spot] ^ 1]), at + spot)
            return
    raise AssertionError(f"agent {agent} holds no memory of {holder}")
