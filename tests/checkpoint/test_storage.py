"""Steps on storage: other readers than writers get the same bytes, or an error that says where."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast.checkpoint.memory import StateMemory, checksum, memory_bytes
from outlast.checkpoint.records import Role, SlotRecord, StateShape
from outlast.checkpoint.storage import Storage
from outlast.cluster.errors import Corrupt, Misuse
from outlast.layout.run import Run

NUMEL = 20_000
SHAPE = StateShape("model", NUMEL, (Role("param", "float32", 4), Role("exp_avg", "bfloat16", 2)))
ORIGIN: dict[str, Any] = {"model": "model", "numel": NUMEL, "seed": 1}
# Holders of interleaved runs, as after losses: three writers, two readers.
WRITERS = [(Run.of(0, 5000), Run.of(9000, 9100)), (Run.of(5000, 9000),), (Run.of(9100, NUMEL),)]
READERS = [(Run.of(0, 8), Run.of(4990, 9050)), (Run.of(8, 4990), Run.of(9050, NUMEL))]


def memory() -> StateMemory:
    file = os.memfd_create("outlast-test")
    os.ftruncate(file, memory_bytes(SHAPE))
    try:
        return StateMemory(file, SHAPE)
    finally:
        os.close(file)


def contents(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    return {r.name: generator.integers(0, 256, NUMEL * r.itemsize, np.uint8) for r in SHAPE.roles}


def store(storage: Storage, step: int, generation: int = 1) -> Path:
    """All ranks write one step; the last of them publishes."""
    records = [write(storage, step, rank, generation) for rank in range(len(WRITERS))]
    return storage.publish(records)


def write(storage: Storage, step: int, rank: int, generation: int = 1) -> SlotRecord:
    source, runs = memory(), WRITERS[rank]
    for role in SHAPE.roles:
        source.array(1, role)[:] = contents(step)[role.name]
    record = SlotRecord(step, generation, runs, runs, source.sums(1, runs), {"step": 7.0}, [0.5])
    storage.write(rank, source, 1, record)
    return record


def load(storage: Storage, name: str, wanted: Sequence[Run]) -> StateMemory:
    home = memory()
    storage.read(storage.open(name), wanted, home, 0)
    return home


def check_same(storage: Storage, name: str, step: int) -> None:
    for wanted in READERS:
        home = load(storage, name, wanted)
        for role in SHAPE.roles:
            mine = np.zeros(NUMEL * role.itemsize, np.uint8)
            for run in wanted:
                span = slice(run.start * role.itemsize, run.stop * role.itemsize)
                mine[span] = contents(step)[role.name][span]
            assert (home.array(0, role) == mine).all(), "what it wants, and nothing else"


def test_other_readers_get_what_the_writers_had(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "deep" / "down", ORIGIN)
    assert storage.names() == []
    path = store(storage, 120)
    assert storage.names() == [path.name]
    stored = storage.open(path.name)
    assert stored.step == 120
    assert (stored.records[0].scalars, stored.records[0].losses) == ({"step": 7.0}, [0.5])
    check_same(storage, path.name, 120)


def test_a_step_is_there_when_all_of_it_is(tmp_path: Path) -> None:
    storage = Storage(tmp_path, ORIGIN)
    write(storage, 5, 0)
    write(storage, 5, 1)
    assert storage.names() == [], "the third rank died"
    first = store(storage, 5, generation=2)  # the next try
    assert storage.names() == [first.name]
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "and nothing of the other"
    assert store(storage, 5, generation=3) == first, "asked again, of the same step"
    for step in (8, 9):
        store(storage, step)
    assert [storage.open(name).step for name in storage.names()] == [9, 8]


def test_what_is_stored_again_replaces_what_was_damaged(tmp_path: Path) -> None:
    storage = Storage(tmp_path, ORIGIN)
    for step in (8, 9, 7):  # a run that went back behind damaged steps, and was stopped there
        path = store(storage, step)
    assert storage.names() == [f"step-{step:012}" for step in (9, 8, 7)], "the last one is kept"
    (path / "00001.state").write_bytes(b"")
    assert store(storage, 7, generation=4) == path
    check_same(storage, path.name, 7)


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    storage = Storage(tmp_path, ORIGIN)
    (tmp_path / "step-5000").mkdir()
    (tmp_path / "step-5000" / "model.pt").write_text("a user's")
    write(storage, 1, 0)  # and no more: the disk was full
    for step in (2, 3, 4):
        store(storage, step)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["step-000000000003", "step-000000000004", "step-5000"]


def test_a_renamed_step_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path, ORIGIN)
    store(storage, 3).rename(tmp_path / "step-000000000004")
    with pytest.raises(Corrupt, match="of step 3"):
        storage.open("step-000000000004")


def test_what_is_not_wanted_any_more_writes_no_more(tmp_path: Path) -> None:
    """A reader of a generation that is over must leave the memory alone: the next one trains."""
    storage, home = Storage(tmp_path, ORIGIN), memory()
    stored = storage.open(store(storage, 3).name)
    storage.read(stored, READERS[0], home, 0, wanted=lambda: False)
    assert not any(home.array(0, role).any() for role in SHAPE.roles)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    storage = Storage(tmp_path, ORIGIN)
    path, generator = store(storage, 3), random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        step = 1 if file.suffix == ".json" else 997
        for at in range(0, len(whole), step):
            bit = 1 << generator.randrange(8)
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(Corrupt, match=path.name):
                check_same(storage, path.name, 3)
        file.write_bytes(whole)
    check_same(storage, path.name, 3)


@pytest.mark.parametrize("harm", ["cut", "gone", "longer runs", "a hole", "mixed steps", "no list"])
def test_what_is_not_whole_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    storage = Storage(tmp_path, ORIGIN)
    path = store(storage, 3)
    file, manifest = path / "00001.state", path / "manifest.json"
    body = json.loads(manifest.read_text())["body"]
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "gone":
        file.unlink()
    elif harm == "longer runs":
        body["files"][1]["held"] = [[5000, 1 << 60]]
    elif harm == "a hole":
        del body["files"][1]
    elif harm == "mixed steps":
        body["files"][1]["step"] = 4
    elif harm == "no list":
        body["files"] = {"held": "x"}
    forged = {"checksum": checksum(json.dumps(body).encode()), "body": body}
    manifest.write_text(json.dumps(forged))
    everything = [Run.of(0, NUMEL)]
    with pytest.raises(Corrupt, match="step-000000000003"):
        load(storage, path.name, everything)


def test_the_step_of_another_run_is_not_taken(tmp_path: Path) -> None:
    name = store(Storage(tmp_path, ORIGIN), 3).name
    with pytest.raises(Misuse, match=r"seed 1.*--checkpoint-dir"):
        Storage(tmp_path, ORIGIN | {"seed": 2}).open(name)


def test_storage_that_is_full_or_forbidden_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match="step 3 cannot be stored"):
        write(Storage(tmp_path / "file", ORIGIN), 3, 0)


def test_a_checksum_of_other_bytes_is_no_excuse(tmp_path: Path) -> None:
    """Planted: a writer that stores another half than the record is about."""
    storage, records = Storage(tmp_path, ORIGIN), []
    for rank, runs in enumerate(WRITERS):
        source = memory()
        record = write(storage, 3, rank)
        storage.write(rank, source, 0, replace(record, held=runs))
        records.append(record)
    name = storage.publish(records).name
    with pytest.raises(Corrupt, match="at byte 0"):
        load(storage, name, READERS[0])
