"""The native format: what it wrote is read back, also by zarr, and any other byte is an error."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import held
import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint import grid, manifest, native
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import DTYPES, Values
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import digest
from outlast.checkpoint.store import Directory
from outlast.cluster.errors import Corrupt, Misuse

SHAPES = ((), (1,), (0, 4), (7,), (1000,), (30, 7), (9, 5, 6), (3, 70), (2, 3, 1, 40))


@contextmanager
def cuts(chunk: int, shard: int) -> Iterator[None]:
    """Small limits, so that small arrays have many files."""
    native._cut.cache_clear()
    with patch.object(grid, "CHUNK", chunk), patch.object(grid, "SHARD", shard):
        yield
    native._cut.cache_clear()


@pytest.fixture
def small_cuts() -> Iterator[None]:
    with cuts(12, 64):
        yield


def example(step: int = 3) -> held.Held:
    """Every shape and every dtype, in a few roles; one array is all zeros."""
    dtypes = sorted(DTYPES)
    arrays = [Array("buffer", f"b{i}", shape, dtypes[i % len(dtypes)])
              for i, shape in enumerate(SHAPES * 3)]  # fmt: skip
    arrays += [Array("param", "h/0.w%", (30, 7), "float32"), Array("param", "zero", (90,), "int8")]
    arrays += [Array("exp_avg", "h/0.w%", (30, 7), "float32")]
    generator = np.random.default_rng(step)
    values = {}
    for array in arrays:
        raw = generator.standard_normal(array.shape) * 50
        with np.errstate(invalid="ignore"):
            values[array.key] = np.asarray(raw).astype(DTYPES[array.dtype])
    values["param/zero"][:] = 0
    return held.Held(Contents(step, tuple(arrays)), values)


def write(source: held.Held, directory: Path, seed: int = 0, threads: int = 1) -> Path:
    """By as many writers, in any order."""
    *items, last = native.plan(source, directory, Wanted())
    random.Random(seed).shuffle(items)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda item: item.make(lambda size: None), items))
    last.make(lambda size: None)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def check(directory: Path, truth: held.Held) -> None:
    """Read everything, whole and in intervals."""
    source = native.open(directory)
    assert source.contents == truth.contents
    generator = random.Random(1)
    for array in truth.contents.arrays:
        expected = truth.values[array.key].reshape(-1)
        intervals = [sorted(generator.choices(range(array.numel + 1), k=2)) for _ in range(9)]
        for start, stop in [(0, array.numel), *intervals]:
            same(source.read(array, start, stop), expected[start:stop])
        assert digest(source, array) == source.stored_digest(array)
    source.close()


def same(found: Values, expected: Values) -> None:
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


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


def test_zeros_are_written_too(tmp_path: Path, small_cuts: None) -> None:
    path = write(example(), tmp_path)
    assert len(list((path / "param" / "zero").glob("c.*"))) == 2


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


# ---- damage


def flip(path: Path, at: int, bit: int = 1) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    return whole


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    truth, generator = small(), random.Random(0)
    write(truth, tmp_path)
    for name, whole in files(tmp_path).items():
        step = 3 if name.endswith(".json") else 1
        for at in range(generator.randrange(step), len(whole), step):
            flip(tmp_path / name, at, 1 << generator.randrange(8))
            with pytest.raises(Corrupt, match=r"at byte \d+") as error:
                check(tmp_path, truth)
            assert name in str(error.value) or "manifest.json" in name
            (tmp_path / name).write_bytes(whole)
    check(tmp_path, truth)


def small(step: int = 1) -> held.Held:
    arrays = tuple(Array(role, "w", (3, 5), "float32") for role in ("param", "exp_avg"))
    contents = Contents(step, arrays, run={"losses": [0.5]})
    generator = np.random.default_rng(step)
    return held.Held(contents, {a.key: generator.random((3, 5), "float32") for a in arrays})


def unlink(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def absent(path: Path) -> None:
    """As zarr does it, which reads zeros then: no chunk is there, and the index is right."""
    index = b"\xff" * 16
    path.write_bytes(index + native._crc(np.frombuffer(index, np.uint8)))


def leave(path: Path) -> None:
    outside = path.parents[3] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def wait(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [unlink, cut_off, lengthen, absent, leave, wait])
@pytest.mark.parametrize("name", ["param/w/c.0.0", "param/w/zarr.json", "zarr.json"])
def test_what_is_not_whole_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    truth = small()
    directory = write(truth, tmp_path / "step")
    harm(directory / name)
    with pytest.raises(Corrupt, match=f"{name} at byte"):
        check(directory, truth)


def test_the_cache_of_a_hub_may_be_followed(tmp_path: Path) -> None:
    directory = write(small(), tmp_path / "step")
    leave(directory / "param" / "w" / "c.0.0")
    source = native.open(directory, follow=True)
    assert len(source.read(source.contents.arrays[0], 0, 15)) == 15


@pytest.mark.parametrize("stop", [56, 5])
@pytest.mark.parametrize("other", ["an older step", "another role"])
def test_files_of_something_else_are_not_taken(
    tmp_path: Path, small_cuts: None, stop: int, other: str
) -> None:
    """Their own checksums are right, and an interval is not all of a shard: the manifest knows."""
    path, older = write(example(3), tmp_path / "3"), write(example(2), tmp_path / "2")
    origin = older / "param" if other == "an older step" else path / "exp_avg"
    shutil.copy(origin / "h%2F0.w%25/c.0.0", path / "param/h%2F0.w%25/c.0.0")
    source = native.open(path)
    array = source.contents.by_key["param/h/0.w%"]
    with pytest.raises(Corrupt, match=r"c\.0\.0 at byte 0: .*chunk 0 is not what was written"):
        source.read(array, 0, stop)
    if other == "an older step":  # planted: nothing but the manifest tells them apart
        source._manifest.shards[array.key] = native.open(older)._manifest.shards[array.key]
        same(source.read(array, 0, stop), example(2).values[array.key].reshape(-1)[:stop])


# ---- storage that lies


class Liar(Directory):
    """A disk that is full of zeros where nobody looks."""

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        super().read_into(name, offset, out)
        out[len(out) // 2] ^= 1


def test_what_is_not_read_back_is_refused(tmp_path: Path) -> None:
    array = Array("param", "w", (100,), "float32")
    with pytest.raises(Misuse, match=r"param/w/c\.0 gives back other bytes"):
        native.write_shard(Liar(tmp_path), array, 0, np.zeros(100, "float32"))


def test_a_directory_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    array = Array("param", "w", (), "float32")
    with pytest.raises(Misuse, match=r"file/param/w/c cannot be written"):
        native.write_shard(Directory(tmp_path / "file"), array, 0, np.zeros(1, "float32"))


# ---- hostile manifests


def forge(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a step, with the right checksum."""
    path = directory / native.MANIFEST
    body = json.loads(path.read_text())["body"]
    change(body)
    text = json.dumps(body)
    sealed = f'{{"checksum": "{xxhash.xxh3_64_hexdigest(text.encode())}", "body": {text}}}'
    path.write_text(sealed)


