"""Files of torch.save: torch's are read, torch reads ours, and no byte of them can lie."""

import io
import os
import shutil
import struct
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint.dtypes import DTYPES, Values
from outlast.checkpoint.formats import torch_zip
from outlast.checkpoint.formats.folder import Folder
from outlast.checkpoint.formats.pickles import Opaque, TensorRef
from outlast.checkpoint.formats.torch_zip import ZipFolder, length, read, records, values, write
from outlast.checkpoint.pool import spread
from outlast.cluster.errors import Corrupt, Misuse
from outlast.layout.run import Run

PATTERN = torch.arange(24, dtype=torch.float32).reshape(4, 6) - 7


def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, and of every way to lie in a storage."""
    made = {name: PATTERN.abs().to(getattr(torch, name)) for name in DTYPES if name != "uint32"}
    return made | {
        "rows": PATTERN[1:3], "parameter": torch.nn.Parameter(PATTERN * 2),
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3),
    }  # fmt: skip


def bits(values: Any) -> bytes:
    if isinstance(values, torch.Tensor):
        return bytes(values.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return bytes(values.tobytes())


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saved_is_read(tmp_path: Path, protocol: int) -> None:
    made = tensors() | {"tied": PATTERN, "again": PATTERN}
    torch.save({"all": made, "step": 3}, tmp_path / "a.pt", pickle_protocol=protocol)
    folder = ZipFolder(tmp_path)
    got = read(folder, "a.pt")
    assert got["step"] == 3
    assert got["all"].keys() == made.keys()
    for name, ref in got["all"].items():
        assert (ref.dtype, ref.shape) == (str(made[name].dtype)[6:], tuple(made[name].shape))
        assert bits(values(folder, ref)) == bits(made[name]), name
    assert got["all"]["tied"] == got["all"]["again"]  # one storage


def test_a_check_ends_when_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may be larger than what is read in a minute."""
    blocks, begun = list[int](), threading.Event()

    def read_into(self: Folder, name: str, offset: int, out: Any) -> None:
        blocks.append(offset)
        begun.set()
        time.sleep(0.002)

    def fail(tick: Any) -> None:
        begun.wait()
        raise Misuse("enough")

    monkeypatch.setattr(Folder, "read_into", read_into)
    folder = ZipFolder(tmp_path)
    folder.expect("a.pt", torch_zip.Record("data/0", 0, 0, 1 << 32, 0))
    first = np.empty(1, np.uint8)
    tasks = [("read", lambda tick: folder.read_into("a.pt", 0, first)), ("fail", fail)]
    with pytest.raises(Misuse, match="enough"):
        list(spread(tasks, 2, lambda size: None))
    assert len(blocks) < 500  # of 1024


@pytest.mark.parametrize("name", ["a\0b", "a\ud800"])
@pytest.mark.parametrize("follow", [False, True])
def test_what_cannot_be_a_name_is_refused(tmp_path: Path, name: str, follow: bool) -> None:
    with pytest.raises(Corrupt, match="no name of a file"):
        Folder(tmp_path, follow).size(name)


def small() -> tuple[dict[str, Any], dict[str, torch_zip.Fill]]:
    """Something to write: an object with tensors, and what is in their storages."""
    made = {name: PATTERN.to(getattr(torch, name)) for name in ("float32", "bfloat16", "uint8")}
    value: dict[str, Any] = {name: TensorRef.of(name, (4, 6), name) for name in made}
    value["part"] = TensorRef("float32", (2, 3), "float32", 24, 3, (6, 1))
    value["none"] = TensorRef.of("float32", (0,), "none")
    value |= {"scale": Opaque("torch.device", ("cpu",)), "names": OrderedDict(a=[1, (2.5, None)])}
    flat = {name: np.frombuffer(bits(tensor), DTYPES[name]) for name, tensor in made.items()}
    return value, {name: _fill(flat[name]) for name in flat} | {"none": _fill(np.zeros(0))}


