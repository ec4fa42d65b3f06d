"""Steps on storage: listed when whole, on a disk and on an object store that may fail.

The object store is moto's S3 server, a process of its own, reached by s3fs through a gate that can
be shut: the connections break and new ones are refused, as when the server dies, and what it has
is still there afterwards.
"""

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs

from outlast.checkpoint import native
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values
from outlast.checkpoint.source import digest
from outlast.checkpoint.steps import Draft, Steps
from outlast.checkpoint.store import Bucket
from outlast.cluster.errors import Corrupt, Misuse

ARRAYS = (
    Array("param", "wte/x.weight", (1500, 3000), "float32"),  # two shards
    Array("param", "bias", (7,), "float32"),
    Array("exp_avg", "wte/x.weight", (1500, 3000), "bfloat16"),
)
TAG = "1-0123abcd"
LITTLE = (Array("param", "w", (40, 50), "float32"), Array("exp_avg", "w", (40, 50), "float32"))


def values(array: Array, step: int) -> Values:
    generator = np.random.default_rng([step, *array.key.encode()])
    raw = generator.integers(0, 1 << 15, array.numel, dtype=np.uint16)
    return raw.astype(native.dtype_of(array.dtype))


def contents(step: int, arrays: tuple[Array, ...] = LITTLE) -> Contents:
    return Contents(step, arrays)


def write(draft: Draft, rank: int, ranks: int, arrays: tuple[Array, ...] = LITTLE) -> None:
    """What one rank does: every so manieth shard."""
    notes: dict[str, dict[int, str]] = {}
    shards = [shard for array in arrays for shard in native.shards_of(array)]
    for shard in shards[rank % ranks :: ranks]:
        part = values(shard.array, draft.step)[shard.start : shard.stop]
        found = native.write_shard(draft.store, shard.array, shard.index, part)
        notes.setdefault(shard.array.key, {})[shard.index] = found
    draft.note(rank, notes)


def save(
    steps: Steps, step: int, ranks: int = 2, tag: str = TAG,
    arrays: tuple[Array, ...] = LITTLE,
) -> str:  # fmt: skip
    for rank in range(ranks):
        write(steps.draft(step, tag), rank, ranks, arrays)
    return steps.draft(step, tag).publish(contents(step, arrays))


def test_what_is_noted_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    draft = Steps(str(tmp_path)).draft(5, TAG)
    write(draft, 0, 1)
    files = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 2
    assert files <= synced


def check(steps: Steps, name: str, arrays: tuple[Array, ...] = LITTLE) -> int:
    """Read all of a step, and compare; its number."""
    source = steps.open(name)
    for array in arrays:
        expected = values(array, source.contents.step)
        assert source.read(array, 0, array.numel).tobytes() == expected.tobytes()
        assert digest(source, array) == source.stored_digest(array)
    source.close()
    return source.contents.step


# ---- an object store


class Gate:
    """Lets connections through to a server, until so many bytes have passed: then all break, and
    new ones do at once, until it is lifted."""

    def __init__(self, server: int) -> None:
        self._server, self._left = server, -1
        self._sockets: set[socket.socket] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def shut_after(self, size: int) -> None:
        self._left = size

    def lift(self) -> None:
        self._left = -1

    def _accept(self) -> None:
        while True:
            client, _ = self._socket.accept()
            server = socket.create_connection(("127.0.0.1", self._server))
            self._sockets |= {client, server}
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, origin: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while self._left and (data := origin.recv(1 << 16)):
                if self._left > 0:
                    self._left = max(self._left - len(data), 0)
                if self._left:
                    target.sendall(data)
            if self._left:
                target.shutdown(socket.SHUT_WR)
        if not self._left:
            while self._sockets:
                end = self._sockets.pop()
                with suppress(OSError):  # a reset, and whoever waits for it wakes
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.05)
        yield Gate(port)
        server.kill()