def array_as(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """The first array described otherwise; the digests go with its key."""

    def change(body: dict[str, Any]) -> None:
        old = dict(zip(("role", "name", "shape", "dtype"), body["contents"]["arrays"][0],
                       strict=True))  # fmt: skip
        new = old | changes
        body["contents"]["arrays"][0] = list(new.values())
        digests = body["shards"].pop(f"{old['role']}/{old['name']}")
        body["shards"] = {f"{new['role']}/{new['name']}": digests} | body["shards"]

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a larger array": array_as(shape=[4, 5]),
    "another array of its size": array_as(shape=[5, 3]),
    "a huge array": array_as(shape=[1 << 62]),
    "a shape beyond all numbers": array_as(shape=[10**400]),
    "many axes": array_as(shape=[2] * 500),
    "a negative shape": array_as(shape=[-3, -5]),
    "a fraction": array_as(shape=[3.0, 5.0]),
    "text": array_as(shape=["3", "5"]),
    "no shape": array_as(shape=None),
    "another type": array_as(dtype="float64"),
    "no such type": array_as(dtype="object"),
    "an endless name": array_as(name="w" * 300),
    "a name that is no text": array_as(name="\ud800"),
    "a way out": array_as(name="../../../w"),
    "a twin": lambda body: body["contents"]["arrays"].append(body["contents"]["arrays"][0]),
    "no digests": lambda body: body["shards"].clear(),
    "too many digests": lambda body: body["shards"]["param/w"].append("00"),
    "no hexadecimal digest": lambda body: body["shards"].update({"param/w": ["zz" * 20]}),
    "half a digest": lambda body: body["shards"].update(
        {"param/w": [body["shards"]["param/w"][0][:32]]}
    ),
    "a list": lambda body: body.update(shards=[]),
    "no contents": lambda body: body.pop("contents"),
    "another format": lambda body: body.update(format=3),
    "a step that is text": lambda body: body["contents"].update(step="1"),
    "an endless step": lambda body: body["contents"].update(step=float("inf")),
    "more fields": lambda body: body["contents"].update(more=1),
    "a parameter in no group": lambda body: body["contents"].update(
        groups=[{"names": ["v"], "hyper": {}, "scalars": {}}]
    ),
    "a knot": lambda body: body["contents"].update(aliases={"a": "b"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_forged_manifest_is_refused(tmp_path: Path, what: str) -> None:
    truth = small()
    forge(write(truth, tmp_path), HOSTILE[what])
    with pytest.raises(Corrupt, match=r"at byte \d+"):
        everything(tmp_path)


def everything(directory: Path) -> None:
    source = native.open(directory)
    for array in source.contents.arrays:
        digest(source, array)


def test_an_honest_forgery_is_read(tmp_path: Path) -> None:
    """Planted: the forger's own work is not what is refused above."""
    forge(write(small(), tmp_path), lambda body: body["contents"].update(run={}))
    truth = small()
    check(tmp_path, held.Held(replace(truth.contents, run={}), truth.values))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"body'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (write(small(), tmp_path) / native.MANIFEST).write_bytes(text)
    with pytest.raises(Corrupt, match=r"manifest\.json at byte 0"):
        native.open(tmp_path)


def test_a_manifest_is_not_larger_than_memory(tmp_path: Path) -> None:
    path = write(small(), tmp_path) / native.MANIFEST
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(Corrupt, match="too many"):
        native.open(tmp_path)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_mutated_manifest_is_refused(data: st.DataObject) -> None:
    contents = small().contents
    digests = {array.key: ("0" * 40,) for array in contents.arrays}
    whole = manifest.Manifest(contents, digests).to_bytes()
    assert manifest.Manifest.from_bytes(whole, "here").contents == contents
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    mutated = whole[:start] + data.draw(st.binary(max_size=9)) + whole[stop:]
    if mutated != whole:
        with pytest.raises(Corrupt, match="here at byte 0"):
            manifest.Manifest.from_bytes(mutated, "here")
