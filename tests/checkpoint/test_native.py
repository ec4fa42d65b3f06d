"""The native format: what it wrote is read back, also by zarr; how files are cut and named."""

import asyncio
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

import held
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from native_steps import check, cuts, example, files, flip, write
from zarr.storage import WrapperStore

from outlast.checkpoint import grid, native, zarr_array
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.store import Directory, store_at
from outlast.cluster.errors import Corrupt, Misuse


@pytest.fixture
def small_cuts() -> Iterator[None]:
    with cuts(12, 64):
        yield


# ---- cuts


shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@settings(deadline=None)
@given(shape=shapes, chunk=st.integers(1, 30), factor=st.integers(1, 9))
def test_shards_and_chunks_are_intervals_that_tile_the_array(
    shape: tuple[int, ...], chunk: int, factor: int
) -> None:
    with cuts(chunk, chunk * factor):
        cut, every = grid.grid(shape), list(native.shards_of(Array("param", "x", shape, "int64")))
    assert prod(cut.chunk) <= chunk
    assert prod(cut.shard) <= 2 * chunk * (factor + 1), "with what is beyond the edge"
    elements = np.arange(prod(shape)).reshape(shape)
    counts = [-(-whole // part) for whole, part in zip(shape, cut.shard, strict=True)]
    assert [shard.at for shard in every] == list(np.ndindex(*counts)), "the grid of zarr"
    for shard in every:
        assert shard.stop - shard.start <= chunk * (factor + 1)
        box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(shard.at, cut.shard, strict=True))
        region = elements[box]
        assert region.ravel().tolist() == list(range(shard.start, shard.stop))
        parts = [-(-n // c) for n, c in zip(region.shape, cut.chunk, strict=True)]
        for at, span in zip(np.ndindex(*parts), shard.chunks, strict=True):
            box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, cut.chunk, strict=True))
            assert region[box].ravel().tolist() == list(range(*span))
    assert sum(shard.stop - shard.start for shard in every) == prod(shape)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
awkward = st.sampled_from(["zarr.json", "manifest.json", "", ".", "..", "__x", "a/b", "%", "%2E"])


@settings(deadline=None)
@given(names=st.sets(texts | awkward, min_size=1))
def test_any_name_is_a_node_of_its_own(names: set[str]) -> None:
    found = {native.node(Array("param", name, (), "int8")).removeprefix("param/") for name in names}
    assert len(found) == len(names)
    for name in found:
        assert "/" not in name
        assert not name.startswith("__")
        assert name.strip(".")
        assert name not in (native.GROUP, native.MANIFEST)
        assert name.isascii()
        assert name.isprintable()


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    long = Contents(1, (Array("buffer", "x" * 300, (), "int8"),))
    with pytest.raises(Misuse, match="too long"):
        native.plan(held.Held(long, {}), tmp_path, Wanted())
    deep = Contents(1, (Array("buffer", "x", (1,) * 32, "int8"),))
    with pytest.raises(Misuse, match="buffer/x has 32 axes"):
        native.plan(held.Held(deep, {}), tmp_path, Wanted())
    most = Array("buffer", "x", (1,) * 31, "int8")
    native.write_shard(Directory(tmp_path), most, 0, np.ones(1, "int8"))


# ---- what is written


def test_what_was_written_is_read_also_by_zarr(tmp_path: Path, small_cuts: None) -> None:
    truth = example()
    check(write(truth, tmp_path), truth)
    group = zarr.open_group(tmp_path, mode="r")
    assert group.metadata.consolidated_metadata is not None
    alone = [zarr.open_array(tmp_path / native.node(a), mode="r") for a in truth.contents.arrays]
    for array, single in zip(truth.contents.arrays, alone, strict=True):
        node = group[native.node(array)]
        assert node.shape == array.shape
        assert node.attrs.get("outlast", {"dtype": array.dtype}) == {"dtype": array.dtype}
        for found in (node, single):
            assert np.asarray(found[...]).tobytes() == truth.values[array.key].tobytes()


def test_files_are_those_of_plain_zarr(tmp_path: Path, small_cuts: None) -> None:
    truth = example()
    ours = files(write(truth, tmp_path / "ours"))
    group = zarr.create_group(tmp_path / "zarr")
    for array in truth.contents.arrays:
        cut, values = grid.grid(array.shape), truth.values[array.key]
        plain = native._array(array)
        endian = {} if values.dtype.itemsize == 1 else {"endian": "little"}
        made = group.create_array(
            native.node(array), shape=array.shape, dtype=plain["data_type"],
            chunks=cut.chunk, shards=cut.shard if array.shape else None,
            serializer={"name": "bytes", **({"configuration": endian} if endian else {})},
            compressors={"name": "crc32c"}, attributes=plain["attributes"], fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )  # fmt: skip
        made[...] = values.view(plain["data_type"])
    with warnings.catch_warnings(action="ignore"):  # zarr says that others may not read it
        zarr.consolidate_metadata(group.store)
    theirs = files(tmp_path / "zarr")
    assert ours.keys() - {native.MANIFEST} == theirs.keys()
    for name, whole in theirs.items():
        if name.endswith("zarr.json"):
            plain = json.loads(whole)
            for node in plain.get("consolidated_metadata", {}).get("metadata", {}).values():
                node.pop("consolidated_metadata", None)  # of a group in the group: empty
            assert plain == json.loads(ours[name])
        else:
            assert whole == ours[name]


class Counting(WrapperStore):
    """Notes what zarr asks of a store."""

    def __init__(self, store: Any, seen: list[tuple[str, str]]) -> None:
        super().__init__(store)
        self._seen = seen

    async def get(self, key: str, *args: Any, **more: Any) -> Any:
        self._seen.append(("get", key))
        return await super().get(key, *args, **more)

    async def set(self, key: str, value: Any) -> None:
        self._seen.append(("put", key))
        await super().set(key, value)


class Watched(Directory):
    """A directory that notes what is asked of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: list[tuple[str, str]] = []

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        with super().writing(name) as files:
            yield Counting(files, self.seen)


def test_a_shard_costs_one_put_whatever_is_there_already(tmp_path: Path, small_cuts: None) -> None:
    truth, store = example(), Watched(tmp_path)
    for array in truth.contents.arrays:
        values = truth.values[array.key].reshape(-1)
        for shard in native.shards_of(array):
            for harm in (None, b"what a damaged file has"):
                if harm:
                    (tmp_path / shard.name).write_bytes(harm)
                store.seen.clear()
                native.write_shard(store, array, shard.index, values[shard.start : shard.stop])
                assert store.seen == [("put", shard.name)]


def test_no_thread_is_started_for_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter waits for the threads of an executor, also for one that hangs."""

    def refuse(thread: Thread) -> None:
        raise AssertionError(f"{thread} is started")

    monkeypatch.setattr(Thread, "start", refuse)
    array, values = Array("param", "w", (7, 5), "float32"), np.ones(35, "float32")
    for url in (f"file://{tmp_path}", "memory://bucket/run"):
        native.write_shard(store_at(url), array, 0, values)
    monkeypatch.setattr(zarr_array, "_complete", asyncio.run)
    with pytest.raises(AssertionError, match="is started"):
        native.write_shard(Directory(tmp_path), array, 0, values)


def test_zeros_are_written_too(tmp_path: Path, small_cuts: None) -> None:
    path = write(example(), tmp_path)
    assert len(list((path / "param" / "zero").glob("c.*"))) == 2


def test_zeros_that_are_missing_are_an_error(tmp_path: Path, small_cuts: None) -> None:
    path = write(example(), tmp_path)
    (path / "param" / "zero" / "c.0").unlink()
    source = native.open(path)
    zero = source.contents.by_key["param/zero"]
    for stop in (1, zero.numel):
        with pytest.raises(Corrupt, match=r"zero/c\.0 at byte 0"):
            source.read(zero, 0, stop)
    assert not zarr.open_group(path, mode="r")["param/zero"][...].any(), "zarr reads zeros"


def test_files_have_full_size(tmp_path: Path) -> None:
    """At the real limits, where the last chunk and the last shard are not full."""
    shape = (30_001, 300)
    values = np.random.default_rng(0).standard_normal(shape).astype("float32")
    contents = Contents(1, (Array("buffer", "x", shape, "float32"),))
    truth = held.Held(contents, {"buffer/x": values})
    check(write(truth, tmp_path), truth)
    assert len(list(tmp_path.glob("buffer/x/c.*"))) == 3
    assert (zarr.open_group(tmp_path, mode="r")["buffer/x"][...] == values).all()


def test_the_same_step_has_the_same_bytes_whoever_wrote_it(
    tmp_path: Path, small_cuts: None
) -> None:
    one = files(write(example(), tmp_path / "one"))
    assert one == files(write(example(), tmp_path / "four", seed=7, threads=4))
    assert one != files(write(example(step=4), tmp_path / "other"))


def test_what_was_cut_short_goes_on(tmp_path: Path, small_cuts: None) -> None:
    truth = example()
    whole = files(write(truth, tmp_path / "whole"))
    for item in native.plan(truth, tmp_path / "part", Wanted())[:-1]:
        item.make(lambda size: None)
    last = native.plan(truth, tmp_path / "part", Wanted())[-1]  # by another process
    last.make(lambda size: None)
    assert files(tmp_path / "part") == whole
    torn = tmp_path / "part" / "param" / "zero" / "c.0123.partial"  # zarr's, when it was killed
    torn.write_bytes(b"half")
    native.plan(truth, tmp_path / "part", Wanted())
    assert files(tmp_path / "part") == whole
    flip(tmp_path / "part" / "param" / "h%2F0.w%25" / "c.0.0", 5)
    with pytest.raises(Corrupt, match=r"c\.0\.0 at byte 0"):
        last.make(lambda size: None)


def test_a_newest_step_is_found(tmp_path: Path, small_cuts: None) -> None:
    assert native.find(tmp_path) is None
    for step in (9, 10):
        write(example(step), tmp_path / f"step-{step:012}")
    (tmp_path / f"step-{11:012}").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    newest = tmp_path / native.name_of(Contents(10, ()))
    assert native.find(tmp_path) == native.find(newest) == newest
    assert native.find(tmp_path / "nothing") is None