def _fill(held: Values) -> torch_zip.Fill:
    return lambda start, stop: held[start:stop]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(tmp_path: Path, mmap: bool) -> None:
    value, storages = small()
    write(tmp_path / "a.pt", value, storages)
    assert (tmp_path / "a.pt").stat().st_size == length(value)
    got = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    for name in ("float32", "bfloat16", "uint8"):
        assert torch.equal(got[name], PATTERN.to(getattr(torch, name)))
    assert torch.equal(got["part"], PATTERN.flatten()[3:].as_strided((2, 3), (6, 1)))
    assert got["part"].untyped_storage().data_ptr() == got["float32"].untyped_storage().data_ptr()
    assert got["names"] == value["names"]
    assert got["scale"] == torch.device("cpu")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:  # every checksum
        assert archive.testzip() is None
    for record in records(Folder(tmp_path), "a.pt").values():
        assert record.offset % 64 == 0


def test_files_follow_each_other_in_one(tmp_path: Path) -> None:
    value, storages = small()
    with (tmp_path / "a").open("wb") as file:
        file.write(b"before")
        torch_zip.append(file, value, storages)
        torch_zip.append(file, value, storages)
    base = 6 + length(value)
    got = read(ZipFolder(tmp_path), "a", base, length(value))
    assert base < got["float32"].offset < base + length(value)
    with (tmp_path / "a").open("rb") as file:
        file.seek(base)
        assert torch.load(io.BytesIO(file.read()), weights_only=True)["names"] == value["names"]


def test_storages_are_asked_for_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "_BLOCK", 100)
    asked: list[tuple[int, int]] = []

    def fill(start: int, stop: int) -> Values:
        asked.append((start, stop))
        return np.arange(start, stop, dtype=np.float32)

    ticks: list[int] = []
    write(tmp_path / "a.pt", TensorRef.of("float32", (250,), "0"), {"0": fill}, ticks.append)
    assert asked == [(0, 100), (100, 200), (200, 250)]
    assert sum(ticks) == 1000
    assert torch.load(tmp_path / "a.pt", weights_only=True).sum() == sum(range(250))
    with pytest.raises(Misuse, match="storage 0"):
        write(tmp_path / "b.pt", TensorRef.of("float64", (250,), "0"), {"0": fill})


def test_a_tensor_is_a_piece(tmp_path: Path) -> None:
    torch.save({"whole": PATTERN, "turned": PATTERN.T}, tmp_path / "a.pt")
    got = read(Folder(tmp_path), "a.pt")
    piece = got["whole"].piece(Run(7, 2, 6, 3), skip=4)
    assert (piece.file, piece.offset) == ("a.pt", got["whole"].offset + 16)
    for ref, run in ((got["turned"], Run.of(0, 24)), (got["whole"], Run.of(0, 25))):
        with pytest.raises(Corrupt):
            ref.piece(run)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zip")
    value, storages = small()
    write(directory / "ours.pt", value, storages)
    torch.save({name: PATTERN.to(getattr(torch, name)) for name in ("float32", "bfloat16")},
               directory / "torch.pt")  # fmt: skip
    return directory


def everything(directory: Path, name: str) -> dict[str, Any]:
    folder = ZipFolder(directory)
    found = read(folder, name)
    if not isinstance(found, dict):
        raise Corrupt("no dict")
    return {str(key): _held(folder, value) for key, value in found.items()}


def _held(folder: Folder, value: Any) -> Any:
    if isinstance(value, TensorRef) and value.shape != (2, 3):
        return value.dtype, value.shape, bits(values(folder, value))
    return repr(value) if not isinstance(value, TensorRef) else value.shape


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["ours.pt", "torch.pt"]), st.integers(0, 10**6), st.integers(0, 7))
def test_no_flipped_bit_changes_what_is_read(written: Path, name: str, at: int, bit: int) -> None:
    data = bytearray((written / name).read_bytes())
    data[at % len(data)] ^= 1 << bit
    (written / "flipped").mkdir(exist_ok=True)
    (written / "flipped" / name).write_bytes(data)
    try:
        got: Any = everything(written / "flipped", name)
    except Corrupt as error:
        got = str(error)
    placed = isinstance(got, str) and got.startswith(f"{written / 'flipped' / name} at byte ")
    assert placed or got == everything(written, name)


def test_a_record_is_checked_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.arange(1 << 20), tmp_path / "a.pt")
    folder, checked, check = ZipFolder(tmp_path), [], ZipFolder._check
    ref = read(folder, "a.pt")

    def count(self: ZipFolder, name: str, record: torch_zip.Record) -> None:
        checked.append(record.name)
        check(self, name, record)

    def part(start: int) -> int:
        out = np.empty(1 << 16, np.int64)
        folder.read_into("a.pt", ref.offset + start * 8, out.view(np.uint8))
        return int((out - start - np.arange(1 << 16)).any())

    monkeypatch.setattr(ZipFolder, "_check", count)
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(part, range(0, 1 << 20, 1 << 16)))
    assert checked == ["a/data/0"]