@pytest.fixture
def bucket(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL, as it is configured for every program that uses fsspec."""
    options = {
        "key": "nobody", "secret": "nothing",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{gate.port}",
                          "region_name": "eu-west-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 5, "read_timeout": 5},
    }  # fmt: skip
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    gate.lift()
    name = f"bucket-{random.getrandbits(60):x}"
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}/runs/a"
    gate.lift()


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "deep" / "down") if request.param == "disk" else (
        request.getfixturevalue("bucket"))  # fmt: skip


# ---- both


def test_any_ranks_write_and_anybody_reads(url: str) -> None:
    steps = Steps(url)
    assert steps.names() == []
    name = save(steps, 120, ranks=3, arrays=ARRAYS)
    assert Steps(url).names() == [name]
    assert check(Steps(url), name, ARRAYS) == 120
    assert not [file for file in steps.store.children(name) if file.startswith("__")]


def test_a_step_is_there_when_all_of_it_is(url: str) -> None:
    steps, reader = Steps(url), Steps(url)
    draft = steps.draft(5, TAG)
    write(draft, 0, 2)
    assert reader.names() == []
    write(draft, 1, 2)
    assert reader.names() == []
    draft.publish(contents(5))
    assert reader.names() == [draft.name]


def test_what_one_rank_did_not_write_is_not_published(url: str) -> None:
    steps = Steps(url)
    draft = steps.draft(5, TAG)
    write(draft, 0, 2)
    with pytest.raises(Misuse, match=r"step-0+5.*: nobody wrote shard 0 of exp_avg/w"):
        draft.publish(contents(5))
    write(draft, 1, 1)
    with pytest.raises(Misuse, match="two ranks wrote shard 0 of param/w"):
        draft.publish(contents(5))
    other = steps.draft(6, TAG)
    write(other, 0, 1, ARRAYS)
    with pytest.raises(Misuse, match="somebody wrote shard 0 of exp_avg/wte"):
        other.publish(contents(6, ARRAYS[:2]))
    assert Steps(url).names() == []
    steps.discard()
    assert steps.store.children() == []


def test_the_newest_steps_are_kept(url: str) -> None:
    steps = Steps(url, keep=2)
    steps.store.write("step-5000/model.pt", b"a user's")
    write(steps.draft(1, TAG), 0, 2)  # and no more: a rank died
    names = [save(steps, step, tag=f"{step}-0123abcd") for step in (8, 9, 10)]
    assert steps.names() == names[:0:-1]
    back = save(steps, 7, tag="11-0123abcd")  # a run that went back behind damaged steps
    assert steps.names() == [names[2], names[1], back]
    assert sorted(steps.store.children()) == sorted([back, *names[1:], "step-5000"])
    assert [check(steps, name) for name in steps.names()] == [10, 9, 7]


def test_the_same_step_is_written_again(url: str) -> None:
    steps = Steps(url)
    path = save(steps, 7)
    steps.store.write(f"{path}/param/w/c.0.0", b"damaged")
    with pytest.raises(Corrupt, match=r"param/w/c\.0\.0 at byte 7"):
        check(steps, path)
    for tag in ("2-0123abcd", "3-0123abcd"):
        again = save(steps, 7, tag=tag)
        assert (steps.names(), check(steps, again)) == ([again], 7)


def test_what_is_complete_stays_until_it_is_written_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(url, keep=1)
    first, rename = save(steps, 7), Path.rename
    write(steps.draft(7, TAG), 0, 2)
    assert steps.names() == [first], "nor does a tag that is not unique cost it"
    steps.discard()

    def renamed(path: Path, target: Path) -> Path:
        assert steps.names() == [first]
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    again = save(steps, 7, tag="2-0123abcd")
    assert steps.names() == [again] != [first]


def test_a_step_beyond_the_newest_is_not_one_of_those_that_are_kept(url: str) -> None:
    """It is damaged, and the run goes on from the one before."""
    steps = Steps(url, keep=2)
    names = [save(steps, step) for step in (2, 30, 12)]
    steps.store.write(f"{names[1]}/param/w/c.0.0", b"damaged")
    assert steps.names() == [names[1], names[2], names[0]]
    names += [save(steps, 18)]
    assert steps.names() == [names[1], names[3], names[2]]
    names += [save(steps, 30, tag="2-0123abcd")]
    assert steps.names() == [names[4], names[3]]
    assert [check(steps, name) for name in steps.names()] == [30, 18]


def test_a_step_vanishes_before_its_files_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever removes it is stopped at the worst moment: nothing half is listed, and what is new
    and whole is, and what else is too old goes."""
    steps = Steps(url, keep=1)
    first, other = save(steps, 1), steps.draft(1, "2-0123abcd")
    write(other, 0, 1)
    owner, name = (s3fs.S3FileSystem, "_bulk_delete") if "://" in url else (shutil, "rmtree")
    whole = getattr(owner, name)

    def stopped(*args: Any, **more: Any) -> object:
        paths = args[-1] if isinstance(args[-1], list) else [str(args[0])] * 2
        if len(paths) > 1 and f"{first}/" in f"{paths[0]}/":
            raise OSError("stopped")
        return whole(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        second = save(steps, 2)
        assert steps.store.children(first), "files of it are there"
        assert not other.store.children()
        assert [check(Steps(url), name) for name in Steps(url).names()] == [2]
        with pytest.raises(Misuse, match=r"step-0+1\S* cannot be removed: .*stopped"):
            steps.discard()
    third = save(steps, 3)
    assert second != third
    assert steps.store.children() == [third]


@pytest.mark.parametrize("moment", ["_noted", "_rename"])
def test_who_is_late_publishes_nothing_that_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    steps, draft = Steps(str(tmp_path)), Steps(str(tmp_path)).draft(3, TAG)
    write(draft, 0, 1)
    real = getattr(Draft, moment)

    def discarded_meanwhile(self: Draft, *args: Any) -> Any:
        found = None if moment == "_rename" else real(self, *args)
        remove = shutil.rmtree
        # The other one has begun, and is half way while this one goes on.
        monkeypatch.setattr(shutil, "rmtree", lambda path: remove(path / "param"))
        steps.discard()
        return real(self, *args) if found is None else found

    monkeypatch.setattr(Draft, moment, discarded_meanwhile)
    with suppress(Misuse):
        draft.publish(contents(3))
    assert steps.names() == []


def test_a_late_manifest_is_not_listed_in_a_bucket(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when all else has been discarded, or while it is."""
    steps, draft, real = Steps(bucket), Steps(bucket).draft(3, TAG), Bucket.write
    write(draft, 0, 1)

    def late(self: Bucket, name: str, data: bytes) -> None:
        if name == native.MANIFEST:
            steps.discard()
        real(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", late)
        with pytest.raises(Misuse, match="was removed meanwhile"):
            draft.publish(contents(3))
    assert steps.store.children() == []

    assert isinstance(steps.store, Bucket)
    again, system = steps.draft(4, TAG), steps.store._system
    write(again, 0, 1)
    remove = system.rm

    def removed(path: str, **more: Any) -> None:
        remove(path, **more)
        if not path.endswith(native.MANIFEST):
            again.store.write(native.MANIFEST, b"late")

    monkeypatch.setattr(system, "rm", removed)
    steps.discard()
    assert steps.names() == []


def test_a_renamed_step_is_refused(tmp_path: Path) -> None:
    steps = Steps(str(tmp_path))
    (tmp_path / save(steps, 3)).rename(tmp_path / "step-000000000004")
    with pytest.raises(Corrupt, match="of step 3"):
        steps.open("step-000000000004")


def test_a_link_to_an_archive_is_not_emptied(tmp_path: Path) -> None:
    steps, archive = Steps(str(tmp_path / "run"), keep=1), tmp_path / "archive"
    (tmp_path / "run" / save(steps, 3)).rename(archive)
    (tmp_path / "run" / "step-000000000003").symlink_to(archive)
    assert check(steps, "step-000000000003") == 3
    save(steps, 4)
    assert len(steps.names()) == 1
    assert (archive / native.MANIFEST).exists()


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match=r"file/step-0+3\.1-0123abcd\.part.* cannot be written"):
        save(Steps(str(tmp_path / "file")), 3)


def test_a_place_is_tried_before_it_is_needed(url: str) -> None:
    steps = Steps(url)
    steps.probe()
    assert steps.store.children() == []


def test_a_file_is_no_place_for_steps(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps = Steps(str(tmp_path / "file"))
    with pytest.raises(Misuse, match=r"file cannot be listed: .*Not a directory"):
        steps.names()
    with pytest.raises(Misuse, match=r"file takes no checkpoints: .*: name a directory, or the"):
        steps.probe()
    assert native.find(tmp_path / "file") is None


@pytest.mark.parametrize("url", ["s3:/bucket/x", "/data/s3:/bucket/x", "file:/x"])
def test_a_url_with_one_slash_is_no_path(url: str) -> None:
    with pytest.raises(Misuse, match=r"neither a path nor a URL: write (s3|file)://"):
        Steps(url)


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    with pytest.raises(Misuse, match=r"nosuch://x cannot be opened: .*nosuch"):
        Steps("nosuch://x")


# ---- a server that dies


later = [pytest.param(size, marks=pytest.mark.long) for size in (40_000, 40_000_000)]


@pytest.mark.parametrize("size", [1, 17_000_000, *later])
def test_a_server_that_dies_leaves_the_step_before(bucket: str, gate: Gate, size: int) -> None:
    steps = Steps(bucket)
    first = save(steps, 1)
    gate.shut_after(size)
    began = time.monotonic()
    with pytest.raises(Misuse, match=f"{bucket}/step-0+2.1-0123abcd.*cannot be"):
        save(steps, 2, arrays=ARRAYS)
    with pytest.raises(Misuse, match="cannot be listed"):
        steps.names()
    with pytest.raises((Corrupt, Misuse), match="cannot be read"):
        steps.open(first)
    assert time.monotonic() - began < 60, "no call waits for ever"
    gate.lift()
    assert Steps(bucket).names() == [first]
    assert check(Steps(bucket), first) == 1
    second = save(steps, 2, tag="2-0123abcd", arrays=ARRAYS)
    steps.discard()
    assert sorted(steps.store.children()) == [first, second]
    assert check(steps, second, ARRAYS) == 2


def test_zarr_reads_the_bucket(bucket: str) -> None:
    import zarr

    steps = Steps(bucket)
    name = save(steps, 3, arrays=ARRAYS)
    found = zarr.open_group(f"{bucket}/{name}", mode="r")[native.node(ARRAYS[0])][...]
    assert (found.reshape(-1) == values(ARRAYS[0], 3)).all()


# ---- kill -9


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.long)])
def test_whoever_is_killed_while_saving_leaves_whole_steps(tmp_path: Path, kills: int) -> None:
    """At random moments of saves, each of which goes on from the newest step."""
    generator, newest = random.Random(kills), 0
    for kill in range(kills):
        child = os.fork()
        if not child:
            try:
                endless(tmp_path, f"{kill}-0123abcd")
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = Steps(str(tmp_path))
        found = [check(steps, name) for name in steps.names()]
        assert found == sorted(found, reverse=True)
        assert not newest or found, "there was one before"
        assert found[:1] >= [newest] * bool(newest), "and nothing newer is lost"
        newest = found[0] if found else 0
    assert newest, "it did save"


def endless(directory: Path, tag: str) -> None:
    steps = Steps(str(directory))
    steps.discard()
    step = check(steps, steps.names()[0]) if steps.names() else 0
    while True:
        step += 1
        save(steps, step, tag=tag)