def test_the_flip_would_be_seen_without_checksums(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can go red: without the comparison, a flipped bit changes a value."""
    data = bytearray((written / "ours.pt").read_bytes())
    data[read(Folder(written), "ours.pt")["float32"].offset] ^= 1
    (written / "flipped").mkdir(exist_ok=True)
    (written / "flipped" / "ours.pt").write_bytes(data)
    with pytest.raises(Corrupt, match="checksum"):
        everything(written / "flipped", "ours.pt")
    monkeypatch.setattr(ZipFolder, "_check", lambda self, name, record: None)
    assert everything(written / "flipped", "ours.pt") != everything(written, "ours.pt")


@pytest.mark.parametrize("size", [0, 10, 21, 22, 200, -1])
def test_a_file_that_is_cut_off_is_refused(written: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "a.pt").write_bytes((written / "torch.pt").read_bytes()[:size])
    with pytest.raises(Corrupt, match="not a zip file"):
        read(Folder(tmp_path), "a.pt")


def rewritten(source: Path, target: Path, **kinds: Any) -> None:
    """The same records through another writer of zips, some of them otherwise."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            label = name.rpartition("/")[2].replace(".", "_")
            data = kinds.get(f"data_{label}", old.read(name))
            if data is not None:
                new.writestr(name, data, kinds.get(f"kind_{label}", zipfile.ZIP_STORED))
        for name, data in kinds.get("more", []):
            new.writestr(name, data)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind_data_pkl": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"kind_0": zipfile.ZIP_DEFLATED, "data_0": b"\0" * 10**6}, "compressed"),
        ({"data_0": b"\0" * 95}, "no storage '0' of 96 bytes"),
        ({"data_0": b"\0" * 97}, "no storage '0' of 96 bytes"),
        ({"data_0": None}, "no storage '0' of 96 bytes"),
        ({"data_data_pkl": None}, "not a file of torch.save"),
        ({"data_byteorder": b"big"}, "big-endian"),
        ({"more": [("other/data.pkl", b"N.")]}, "not a file of torch.save"),
        ({"more": [("torch/data/0", b"\0" * 96)]}, "not what its end says"),
    ],
)  # fmt: skip
def test_zips_that_torch_does_not_write_are_refused(
    written: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    rewritten(written / "torch.pt", tmp_path / "same.pt")
    assert read(Folder(tmp_path), "same.pt").keys() == {"float32", "bfloat16"}
    rewritten(written / "torch.pt", tmp_path / "a.pt", **changes)
    with pytest.raises(Corrupt, match=why):
        read(Folder(tmp_path), "a.pt")


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    """As in a zip bomb: many entries for one record."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/data/0", b"\0" * 4)
        archive.filelist[0].header_offset = archive.filelist[1].header_offset
        archive.filelist[0].filename = archive.filelist[0].orig_filename = "a/data/1"
    with pytest.raises(Corrupt, match="starts here"):
        read(Folder(tmp_path), "a.pt")
    crc, body = zlib.crc32(b"N."), b"N."
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, 2, 2, 1, 0) + b"a"

    def entry(at: int, size: int) -> bytes:
        fixed = (20, 20, 0, 0, 0, 0, crc, size, size, 1, 0, 0, 0, 0, 0, at)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fixed) + b"a"

    inner = head + head + body
    directory = entry(0, len(head) + 2) + entry(len(head), 2)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(directory), len(inner), 0)
    (tmp_path / "b.pt").write_bytes(inner + directory + end)
    with pytest.raises(Corrupt, match="overlaps"):
        records(Folder(tmp_path), "b.pt")


def test_files_of_old_are_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(PATTERN, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Corrupt, match="save it again"):
        read(Folder(tmp_path), "a.pt")


def test_links_do_not_lead_out(written: Path, tmp_path: Path) -> None:
    shutil.copy(written / "torch.pt", tmp_path / "outside.pt")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(Corrupt, match="leads out"):
        read(Folder(tmp_path / "inside"), "a.pt")
    assert read(Folder(tmp_path / "inside", follow=True), "a.pt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(Corrupt, match="not a zip file"):
        read(Folder(tmp_path), "a.pt")
